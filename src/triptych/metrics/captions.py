"""Caption scores that agree with the field's scorer (pycocoevalcap), without Java: BLEU, ROUGE-L, CIDEr.

Shapes: N images, C candidates.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from triptych.metrics.cider import MAX_ORDER, DocumentFrequencies, Gram, Tokens, Vector, cider, gram_counts, vector
from triptych.metrics.files import read_json
from triptych.metrics.ptb import ptb_tokenize

_ROUGE_BETA = 1.2
_NAMED_IDS = 5  # how many offending ids an error lists

Floats = NDArray[np.float64]


class JavaMetricsUnavailableError(ImportError):
    """METEOR or SPICE was asked for where pycocoevalcap or Java is missing."""


# ------------------------------------------------------------------------------------------------ front function


def score_captions(
    references: Mapping[Any, Sequence[str]],
    predictions: Mapping[Any, str],
    *,
    allow_missing: bool = False,
) -> dict[str, float]:
    """BLEU-1..4, ROUGE-L and CIDEr of one predicted caption an image, as COCOEvalCap computes them.

    Keys, in order: "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L" (0 to 1) and "CIDEr" (0 to 10, papers print
    both times 100). "CIDEr" is the CIDEr-D value, which is what the field's scorer prints under that name.
    Images are read in the order of `references`; document frequencies come from the scored images.

    Raises:
        ValueError: nothing to score, a prediction for an image without references, or an image without a
            prediction (with `allow_missing` such images are left out of every score instead).
    """
    references_N, candidates_N = _tokenized_pairs(references, predictions, allow_missing)
    scores = {f"Bleu_{n + 1}": value for n, value in enumerate(_bleu(references_N, candidates_N))}
    scores["ROUGE_L"] = _rouge_l(references_N, candidates_N)
    scores["CIDEr"] = _mean_cider(references_N, candidates_N, plain=False)
    return scores


def plain_cider(references: Mapping[Any, Sequence[str]], predictions: Mapping[Any, str]) -> float:
    """CIDEr without the D: the mean cosine of TF-IDF n-gram vectors, no clipping and no length penalty, times 10.

    Vedantam et al. 2015, equation 2 and 3, on unstemmed PTB tokens. Errors as in `score_captions`.
    """
    references_N, candidates_N = _tokenized_pairs(references, predictions, allow_missing=False)
    return _mean_cider(references_N, candidates_N, plain=True)


class CiderD:
    """CIDEr-D of many candidates against fixed references, for rewards in self-critical training.

    References are tokenised at once; the vectors of an image's are computed when it is first asked for, and kept.
    Values are per candidate, 0 to 10, equal to pycocoevalcap's.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]], frequencies: DocumentFrequencies | None = None) -> None:
        """Tokenises `references` (captions of each image).

        Args:
            frequencies: how rare n-grams are; by default as these references say.

        Raises:
            ValueError: no images, or an image without references.
        """
        _check_references(references, references)
        groups = _tokenize_groups(list(references.values()))
        self._tokens = dict(zip(references, groups, strict=True))
        self._frequencies = frequencies or DocumentFrequencies.count(groups)
        self._vectors: dict[Hashable, list[Vector]] = {}

    def scores(self, images: Sequence[Hashable], candidates: Sequence[str]) -> Floats:
        """CIDEr-D of each candidate caption against the references of the image beside it.

        An image may occur any number of times. Returns C scores.

        Raises:
            ValueError: the lengths differ, or an image has no references.
        """
        if len(images) != len(candidates):
            raise ValueError(f"{len(images)} images for {len(candidates)} candidates: give one image each")
        unknown = [image for image in images if image not in self._tokens]
        if unknown:
            raise ValueError(f"no references for image {_listed(unknown)}")
        found = zip(images, ptb_tokenize(candidates), strict=True)
        return np.array([cider(vector(tokens, self._frequencies), self._of(image)) for image, tokens in found])

    def _of(self, image: Hashable) -> list[Vector]:
        if image not in self._vectors:
            self._vectors[image] = [vector(tokens, self._frequencies) for tokens in self._tokens[image]]
        return self._vectors[image]


