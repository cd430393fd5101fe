"""The judge of costs tells proportional work from work that grows faster, and a cheap thing from a dear one."""

import pytest
from cost import assert_cheap, assert_proportional

TEXT = "a" * 12_000


def joined(text: str) -> str:
    return "".join(letter for letter in text)


def searched_again_and_again(text: str) -> int:
    return sum(text[start:].count("b") for start in range(len(text)))


def test_work_in_proportion_passes():
    assert_proportional(joined, TEXT[: len(TEXT) // 8], TEXT)


def test_work_that_grows_with_the_square_fails():
    with pytest.raises(AssertionError, match="times the CPU of the baseline"):
        assert_proportional(searched_again_and_again, TEXT[: len(TEXT) // 8], TEXT)


def test_what_costs_more_than_its_share_fails():
    with pytest.raises(AssertionError, match="at most 2 expected"):
        assert_cheap(lambda: joined(TEXT * 8), lambda: joined(TEXT), at_most=2)
