"""Text generation: beam search, greedy, and sampling, with cached keys and values.

Shape legend: B batch, K beams, R rows (B times K, the beams of an example are neighbours), L length, V vocabulary,
C candidates for a row's next token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from triptych.data.batches import Tokens
from triptych.models.layers import Memory
from triptych.models.protocol import Encoded
from triptych.models.text import TextDecoder

BeamRule = Literal["frozen", "official"]


@dataclass(frozen=True)
class SpecialIds:
    """Ids that start, end and pad a sequence (BERT: ``[CLS]``, ``[SEP]``, ``[PAD]``)."""

    bos: int = 101
    eos: int = 102
    pad: int = 0


@dataclass(frozen=True)
class BeamSearch:
    """Beam search settings; ``beams=1`` is greedy decoding.

    Attributes:
        min_length: generated tokens, without the prompt, before the end token may come.
        max_length: generated tokens, without the prompt, with the end token.
        length_penalty: alpha of Wu et al. 2016: a hypothesis of t tokens scores sum(log p) / ((5 + t) / 6) ** alpha.
        rule: ``frozen`` keeps a finished beam as it is. ``official`` is mPLUG's search (``predictor.py:133-311``): a
            finished beam below the best one goes on being extended, so words can follow the end token.
    """

    beams: int = 5
    min_length: int = 1
    max_length: int = 25
    length_penalty: float = 0.6
    rule: BeamRule = "frozen"

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, not {self.beams}")
        _check_lengths(self.min_length, self.max_length)
        if self.rule not in get_args(BeamRule):
            raise ValueError(f"rule must be one of {', '.join(get_args(BeamRule))}, not {self.rule!r}")

    def penalty(self, length: int) -> float:
        """What a sum of log-probabilities of ``length`` generated tokens is divided by."""
        return float(((5.0 + length) / 6.0) ** self.length_penalty)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: nucleus (``top_p``), ``top_k`` (0: off) and temperature.

    ``seed`` makes the draw reproducible; ``None`` uses torch's global generator.
    """

    min_length: int = 1
    max_length: int = 25
    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ValueError(f"top_p must be in (0, 1] and temperature positive: {self.top_p}, {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative: {self.top_k}")
        _check_lengths(self.min_length, self.max_length)


def _check_lengths(minimum: int, maximum: int) -> None:
    if not 0 <= minimum <= maximum or maximum < 1:
        raise ValueError(f"lengths must satisfy 0 <= min <= max and 1 <= max, not {minimum} and {maximum}")


@dataclass(frozen=True)
class Hypothesis:
    """One generated sequence: all ids (start token and prompt first) and its length-normalised score."""

    ids: list[int] = field(default_factory=list)
    score: float = 0.0


class _Stepper(Protocol):
    """Next-token logits for rows of ids, with whatever is kept between steps."""

    def logits(self, ids_RL: Tensor) -> Tensor: ...
    def select(self, rows_R: Tensor) -> None: ...
    def keep(self, examples_B: Tensor, rows_R: Tensor) -> None: ...


class _Cached:
    """Computes only the newest token of each row; beams share the keys and values of their memory."""

    def __init__(self, decoder: TextDecoder, memory: Encoded, capacity: int) -> None:
        self._decoder = decoder
        self._state = decoder.start(memory, capacity)

    def logits(self, ids_RL: Tensor) -> Tensor:
        return self._decoder.step(ids_RL[:, self._state.length :], self._state)

    def select(self, rows_R: Tensor) -> None:
        self._state.select(rows_R)

    def keep(self, examples_B: Tensor, rows_R: Tensor) -> None:
        self._state.keep(examples_B, rows_R)


class _Uncached:
    """Runs the whole prefix again at every step, over a memory copied for each beam (as the official code does)."""

    def __init__(self, decoder: TextDecoder, memory: Encoded) -> None:
        self._decoder = decoder
        self._memory = memory

    def logits(self, ids_RL: Tensor) -> Tensor:
        copies = len(ids_RL) // len(self._memory)
        rows = torch.arange(len(self._memory), device=ids_RL.device).repeat_interleave(copies)
        hidden_RLD = self._decoder(ids_RL, self._memory.rows(rows))
        return self._decoder.logits(hidden_RLD[:, -1])

    def select(self, rows_R: Tensor) -> None:
        pass

    def keep(self, examples_B: Tensor, rows_R: Tensor) -> None:
        self._memory = self._memory.rows(examples_B)


