"""From records to the batches of each kind of training: what workers do, and how examples become a batch.

A pipeline's ``prepare`` runs in the loader's workers, its ``collate`` in the main process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from triptych.data.batches import ImageTextBatch, PretrainingBatch, Tokens, stable_id
from triptych.data.loader import seeded
from triptych.data.pictures import show, stack
from triptych.data.samples import BrokenSample, Cleaning, Record, clean_caption
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import FrameChoice, Transform


@dataclass(frozen=True)
class Example:
    """One decoded sample.

    Attributes:
        pixels: uint8, [C, H, W] or, of a clip, [F, C, H, W].
        captions: cleaned; the first is the one to train on.
        uniform: a random number in [0, 1) for what is decided later (the PrefixLM split).
    """

    record: Record
    pixels: Tensor
    captions: tuple[str, ...]
    image_id: int
    uniform: float


@dataclass(frozen=True)
class ImageTextPipeline:
    """Pictures with one of their captions.

    Args:
        end: whether texts end with the end token (a caption to generate does; a text to encode does where the model's
            ``ends_texts`` says so).
        prompt: put before every caption.
        cleaning: of the captions. Those to encode are cleaned as the model says; those to generate are in lower case.
        max_words, max_tokens: longer captions are cut (official: 30 words; 25 tokens in ALBEF's code).
    """

    tokenizer: Tokenizer
    transform: Transform
    max_words: int = 30
    max_tokens: int = 32
    end: bool = False
    prompt: str = ""
    cleaning: Cleaning = "words"
    frames: FrameChoice = field(default_factory=FrameChoice)

    def prepare(self, record: Record, seed: int) -> Example:
        """Decode, transform, and choose a caption."""
        cleaned = (clean_caption(caption, self.cleaning, self.max_words) for caption in record.captions)
        captions = tuple(caption for caption in cleaned if caption)
        if not captions:
            raise BrokenSample(record.key, "it has no caption")
        with seeded(seed):
            pixels = show(record, self.transform, self.frames)
            choice, uniform = torch.rand(2).tolist()
        first = int(choice * len(captions))
        light = Record(record.key, None, record.captions, record.image_id, record.extra)
        ordered = (captions[first], *captions[:first], *captions[first + 1 :])
        return Example(light, pixels, ordered, stable_id(record.image_id), uniform)

    def tokens(self, texts: Sequence[str], end: bool) -> Tokens:
        """Token ids of some texts."""
        return Tokens(*self.tokenizer.encode_batch(list(texts), max_length=self.max_tokens, end=end))

    def collate(self, examples: list[Example]) -> ImageTextBatch:
        """One batch."""
        texts = [f"{self.prompt} {example.captions[0]}".strip() for example in examples]
        return ImageTextBatch(_pixels(examples), self.tokens(texts, self.end), _ids(examples))


@dataclass(frozen=True)
class PretrainingPipeline(ImageTextPipeline):
    """Pictures with a caption, whole and split into prefix and target."""

    split: Callable[[str, float], tuple[str, str]] = lambda text, uniform: ("", text)

    def collate(self, examples: list[Example]) -> PretrainingBatch:
        """One batch."""
        whole = [example.captions[0] for example in examples]
        halves = [self.split(text, example.uniform) for text, example in zip(whole, examples, strict=True)]
        return PretrainingBatch(
            _pixels(examples),
            self.tokens(whole, self.end),
            _ids(examples),
            self.tokens([prefix for prefix, _ in halves], self.end),
            self.tokens([target for _, target in halves], end=True),
        )


def _pixels(examples: Sequence[Example]) -> Tensor:
    return stack([example.pixels for example in examples])


def _ids(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.image_id for example in examples], dtype=torch.long)
