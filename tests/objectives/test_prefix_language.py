"""Where PrefixLM cuts a text."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from triptych.objectives.prefix_language import split_prefix

UNIFORM = st.floats(0, 1, exclude_max=True)


@given(st.text(), UNIFORM)
def test_prefix_and_target_are_the_text(text: str, uniform: float) -> None:
    prefix, target = split_prefix(text, uniform)
    assert prefix.split() + target.split() == text.split()
    assert " ".join(part for part in (prefix, target) if part) == " ".join(text.split())


@given(st.lists(st.text(st.characters(categories=["L"]), min_size=1), min_size=1, max_size=20), UNIFORM)
def test_target_is_never_empty(words: list[str], uniform: float) -> None:
    prefix, target = split_prefix(" ".join(words), uniform)
    assert target
    assert len(prefix.split()) == math.floor(uniform * len(words))


def test_every_cut_is_equally_likely() -> None:
    draws = 1000
    cuts = Counter(len(split_prefix("a b c d", index / draws)[0].split()) for index in range(draws))
    assert cuts == {0: 250, 1: 250, 2: 250, 3: 250}


def test_edges() -> None:
    assert split_prefix("", 0.5) == ("", "")
    assert split_prefix("  \n ", 0.5) == ("", "")
    assert split_prefix("dog", 0.999) == ("", "dog")
    assert split_prefix("a red dog", 1 - 2**-53) == ("a red", "dog")
    assert split_prefix(" a  red\tdog ", 0.0) == ("", "a red dog")
