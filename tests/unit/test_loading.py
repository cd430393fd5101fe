"""What is loaded for good is out of the garbage collector's sight; in a process of its own, which this would change."""

import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("problem", ["", "raise ImportError"])
def test_loaded_modules_are_left_alone_and_garbage_is_not(problem):
    done = run(f"""
import contextlib, gc, weakref
from clrk.core.loading import loading

gc.collect()
before = len(gc.get_objects())
with contextlib.suppress(ImportError), loading():
    assert not gc.isenabled()
    import clrk.gateway.serve
    {problem}
assert gc.isenabled()
assert gc.get_freeze_count() > 50_000
assert len(gc.get_objects()) < before

class Ring: pass
ring = Ring()
ring.itself, gone = ring, weakref.ref(ring)
del ring
gc.collect()
assert gone() is None
""")
    assert (done.returncode, done.stderr) == (0, "")
