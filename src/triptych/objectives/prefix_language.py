"""PrefixLM: given the image and the first words of a text, generate the rest.

Source: mPLUG section 3.3; the split as in TiMiX ``pretrain_mplug.py:41-51``.
"""

from __future__ import annotations


def split_prefix(text: str, uniform: float) -> tuple[str, str]:
    """Cut a text before word k, uniform over 0..words-1: the prefix may be empty, the rest never is.

    Args:
        uniform: number in [0, 1) that decides k.
    """
    words = text.split()
    if not words:
        return "", ""
    k = min(int(uniform * len(words)), len(words) - 1)
    return " ".join(words[:k]), " ".join(words[k:])