@torch.no_grad()
def generate(
    decoder: TextDecoder,
    memory: Encoded,
    search: BeamSearch | Sampling,
    special: SpecialIds,
    *,
    prompt_BL: Tensor | None = None,
    cached: bool = True,
) -> list[list[Hypothesis]]:
    """Generate text for every row of a memory.

    Args:
        memory: what the decoder attends to: encoded images, or ``Fused.states()``.
        prompt_BL: ids every output starts with, start token first; by default the start token alone.
        cached: without it every step recomputes the whole prefix; the result is the same.

    Returns:
        For each row its hypotheses, best first: ``search.beams`` of them, or the one sample.
    """
    batch, device = len(memory), memory.hidden_BLD.device
    if prompt_BL is None:
        prompt_BL = torch.full((batch, 1), special.bos, dtype=torch.long, device=device)
    if len(prompt_BL) != batch or prompt_BL.shape[1] == 0:
        raise ValueError(f"a prompt of {list(prompt_BL.shape)} ids for a memory of {batch} rows")
    if batch == 0:
        return []
    was_training = decoder.training
    decoder.eval()
    try:
        capacity = prompt_BL.shape[1] + search.max_length
        stepper: _Stepper = _Cached(decoder, memory, capacity) if cached else _Uncached(decoder, memory)
        if isinstance(search, Sampling):
            return _sample(stepper, search, special, prompt_BL)
        if search.rule == "official":
            return _official_beam_search(stepper, search, special, prompt_BL)
        return _beam_search(stepper, search, special, prompt_BL)
    finally:
        decoder.train(was_training)


RankRule = Literal["chain", "official"]