def java_metrics(
    references: Mapping[Any, Sequence[str]],
    predictions: Mapping[Any, str],
    metrics: Sequence[Literal["METEOR", "SPICE"]] = ("METEOR", "SPICE"),
) -> dict[str, float]:
    """METEOR and SPICE (0 to 1), computed by the Java programs inside the optional package pycocoevalcap.

    SPICE fetches its Stanford models on first use. Arguments and ValueErrors as in `score_captions`.

    Raises:
        JavaMetricsUnavailableError: pycocoevalcap or Java is not installed.
    """
    references_N, candidates_N = _tokenized_pairs(references, predictions, allow_missing=False)
    joined_references = {row: [" ".join(tokens) for tokens in group] for row, group in enumerate(references_N)}
    joined_candidates = {row: [" ".join(tokens)] for row, tokens in enumerate(candidates_N)}
    if shutil.which("java") is None:
        raise JavaMetricsUnavailableError("METEOR and SPICE need Java: no `java` on PATH; install a Java runtime")
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError as error:
        raise JavaMetricsUnavailableError(
            'METEOR and SPICE need pycocoevalcap and Java: pip install "triptych-vl[java-metrics]"'
        ) from error
    scorers = {"METEOR": Meteor, "SPICE": Spice}
    return {name: float(scorers[name]().compute_score(joined_references, joined_candidates)[0]) for name in metrics}


# ------------------------------------------------------------------------------------------------------- readers


def read_coco_references(path: str | Path) -> dict[str, list[str]]:
    """Captions of each image in a COCO caption annotation file, images and captions in the file's order.

    Images without captions are left out.

    Raises:
        ValueError: the file is not such JSON, naming the file and the entry.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f'{path}: expected a JSON object with lists "images" and "annotations"')
    images = content.get("images", [])
    if not isinstance(images, list):
        raise ValueError(f'{path}: "images" must be a list')
    captions: dict[str, list[str]] = {}
    for number, entry in enumerate(images):
        captions[_image_id(entry, "id", f"{path}: images[{number}]")] = []
    for number, entry in enumerate(content["annotations"]):
        where = f"{path}: annotations[{number}]"
        image = _image_id(entry, "image_id", where)
        if images and image not in captions:
            raise ValueError(f'{where}: image_id {image!r} is not among "images"')
        captions.setdefault(image, []).append(_caption(entry, where))
    return {image: group for image, group in captions.items() if group}


def read_coco_results(path: str | Path) -> dict[str, str]:
    """The caption of each image in a COCO results file: a JSON list of {"image_id", "caption"}.

    Raises:
        ValueError: the file is not such JSON or an image occurs twice, naming the file and the entry.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f'{path}: expected a JSON list of {{"image_id", "caption"}}')
    captions: dict[str, str] = {}
    for number, entry in enumerate(content):
        where = f"{path}: entry {number}"
        image = _image_id(entry, "image_id", where)
        if image in captions:
            raise ValueError(f"{where}: a second caption for image {image!r}; give one caption an image")
        captions[image] = _caption(entry, where)
    return captions


def _image_id(entry: Any, field: str, where: str) -> str:
    image = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(image, int | str) or isinstance(image, bool):
        raise ValueError(f'{where}: needs "{field}", a number or a string')
    return str(image)  # some write the number, others the same number as text


def _caption(entry: dict[str, Any], where: str) -> str:
    caption = entry.get("caption")
    if not isinstance(caption, str):
        raise ValueError(f'{where}: needs "caption", a string')
    return caption


# ------------------------------------------------------------------------------------------------ checks, tokens


def _listed(ids: Sequence[Hashable]) -> str:
    shown = ", ".join(repr(image) for image in ids[:_NAMED_IDS])
    return shown if len(ids) <= _NAMED_IDS else f"{shown} and {len(ids) - _NAMED_IDS} more"


def _check_references(references: Mapping[Any, Sequence[str]], images: Iterable[Hashable]) -> None:
    if not references:
        raise ValueError("no references: there is nothing to score against")
    as_text = [image for image in images if isinstance(references[image], str)]
    if as_text:
        raise ValueError(f"references must be a list of captions an image, not one string: {_listed(as_text)}")
    empty = [image for image in images if not references[image]]
    if empty:
        raise ValueError(f"images without reference captions: {_listed(empty)}")


