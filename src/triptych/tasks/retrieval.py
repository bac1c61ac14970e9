"""Image-text retrieval: ranking by embeddings, then re-ranking the top by matching.

Fine-tuning is :class:`triptych.objectives.alignment.Alignment` (ITC with picture-aware targets, and ITM).

Source: mPLUG section 4; X-PLUG/mPLUG ``retrieval_img_mplug.py``.

Shape legend: I images, T texts, N image tokens, L text tokens, D width, E embedding width, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triptych.data.samples import Record, clean_caption
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing
from triptych.metrics.ranking import candidate_ranks, recall_summary
from triptych.models.protocol import Encoded, VisionLanguageModel


@dataclass(frozen=True)
class RetrievalConfig:
    """How retrieval is evaluated.

    Attributes:
        candidates: K, re-ranked for each query (official: 256; paper: 256 for COCO, 128 for Flickr30k); 0 ranks by
            embeddings alone; ``None`` by matching alone, of all pairs, for models whose embeddings were never trained.
        add_similarity: add the embeddings' similarity to the matching score (official: no, but for videos).
        shared_scores: a pair that both directions match counts with the better of its two scores in both (BridgeTower,
            objectives.py:1170). It matters where only one direction has the pair among its candidates.
        batch: pairs that are fused at once.
        max_words, max_tokens: texts are cut to these.
    """

    candidates: int | None = 256
    add_similarity: bool = False
    shared_scores: bool = False
    batch: int = 128
    max_words: int = 30
    max_tokens: int = 32


@dataclass(frozen=True)
class Collection:
    """Pictures and texts, encoded once.

    Attributes:
        images, texts: one chunk an encoded batch, on the CPU, in bf16 under bf16 autocast (5,000 pictures of 256 px
            and 25,000 captions of 30 tokens in mPLUG-base: 2.0 + 1.2 GB; BridgeTower keeps seven states a token where
            mPLUG keeps one).
        image_IE, text_TE: embeddings.
        image_of_text_T: which picture each text belongs to.
    """

    records: list[Record]
    text: list[str]
    images: list[Encoded]
    texts: list[Encoded]
    image_IE: Tensor
    text_TE: Tensor
    image_of_text_T: np.ndarray


@dataclass(frozen=True)
class RetrievalReport:
    """Recalls in percent: ``t2i_r1`` ... ``i2t_r10`` and their ``mean``; and the best candidates of each query."""

    scores: dict[str, float]
    images_of_text: np.ndarray
    texts_of_image: np.ndarray


@torch.no_grad()
def encode_collection(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    preprocessing: Preprocessing,
    batches: Iterable[tuple[Sequence[Record], Tensor]],
    config: RetrievalConfig,
    *,
    blank: bool = False,
) -> Collection:
    """Encode pictures (uint8 pixels) and all their captions; ``blank`` shows grey pictures instead."""
    device = next(model.parameters()).device
    # The residual stream is float32 even under bf16 autocast; what is kept need not be.
    kept = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    records: list[Record] = []
    images, image_parts = [], []
    text: list[str] = []
    owners: list[int] = []
    number_of: dict[str, int] = {}
    for some, pixels in batches:
        # A list may have one record a caption: a picture is encoded once all the same.
        new = [row for row, record in enumerate(some) if _is_new(record.image_id, number_of)]
        for record in some:
            text += [clean_caption(caption, model.cleaning, config.max_words) for caption in record.captions]
            owners += [number_of[record.image_id]] * len(record.captions)
        pixels = torch.full_like(pixels, 128) if blank else pixels
        if not new:
            continue
        image = model.encode_image(preprocessing.normalize(pixels[new].to(device)))
        image_parts.append(model.embed_image(image).float().cpu())
        images.append(image.to("cpu", kept))
        records.extend(some[row] for row in new)
    texts, text_parts = [], []
    for start in range(0, len(text), config.batch):
        ids_BL, mask_BL = tokenizer.encode_batch(
            text[start : start + config.batch], max_length=config.max_tokens, end=model.ends_texts
        )
        encoded = model.encode_text(ids_BL.to(device), mask_BL.to(device))
        text_parts.append(model.embed_text(encoded).float().cpu())
        texts.append(encoded.to("cpu", kept))
    if not records or not text:
        raise ValueError("retrieval needs at least one picture with a caption")
    return Collection(records, text, images, texts, torch.cat(image_parts), torch.cat(text_parts), np.asarray(owners))


def _is_new(image_id: str, number_of: dict[str, int]) -> bool:
    """Number a picture, if it has no number yet."""
    new = image_id not in number_of
    number_of.setdefault(image_id, len(number_of))
    return new


@torch.no_grad()
def evaluate_retrieval(
    model: VisionLanguageModel,
    collection: Collection,
    config: RetrievalConfig,
    matched: Callable[[int], object] = lambda pairs: None,
) -> RetrievalReport:
    """Recalls both ways: the top K by embeddings, ordered by the matching head.

    ``matched`` is told of pairs as they are matched, of :func:`pairs_to_match` in all.
    """
    with torch.autocast("cpu", enabled=False):  # in bf16 neighbours would tie
        similarity_TI = collection.text_TE @ collection.image_IE.T
    images, texts = _Chunks(collection.images), _Chunks(collection.texts)
    k_images, k_texts = _looked_at(collection, config)
    image_scores_TK, images_TK = similarity_TI.topk(k_images, dim=1)
    text_scores_IK, texts_IK = similarity_TI.T.topk(k_texts, dim=1)
    if config.candidates != 0:
        pairs_T = torch.arange(len(images_TK))[:, None].expand_as(images_TK)
        pairs_I = torch.arange(len(texts_IK))[:, None].expand_as(texts_IK)
        matched_TK = _match(model, images, texts, images_TK, pairs_T, config, matched)
        if k_images == len(collection.records) and k_texts == len(collection.text):  # the same pairs
            matched_TI = torch.empty_like(matched_TK).scatter_(1, images_TK, matched_TK)
            matched_IK = matched_TI.T.gather(1, texts_IK)
        else:
            matched_IK = _match(model, images, texts, pairs_I, texts_IK, config, matched)
        weight = float(config.add_similarity)
        image_scores_TK = matched_TK + weight * image_scores_TK
        text_scores_IK = matched_IK + weight * text_scores_IK
    owners_T = collection.image_of_text_T
    texts_of = [np.flatnonzero(owners_T == index).tolist() for index in range(len(collection.records))]
    asked = [index for index, texts_of_image in enumerate(texts_of) if texts_of_image]  # others only distract
    of_texts = (list(images_TK.numpy()), list(image_scores_TK.numpy()))
    of_images = (list(texts_IK.numpy()), list(text_scores_IK.numpy()))
    if config.candidates != 0 and config.shared_scores:
        of_texts, of_images = _shared(of_texts, of_images)
    text_ranks = candidate_ranks(*of_texts, [[owner] for owner in owners_T])
    asked_of, asked_scores = ([part[index] for index in asked] for part in of_images)
    image_ranks = candidate_ranks(asked_of, asked_scores, [texts_of[index] for index in asked])
    return RetrievalReport(
        recall_summary(text_ranks, image_ranks),
        _best_first(images_TK, image_scores_TK),
        _best_first(texts_IK, text_scores_IK),
    )


def pairs_to_match(collection: Collection, config: RetrievalConfig) -> int:
    """How many pairs of a picture and a text the matching head judges for the recalls of a collection."""
    if config.candidates == 0:
        return 0
    images, texts = len(collection.records), len(collection.text)
    k_images, k_texts = _looked_at(collection, config)
    whole = k_images == images and k_texts == texts
    return images * texts if whole else texts * k_images + images * k_texts


def _looked_at(collection: Collection, config: RetrievalConfig) -> tuple[int, int]:
    """How many pictures of each text, and texts of each picture, are kept: those that count for recalls, or K."""
    images, texts = len(collection.records), len(collection.text)
    if config.candidates is None:
        return images, texts
    return min(config.candidates or 10, images), min(config.candidates or 10, texts)


class _Chunks:
    """Rows of many encoded batches as if they were one, without copying them together."""

    def __init__(self, chunks: Sequence[Encoded]) -> None:
        self._chunks = chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def rows(self, index: Tensor) -> Encoded:
        chunk_of = np.searchsorted(self._starts, index.numpy(), side="right") - 1
        picked = [
            self._chunks[chunk].rows(slice(row, row + 1))
            for chunk, row in zip(chunk_of, index.numpy() - self._starts[chunk_of], strict=True)
        ]
        return Encoded.stack(picked)


def _match(
    model: VisionLanguageModel,
    images: _Chunks,
    texts: _Chunks,
    image_XK: Tensor,
    text_XK: Tensor,
    config: RetrievalConfig,
    matched: Callable[[int], object],
) -> Tensor:
    """Matching logits of all pairs, a few at a time; an image or text that several pairs share is moved once."""
    device = next(model.parameters()).device
    flat_image, flat_text = image_XK.flatten(), text_XK.flatten()
    scores = torch.empty(len(flat_image))
    for start in range(0, len(flat_image), config.batch):
        part = slice(start, start + config.batch)
        used_images, image_rows = torch.unique(flat_image[part], return_inverse=True)
        used_texts, text_rows = torch.unique(flat_text[part], return_inverse=True)
        image = images.rows(used_images).to(device)
        text = texts.rows(used_texts).to(device).rows(text_rows.to(device))
        pooled_BP = model.pool(image, text, image_rows.to(device))
        scores[part] = model.match_logits(pooled_BP)[:, 1].float().cpu()
        matched(len(image_rows))
    return scores.view(image_XK.shape)


Candidates = tuple[list[np.ndarray], list[np.ndarray]]
"""Ids and scores of each query's candidates."""


