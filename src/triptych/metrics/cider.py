"""CIDEr and CIDEr-D of one caption against the references of its picture, given how rare each n-gram is.

Source: Vedantam et al. 2015; constants and details of CIDEr-D as in pycocoevalcap ``cider_scorer.py``, whose values
these are.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

MAX_ORDER = 4
_SIGMA = 6.0

Tokens = list[str]
Gram = tuple[str, ...]


def gram_counts(tokens: Tokens) -> Counter[Gram]:
    """How often each n-gram (n = 1..4) occurs in a caption."""
    orders = range(1, MAX_ORDER + 1)
    return Counter(chain.from_iterable(zip(*(tokens[i:] for i in range(n)), strict=False) for n in orders))


class DocumentFrequencies:
    """In the references of how many pictures each n-gram occurs.

    What occurs with one picture alone is as rare as what never occurs, so it is not kept. For COCO's 113,287 training
    pictures that leaves some hundred thousand n-grams.

    Args:
        pictures: that were counted.
        counts: pictures of each n-gram.

    Raises:
        ValueError: no pictures, or a count that is larger than their number.
    """

    def __init__(self, pictures: int, counts: Mapping[Gram, int]) -> None:
        if pictures < 1:
            raise ValueError("no pictures: there are no n-grams to count")
        if max(counts.values(), default=0) > pictures:
            raise ValueError(f"an n-gram of more than all {pictures} pictures")
        self.pictures = pictures
        self.counts = {gram: count for gram, count in counts.items() if count > 1}
        self._rarity = [math.log(pictures / max(1, count)) for count in range(pictures + 1)]

    @classmethod
    def count(cls, references: Iterable[Sequence[Tokens]]) -> Self:
        """Count over the references of each picture, given as tokens.

        Raises:
            ValueError: no pictures.
        """
        pictures, counts = 0, Counter[Gram]()
        for group in references:
            pictures += 1
            counts.update({gram for tokens in group for gram in gram_counts(tokens)})
        return cls(pictures, counts)

    def weights(self, tokens: Tokens) -> dict[Gram, float]:
        """Of each n-gram of a caption: its count times log(pictures / pictures whose references have it).

        One such picture is assumed for an n-gram that none has.
        """
        counts, rarity = self.counts, self._rarity
        return {gram: times * rarity[counts.get(gram, 1)] for gram, times in gram_counts(tokens).items()}

    def write(self, path: Path) -> None:
        """Gzipped JSON, replacing the file as a whole."""
        content = {"pictures": self.pictures, "counts": {" ".join(gram): n for gram, n in self.counts.items()}}
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, naming it.
        """
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
            pictures, counts = content["pictures"], content["counts"].items()
            if not all(type(number) is int and number > 0 for number in (pictures, *(count for _, count in counts))):
                raise ValueError("its counts are not positive integers")
            return cls(pictures, {tuple(gram.split(" ")): count for gram, count in counts})
        except FileNotFoundError:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no document frequencies: {error!r}") from error


class Vector(NamedTuple):
    """A caption as CIDEr sees it.

    Attributes:
        weights: of each n-gram, its count times its rarity.
        norms: Euclidean length of the n-grams of each order.
        bigrams: their number, which the scorer's penalty takes for the length.
    """

    weights: Mapping[Gram, float]
    norms: Sequence[float]
    bigrams: int


def vector(tokens: Tokens, frequencies: DocumentFrequencies) -> Vector:
    """The TF-IDF vector of a caption."""
    weights = frequencies.weights(tokens)
    squares = [0.0] * MAX_ORDER
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight * weight
    return Vector(weights, [math.sqrt(square) for square in squares], max(0, len(tokens) - 1))


def cider(candidate: Vector, references: Sequence[Vector], *, plain: bool = False) -> float:
    """CIDEr-D, or plain CIDEr (no clipping, no length penalty), of a caption against its references, 0 to 10."""
    return 10 * sum(_similarity(candidate, reference, plain) for reference in references) / len(references)


def _similarity(candidate: Vector, reference: Vector, plain: bool) -> float:
    """Mean over the orders of the cosine of two captions' vectors."""
    products = [0.0] * MAX_ORDER
    for gram, weight in candidate.weights.items():
        wanted = reference.weights.get(gram)
        if wanted is not None:
            products[len(gram) - 1] += (weight if plain else min(weight, wanted)) * wanted
    norms = [ours * theirs for ours, theirs in zip(candidate.norms, reference.norms, strict=True)]
    cosine = sum(product / norm for product, norm in zip(products, norms, strict=True) if norm > 0) / MAX_ORDER
    if plain:
        return cosine
    return cosine * math.exp(-((candidate.bigrams - reference.bigrams) ** 2) / (2 * _SIGMA**2))
