"""Self-critical sequence training: captions learned from their own CIDEr.

Source: Rennie et al. 2017; Luo 2020 (the mean of the others as the baseline); X-PLUG/mPLUG ``caption_mplug_scst.py``.

Shape legend: B pictures, K candidates of a picture, R candidates of all (B times K, those of a picture are
neighbours), L tokens, X counted tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import Movable
from triptych.data.samples import BrokenSample, Record
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing, Transform
from triptych.generation import BeamSearch, Sampling, generate
from triptych.metrics.captions import CiderD
from triptych.metrics.cider import DocumentFrequencies, Tokens
from triptych.metrics.ptb import ptb_tokenize
from triptych.models.protocol import Encoded, VisionLanguageModel
from triptych.models.text import pad_ids
from triptych.tasks.base import ItemPipeline
from triptych.tasks.captioning import Captioning, CaptioningConfig

Baseline = Literal["mean", "others", "greedy"]
Normalise = Literal["official", "sum", "mean"]

_PROGRESS = 20_000
"""Pictures between two lines of progress."""


@dataclass(frozen=True)
class SelfCriticalConfig:
    """How candidates are found and what is learned from their rewards. The defaults are mPLUG's released code.

    Attributes:
        captioning: the task; the trained model is one for captions with these settings.
        explore: how the candidates of a picture are found: the beams of a search, or samples.
        count: K, of samples; a search gives as many as it has beams.
        baseline: what a reward is compared with: the ``mean`` of the picture's candidates, that of the ``others``
            (Luo 2020), or the reward of the ``greedy`` caption (Rennie et al. 2017).
        normalise: what a candidate's log-probability is divided by: by nothing (``sum``: policy gradient), by its
            generated tokens (``mean``), or (``official``) by the length penalty of the search and by all tokens, start
            token included.
    """

    captioning: CaptioningConfig = field(default_factory=CaptioningConfig)
    explore: BeamSearch | Sampling = field(default_factory=lambda: BeamSearch(5, 8, 25))
    count: int = 5
    baseline: Baseline = "mean"
    normalise: Normalise = "official"

    def __post_init__(self) -> None:
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}, not {self.baseline!r}")
        if self.normalise not in get_args(Normalise):
            raise ValueError(f"normalise must be one of {', '.join(get_args(Normalise))}, not {self.normalise!r}")
        if isinstance(self.explore, Sampling) and self.explore.seed is not None:
            raise ValueError(
                f"with explore.seed {self.explore.seed} every step would draw the same numbers: leave it None"
            )
        least = 1 if self.baseline == "greedy" else 2
        if self.candidates < least:
            raise ValueError(f"the baseline {self.baseline!r} needs at least {least} candidates, not {self.candidates}")

    @property
    def candidates(self) -> int:
        """K."""
        return self.explore.beams if isinstance(self.explore, BeamSearch) else self.count

    def divisor(self, generated: int, tokens: int) -> float:
        """What the log-probability of so many generated tokens is divided by, of so many with the start."""
        if self.normalise == "official":
            # Samples have no length penalty of their own; they get the usual one.
            search = self.explore if isinstance(self.explore, BeamSearch) else BeamSearch()
            return search.penalty(generated) * tokens
        return float(generated) if self.normalise == "mean" else 1.0


@dataclass(frozen=True)
class ReferencedBatch(Movable):
    """Pictures (uint8) or clips, as in ``ItemBatch``, with all captions of each."""

    pixels: Tensor
    references: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.pixels)


class SelfCritical(Captioning):
    """Captioning, trained on the CIDEr-D of what the model itself says.

    The official code searches for beams with gradients, which keeps the graph of every step of every beam. Here the
    search runs without, on cached keys and values, and one pass of the decoder over the found captions then gives their
    log-probabilities: the same numbers, so without dropout the gradient is the official one. With dropout it is not:
    the official search draws a dropout mask for each step, while here the search has none in the decoder (the picture's
    states, which both share, do) and the pass one for each layer.

    The picture is encoded once, and its keys and values are shared by all its candidates.

    Needs the document frequencies of the training captions: :meth:`study`.

    Attributes:
        measures: ``reward``, the mean CIDEr-D (0 to 10) of the candidates of the last call.
    """

    config_type: ClassVar[type[Any]] = SelfCriticalConfig

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        config: SelfCriticalConfig | None = None,
    ) -> None:
        self_critical = config or SelfCriticalConfig()
        super().__init__(model, tokenizer, preprocessing, self_critical.captioning)
        if isinstance(self_critical.explore, BeamSearch) and self_critical.candidates >= tokenizer.vocab_size:
            raise ValueError(f"{self_critical.candidates} beams for a vocabulary of {tokenizer.vocab_size} words")
        self.self_critical = self_critical
        self.frequencies: DocumentFrequencies | None = None
        self.measures: dict[str, Tensor] = {}

    def study(self, records: Iterable[Record], file: Path) -> None:
        """Count the n-grams of all captions of the training data, once in the life of a run: they are kept in ``file``.

        Raises:
            ValueError: no captions, a picture in two records, or a damaged file.
        """
        if not file.exists():
            DocumentFrequencies.count(_tokens_of_pictures(records)).write(file)
        self.frequencies = DocumentFrequencies.read(file)

    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> ItemPipeline[tuple[str, ...]]:
        """All captions of a picture, uncut: they are only compared with what is generated."""
        return ItemPipeline(_references, transform, _batch, 0, self.preprocessing.frames)

    def forward(self, batch: ReferencedBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:  # type: ignore[override]
        """Minus the mean of advantage times normalised log-probability, over all candidates."""
        memory = self._memory(self.preprocessing.normalize(batch.pixels))
        ids_R = self.explore(memory)
        reward_BK = self.rewards(ids_R, batch.references)
        advantage_BK = (reward_BK - self._baseline(reward_BK, memory, batch.references)).to(self.device)
        self.measures = {"reward": reward_BK.mean()}
        return {"self_critical": -(advantage_BK.flatten() * self.scores(ids_R, memory)).mean()}

    def explore(self, memory: Encoded) -> list[list[int]]:
        """R candidates for the pictures' states: ids of the start and what follows. No gradients."""
        search = self.self_critical.explore
        if isinstance(search, BeamSearch):
            return self._generate(memory, search)
        rows_R = torch.arange(len(memory), device=memory.hidden_BLD.device).repeat_interleave(self.self_critical.count)
        return self._generate(memory.detach().rows(rows_R), search)

    def rewards(self, ids_R: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> Tensor:
        """CIDEr-D of each candidate, without the start, against the captions of its picture: ``[B, K]`` on the CPU.

        Raises:
            ValueError: the document frequencies are not known.
        """
        if self.frequencies is None:
            raise ValueError("self-critical training needs the training captions' document frequencies: call study()")
        start, each = len(self._start()), len(ids_R) // len(references)
        texts = [self.tokenizer.decode(ids[start:]) for ids in ids_R]
        pictures = [row // each for row in range(len(ids_R))]
        reward_R = CiderD(dict(enumerate(references)), self.frequencies).scores(pictures, texts)
        return torch.from_numpy(reward_R).float().view(len(references), each)

    def scores(self, ids_R: Sequence[Sequence[int]], memory: Encoded) -> Tensor:
        """Normalised log-probability ``[R]`` of each candidate after the start, with gradients."""
        decoder, device, start = self.model.decoder, memory.hidden_BLD.device, len(self._start())
        assert decoder is not None
        ids_RL = pad_ids(ids_R, self.special.pad, device)
        lengths = [len(ids) for ids in ids_R]
        place_L = torch.arange(1, ids_RL.shape[1], device=device)
        counts_RL = (place_L >= start) & (place_L < torch.tensor(lengths, device=device)[:, None])
        hidden_RLD = decoder(ids_RL[:, :-1], decoder.remember(memory))
        logits_XV = decoder.logits(hidden_RLD[counts_RL]).float()
        log_prob_X = -F.cross_entropy(logits_XV, ids_RL[:, 1:][counts_RL], reduction="none")
        log_prob_RL = torch.zeros(counts_RL.shape, device=device).masked_scatter(counts_RL, log_prob_X)
        divisors = [self.self_critical.divisor(length - start, length) for length in lengths]
        return log_prob_RL.sum(1) / torch.tensor(divisors, device=device)

    def _baseline(self, reward_BK: Tensor, memory: Encoded, references: Sequence[Sequence[str]]) -> Tensor:
        """What each reward is compared with, ``[B, K]`` or ``[B, 1]``."""
        kind, K = self.self_critical.baseline, reward_BK.shape[1]
        if kind == "mean":
            return reward_BK.mean(1, keepdim=True)
        if kind == "others":
            return (reward_BK.sum(1, keepdim=True) - reward_BK) / (K - 1)
        search = self.self_critical.explore
        greedy = BeamSearch(1, search.min_length, search.max_length)
        return self.rewards(self._generate(memory, greedy), references)

    def _generate(self, memory: Encoded, search: BeamSearch | Sampling) -> list[list[int]]:
        assert self.model.decoder is not None
        start_BL = self._ids(self.config.start, memory.hidden_BLD)
        found = generate(self.model.decoder, memory, search, self.special, prompt_BL=start_BL)
        return [hypothesis.ids for hypotheses in found for hypothesis in hypotheses]

    def _start(self) -> list[int]:
        ids_1L, _ = self.tokenizer.encode_batch([self.config.start], max_length=None, end=False)
        return ids_1L[0].tolist()


def _references(record: Record) -> list[tuple[str, ...]]:
    if not record.captions:
        raise BrokenSample(record.key, "it has no caption")
    return [record.captions]


def _batch(pixels: Tensor, picture_Q: Tensor, references: Sequence[tuple[str, ...]]) -> ReferencedBatch:
    return ReferencedBatch(pixels, tuple(references))


def _tokens_of_pictures(records: Iterable[Record]) -> Iterator[list[Tokens]]:
    """The references of each picture that has some."""
    seen: set[str] = set()
    for record in records:
        if not record.captions:
            continue
        if record.image_id in seen:
            raise ValueError(
                f"{record.key}: a second record of the picture {record.image_id!r}; self-critical training needs all "
                "captions of a picture in one record"
            )
        seen.add(record.image_id)
        yield ptb_tokenize(record.captions)
        if len(seen) % _PROGRESS == 0:
            sys.stderr.write(f"document frequencies: {len(seen):,} pictures\n")