def _shared(of_texts: Candidates, of_images: Candidates) -> tuple[Candidates, Candidates]:
    """The candidates of both directions for both, a pair with the better of its scores."""
    texts, images = len(of_texts[0]), len(of_images[0])
    text_X = np.concatenate([_owners(of_texts), *of_images[0]])
    image_X = np.concatenate([*of_texts[0], _owners(of_images)])
    pair_P, place_X = np.unique(text_X * images + image_X, return_inverse=True)
    score_P = np.full(len(pair_P), -np.inf, dtype=np.float32)
    np.maximum.at(score_P, place_X, np.concatenate([*of_texts[1], *of_images[1]]))
    text_P, image_P = np.divmod(pair_P, images)
    return _grouped(text_P, image_P, score_P, texts), _grouped(image_P, text_P, score_P, images)


def _owners(candidates: Candidates) -> np.ndarray:
    """Which query each candidate is of."""
    return np.repeat(np.arange(len(candidates[0])), [len(ids) for ids in candidates[0]])


def _grouped(query_P: np.ndarray, found_P: np.ndarray, score_P: np.ndarray, queries: int) -> Candidates:
    order_P = np.argsort(query_P, kind="stable")
    ends = np.cumsum(np.bincount(query_P, minlength=queries))[:-1]
    return np.split(found_P[order_P], ends), np.split(score_P[order_P], ends)


def _best_first(candidates_XK: Tensor, scores_XK: Tensor) -> np.ndarray:
    best = candidates_XK.gather(1, scores_XK.argsort(dim=1, descending=True, stable=True))
    return np.asarray(best.numpy())
