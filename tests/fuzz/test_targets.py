"""The fuzz targets in CI: the whole corpus, and what Hypothesis makes of it. `make fuzz` goes on by coverage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import CORPUS, TARGETS, seeds

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "put", "twice", "flip"]),
        st.integers(0, 4096),
        st.integers(0, 64),
        st.binary(max_size=8),
    ),
    max_size=4,
)


def mutate(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    """Cut out, put in, repeat, or flip some bytes of a seed."""
    for kind, position, length, extra in edits:
        at = position % (len(data) + 1)
        part = data[at : at + length]
        match kind:
            case "cut":
                data = data[:at] + data[at + length :]
            case "put":
                data = data[:at] + extra + data[at:]
            case "twice":
                data = data[:at] + part + data[at:]
            case _:
                data = data[:at] + bytes(byte ^ 0x20 for byte in part) + data[at + length :]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_holds(name: str) -> None:
    found = seeds(name)
    assert found, f"tests/fuzz/corpus/{name} is empty: a fuzzer without seeds finds nothing"
    for data in found:
        assert TARGETS[name](data) is None, "a target judges by its own assertions, and returns nothing"


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100)
@given(data=st.data())
def test_what_hypothesis_makes_of_it(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from([*seeds(name), b""]))
    assert TARGETS[name](mutate(seed, data.draw(EDITS))) is None  # the invariants are asserted inside the target


def test_every_corpus_has_its_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
