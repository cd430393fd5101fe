"""Globs: against a regular expression that means the same, and in a time that no text can stretch."""

import re

import pytest
from cost import assert_proportional
from hypothesis import given
from hypothesis import strategies as st

from clrk.core.globs import fits_glob

_FEW = st.text(alphabet="ab*/", max_size=8)


@given(_FEW, st.text(alphabet="ab/", max_size=12))
def test_a_glob_means_what_its_regular_expression_means(glob, text):
    meaning = ".*".join(re.escape(part) for part in glob.split("*"))
    assert fits_glob(glob, text) == (re.fullmatch(meaning, text, re.DOTALL) is not None)


@pytest.mark.parametrize(("glob", "text"), [("gpt-4o*", "gpt-4o"), ("*", ""), ("*mini", "gpt-4o-mini"), ("a", "a")])
def test_fits(glob, text):
    assert fits_glob(glob, text)


@pytest.mark.parametrize(("glob", "text"), [("gpt-4o*", "gpt-4"), ("a*a", "a"), ("", "a"), ("a", "ab")])
def test_does_not_fit(glob, text):
    assert not fits_glob(glob, text)


def test_a_hostile_text_takes_time_in_proportion():
    glob, text = "*a" * 60 + "b", "a" * 100_000
    assert not fits_glob(glob, text)
    assert_proportional(lambda text: fits_glob(glob, text), text[:12_500], text)