def _tokenized_pairs(
    references: Mapping[Any, Sequence[str]], predictions: Mapping[Any, str], allow_missing: bool
) -> tuple[list[list[Tokens]], list[Tokens]]:
    """Tokens of the references and of the prediction of every scored image, in the order of `references`."""
    if not predictions:
        raise ValueError("no predictions: there is nothing to score")
    unknown = [image for image in predictions if image not in references]
    if unknown:
        raise ValueError(f"predictions for images without references: {_listed(unknown)}")
    missing = [image for image in references if image not in predictions]
    if missing and not allow_missing:
        raise ValueError(f"images without a prediction: {_listed(missing)}")
    images = [image for image in references if image in predictions]
    _check_references(references, images)
    not_text = [image for image in images if not isinstance(predictions[image], str)]
    if not_text:
        raise ValueError(f"predictions must be one string an image: {_listed(not_text)}")
    candidates_N = ptb_tokenize([predictions[image] for image in images])
    return _tokenize_groups([references[image] for image in images]), candidates_N


def _tokenize_groups(groups: Sequence[Sequence[str]]) -> list[list[Tokens]]:
    tokens = iter(ptb_tokenize([caption for group in groups for caption in group]))
    return [[next(tokens) for _ in group] for group in groups]


# ----------------------------------------------------------------------------------------------------- BLEU, ROUGE


def _bleu(references_N: list[list[Tokens]], candidates_N: list[Tokens]) -> list[float]:
    """Corpus BLEU-1..4 (Papineni et al. 2002) against the closest reference length, a tie going to the shorter.

    The two constants keep empty counts finite, as the reference scorer does.
    """
    tiny, small = 1e-15, 1e-9
    matched, possible = [0] * MAX_ORDER, [0] * MAX_ORDER
    candidate_length, reference_length = 0, 0
    for references, candidate in zip(references_N, candidates_N, strict=True):
        length = len(candidate)
        candidate_length += length
        reference_length += min((abs(len(tokens) - length), len(tokens)) for tokens in references)[1]
        limits: Counter[Gram] = Counter()
        for tokens in references:
            limits |= gram_counts(tokens)
        for gram, count in gram_counts(candidate).items():
            matched[len(gram) - 1] += min(count, limits[gram])
        for order in range(MAX_ORDER):
            possible[order] += max(0, length - order)
    ratio = (candidate_length + tiny) / (reference_length + small)
    penalty = float(np.exp(1 - 1 / ratio)) if ratio < 1 else 1.0
    precisions = [(hit + tiny) / (total + small) for hit, total in zip(matched, possible, strict=True)]
    products = np.cumprod(precisions)
    return [float(product ** (1 / (order + 1)) * penalty) for order, product in enumerate(products)]


def _rouge_l(references_N: list[list[Tokens]], candidates_N: list[Tokens]) -> float:
    """Mean over images of the F-score of the best precision and the best recall over the references (Lin 2004).

    The reference scorer counts a mixed fraction ("1 1/2") as one token in this score and as two in the others;
    here it is two everywhere, which moves a corpus score by a few millionths at most.
    """
    scores = []
    for references, candidate in zip(references_N, candidates_N, strict=True):
        common = [_common_subsequence_length(candidate, tokens) for tokens in references]
        precision = max(common) / max(1, len(candidate))
        recall = max(hit / max(1, len(tokens)) for hit, tokens in zip(common, references, strict=True))
        weight = _ROUGE_BETA**2
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if max(common) else 0.0)
    return float(np.mean(scores))


def _common_subsequence_length(first: Tokens, second: Tokens) -> int:
    """Longest common subsequence, a row of the table in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for bit, token in enumerate(second):
        places[token] = places.get(token, 0) | 1 << bit
    every = (1 << len(second)) - 1
    row = every
    for token in first:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & every
    return len(second) - row.bit_count()


# ----------------------------------------------------------------------------------------------------------- CIDEr


def _mean_cider(references_N: list[list[Tokens]], candidates_N: list[Tokens], *, plain: bool) -> float:
    """Mean over images, with the document frequencies of these images."""
    frequencies = DocumentFrequencies.count(references_N)
    scores = []
    for references, candidate in zip(references_N, candidates_N, strict=True):
        wanted = [vector(tokens, frequencies) for tokens in references]
        scores.append(cider(vector(candidate, frequencies), wanted, plain=plain))
    return float(np.mean(scores))