@torch.no_grad()
def rank_texts(
    decoder: TextDecoder,
    memory: Encoded,
    texts: Tokens,
    *,
    candidates: int = 0,
    rule: RankRule = "chain",
    rows_at_once: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Which of A given texts the decoder finds most probable, for every one of B rows of a memory.

    The memory's keys and values are computed once, and all texts share them; only states whose next token counts go
    through the vocabulary head.

    Args:
        texts: ``[CLS] text [SEP]``.
        candidates: K; only the K texts whose first token is the most probable are scored (official: 128); 0 scores all.
        rule: ``chain`` sums the log-probabilities of all tokens. ``official`` counts the first one twice (ALBEF's and
            mPLUG's ``rank_answer``, model_vqa_mplug.py:226-234).
        rows_at_once: pairs of a row and a text in one pass of the decoder.

    Returns:
        Indices of texts ``[B, K]`` and their scores, best first.
    """
    device = memory.hidden_BLD.device
    ids_AL, lengths_A = texts.ids_BL.to(device), texts.mask_BL.sum(1).to(device)
    K = min(candidates or len(ids_AL), len(ids_AL))
    kept = [own.contiguous() for own in decoder.remember(memory)]
    start_B1 = ids_AL[:1, :1].expand(len(memory), 1)
    first_BV = decoder.logits(decoder(start_B1, kept)[:, 0]).float().log_softmax(-1)
    first_BK, text_BK = first_BV[:, ids_AL[:, 1]].topk(K, dim=1)
    # The shortest first: then the texts of one pass need little padding.
    order_BK = lengths_A[text_BK].argsort(dim=1, stable=True)
    first_BK, text_BK = first_BK.gather(1, order_BK), text_BK.gather(1, order_BK)
    score_BK = first_BK * (2 if rule == "official" else 1)
    width = max(1, rows_at_once // max(1, len(memory)))
    for column in range(0, K, width):
        part = slice(column, column + width)
        score_BK[:, part] += _rest_of_texts(decoder, kept, ids_AL, lengths_A, text_BK[:, part])
    score_BK, best_BK = score_BK.sort(dim=1, descending=True, stable=True)
    return text_BK.gather(1, best_BK), score_BK


def _rest_of_texts(
    decoder: TextDecoder, kept: list[Memory], ids_AL: Tensor, lengths_A: Tensor, text_BK: Tensor
) -> Tensor:
    """Log-probability of each text after its first token, ``[B, K]``."""
    text_R = text_BK.flatten()
    longest = int(lengths_A[text_R].max())
    ids_RL = ids_AL[text_R, :longest]
    counts_RL = torch.arange(1, longest, device=ids_RL.device) < lengths_A[text_R, None]
    counts_RL[:, 0] = False
    hidden_RLD = decoder(ids_RL[:, :-1], kept)
    log_probs_XV = decoder.logits(hidden_RLD[counts_RL]).float().log_softmax(-1)
    gained_RL = torch.zeros(counts_RL.shape, device=ids_RL.device)
    gained_RL[counts_RL] = log_probs_XV.gather(1, ids_RL[:, 1:][counts_RL][:, None])[:, 0]
    return gained_RL.sum(1).view(text_BK.shape)


def _next_logits(stepper: _Stepper, ids_RL: Tensor, special: SpecialIds, end_allowed: bool) -> tuple[Tensor, Tensor]:
    """Logits ``[R, V]`` of the next token and, ``[R, 1]``, what to take off for log-probabilities.

    An end token that may not come yet has its share of the sum all the same, as in the official code.
    """
    logits_RV = stepper.logits(ids_RL).float()
    total_R1 = logits_RV.logsumexp(-1, keepdim=True)
    if not end_allowed:
        logits_RV[:, special.eos] = float("-inf")
    return logits_RV, total_R1


def _best_next(
    stepper: _Stepper, ids_RL: Tensor, special: SpecialIds, end_allowed: bool, count: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids ``[R, C]`` of each row's best next tokens.

    The best ``count`` of all beams are among the best ``count`` of each, so nothing as wide as the vocabulary has to
    be scored by beams.
    """
    logits_RV, total_R1 = _next_logits(stepper, ids_RL, special, end_allowed)
    best_RC, token_RC = logits_RV.topk(min(count, logits_RV.shape[-1]))
    return best_RC - total_R1, token_RC


def _beam_search(
    stepper: _Stepper, search: BeamSearch, special: SpecialIds, prompt_BL: Tensor
) -> list[list[Hypothesis]]:
    """Beams compete by normalised score; a finished one keeps its place, text and score until it is outranked."""
    B, K = len(prompt_BL), search.beams
    device = prompt_BL.device
    done: list[list[Hypothesis]] = [[] for _ in range(B)]
    examples_B = torch.arange(B, device=device)  # which input each remaining row block is
    ids_RL, prompt_length = prompt_BL, prompt_BL.shape[1]
    sums_BK = torch.zeros(B, 1, device=device)
    scores_BK = torch.zeros(B, 1, device=device)
    finished_BK = torch.zeros(B, 1, dtype=torch.bool, device=device)

    for step in range(1, search.max_length + 1):
        gained_RC, token_RC = _best_next(stepper, ids_RL, special, step > search.min_length, K)
        beams, C = sums_BK.shape[1], token_RC.shape[1]
        # A finished beam has one continuation: padding, at no cost, with the score it finished with.
        ended_BK1 = finished_BK[..., None]
        alone_C = torch.tensor([0.0] + [float("-inf")] * (C - 1), device=device)
        gained_BKC = torch.where(ended_BK1, alone_C, gained_RC.view(-1, beams, C))
        tokens_BKC = token_RC.view(-1, beams, C).masked_fill(ended_BK1, special.pad)
        next_BKC = sums_BK[..., None] + gained_BKC
        ranked_BKC = torch.where(ended_BK1, scores_BK[..., None] + gained_BKC, next_BKC / search.penalty(step))
        scores_BK, flat_BK = ranked_BKC.flatten(1).topk(min(K, beams * C))
        parent_BK, token_BK = flat_BK // C, tokens_BKC.flatten(1).gather(1, flat_BK)
        sums_BK = next_BKC.flatten(1).gather(1, flat_BK)
        finished_BK = finished_BK.gather(1, parent_BK) | (token_BK == special.eos)

        first_row_B1 = torch.arange(len(examples_B), device=device)[:, None] * beams
        rows_R = (first_row_B1 + parent_BK).flatten()
        ids_RL = torch.cat([ids_RL[rows_R], token_BK.reshape(-1, 1)], dim=1)
        # An example ends when all its beams have, at the latest with the last step.
        ended_B = finished_BK.all(1) | (step == search.max_length)
        if not ended_B.any():
            stepper.select(rows_R)
            continue
        width = sums_BK.shape[1]
        beams_BKL = ids_RL.view(len(examples_B), width, -1)
        for row in ended_B.nonzero().flatten().tolist():
            ids, scores = beams_BKL[row].tolist(), scores_BK[row].tolist()
            done[int(examples_B[row])] = [
                Hypothesis(_until_end(beam, special, prompt_length), score)
                for beam, score in zip(ids, scores, strict=True)
                if score > float("-inf")
            ]
        left_B = (~ended_B).nonzero().flatten()
        if len(left_B) == 0:
            break
        kept_R = rows_R.view(-1, width)[left_B].flatten()
        stepper.keep(left_B, kept_R)
        ids_RL = beams_BKL[left_B].flatten(0, 1)
        examples_B, sums_BK, scores_BK = examples_B[left_B], sums_BK[left_B], scores_BK[left_B]
        finished_BK = finished_BK[left_B]
    return done


def _until_end(ids: list[int], special: SpecialIds, start: int) -> list[int]:
    """Cut the padding after the end token."""
    return ids[: ids.index(special.eos, start) + 1] if special.eos in ids[start:] else ids


def _official_beam_search(
    stepper: _Stepper, search: BeamSearch, special: SpecialIds, prompt_BL: Tensor
) -> list[list[Hypothesis]]:
    """mPLUG's own search, for parity (X-PLUG/mPLUG ``models/predictor.py:133-311``).

    A beam that emits the end token becomes a hypothesis and is extended all the same. An example stops when its
    *best* beam ends; all its beams then become hypotheses, finished or not.
    """
    B, K = len(prompt_BL), search.beams
    device = prompt_BL.device
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(B)]
    examples_B = torch.arange(B, device=device)
    ids_RL = prompt_BL
    sums_BK = torch.zeros(B, 1, device=device)

    for step in range(1, search.max_length + 1):
        gained_RC, token_RC = _best_next(stepper, ids_RL, special, step > search.min_length, K)
        beams, C = sums_BK.shape[1], token_RC.shape[1]
        ranked_BX = (sums_BK[..., None] + gained_RC.view(-1, beams, C)).flatten(1) / search.penalty(step)
        scores_BK, flat_BK = ranked_BX.topk(min(K, beams * C))
        sums_BK = scores_BK * search.penalty(step)
        parent_BK, token_BK = flat_BK // C, token_RC.view(len(ranked_BX), -1).gather(1, flat_BK)
        width = sums_BK.shape[1]
        first_row_B1 = torch.arange(len(examples_B), device=device)[:, None] * beams
        rows_R = (first_row_B1 + parent_BK).flatten()
        beams_BKL = torch.cat([ids_RL[rows_R], token_BK.reshape(-1, 1)], dim=1).view(len(examples_B), width, -1)

        ends_BK = (token_BK == special.eos) | (step == search.max_length)
        ended_B = ends_BK[:, 0]
        for row, beam in (ends_BK | ended_B[:, None]).nonzero().tolist():
            found = Hypothesis(beams_BKL[row, beam].tolist(), float(scores_BK[row, beam]))
            hypotheses[int(examples_B[row])].append(found)
        left_B = (~ended_B).nonzero().flatten()
        if len(left_B) == 0:
            break
        kept_R = rows_R.view(-1, width)[left_B].flatten()
        stepper.keep(left_B, kept_R)
        ids_RL = beams_BKL[left_B].flatten(0, 1)
        examples_B, sums_BK = examples_B[left_B], sums_BK[left_B]
    return [sorted(found, key=lambda h: h.score, reverse=True)[:K] for found in hypotheses]


def _sample(stepper: _Stepper, search: Sampling, special: SpecialIds, prompt_BL: Tensor) -> list[list[Hypothesis]]:
    """Draw one sequence a row; the score is the mean log-probability (at temperature 1) of its tokens."""
    device = prompt_BL.device
    generator = None if search.seed is None else torch.Generator(device).manual_seed(search.seed)
    ids_BL = prompt_BL
    sums_B = torch.zeros(len(prompt_BL), device=device)
    lengths_B = torch.zeros_like(sums_B)
    finished_B = torch.zeros(len(prompt_BL), dtype=torch.bool, device=device)
    for step in range(1, search.max_length + 1):
        logits_BV, total_B1 = _next_logits(stepper, ids_BL, special, step > search.min_length)
        log_probs_BV = logits_BV - total_B1
        probs_BV = _nucleus(log_probs_BV / search.temperature, search)
        token_B1 = torch.multinomial(probs_BV, 1, generator=generator)
        gained_B = log_probs_BV.gather(1, token_B1)[:, 0]
        sums_B += torch.where(finished_B, 0.0, gained_B)
        lengths_B += (~finished_B).float()
        token_B = torch.where(finished_B, special.pad, token_B1[:, 0])
        ids_BL = torch.cat([ids_BL, token_B[:, None]], dim=1)
        finished_B = finished_B | (token_B == special.eos)
        if finished_B.all():
            break
    start = prompt_BL.shape[1]
    scores = (sums_B / lengths_B).tolist()
    return [
        [Hypothesis(_until_end(ids, special, start), score)] for ids, score in zip(ids_BL.tolist(), scores, strict=True)
    ]


def _nucleus(logits_BV: Tensor, search: Sampling) -> Tensor:
    """Probabilities restricted to the top k and to the smallest set whose mass reaches ``top_p``."""
    probs_BV = logits_BV.softmax(-1)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    mass_before_BV = sorted_BV.cumsum(-1) - sorted_BV
    dropped_BV = (mass_before_BV >= search.top_p) & (search.top_p < 1)  # rounded, the mass reaches 1 before the tail
    if search.top_k:
        dropped_BV[:, search.top_k :] = True
    dropped_BV[:, 0] = False
    return torch.zeros_like(probs_BV).scatter(1, order_BV, sorted_BV.masked_fill(dropped_BV, 0.0))
