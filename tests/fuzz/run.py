"""Fuzz one target with atheris (libFuzzer), guided by the coverage of clrk's own code.

`run.py TARGET [SECONDS]`. What it learns stays in .output/fuzz/TARGET; a finding is written there as crash-*, with the
command that repeats it. Copy it into tests/fuzz/corpus/TARGET under the name of its symptom, and mend what it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Fuzz until the time is over; the exit code is not 0 when something was found."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    with atheris.instrument_imports(include=["clrk"]):
        from targets import CORPUS, TARGETS
    if name not in TARGETS:
        sys.exit(f"no fuzz target {name!r}; there are: {', '.join(TARGETS)}")
    learnt = ROOT / ".output/fuzz" / name
    learnt.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={learnt}/",
        "-max_len=8192",
        "-timeout=10",
        "-rss_limit_mb=2048",
    ]
    atheris.Setup([sys.argv[0], *options, str(learnt), str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
