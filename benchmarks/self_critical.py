"""One step of self-critical training: where its time goes.

    python benchmarks/self_critical.py --size base > benchmarks/results/self_critical.json

Encoding of the pictures, search for their captions (5 beams), rewards (CIDEr-D against 5 references of each), one pass
of the decoder over the captions, backward pass, clipping and AdamW; random pixels, weights and words. The end token is
forbidden, so that every beam runs its 25 tokens. ``tiny`` has the pictures and batch of the recipe ``shapes_tiny`` (48
pixels, 64), ``base`` those of mPLUG-base (256 pixels, batch 4). "rest" is what remains of the forward pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from common import Options, options, parser, report
from triptych.data.samples import Record
from triptych.data.tokenizers import Tokenizer, wordpiece_from_vocab
from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.models.mplug import SIZES, MPlug
from triptych.tasks.self_critical import ReferencedBatch, SelfCritical, SelfCriticalConfig
from triptych.training.optim import OptimConfig, build_optimizer
from triptych.training.parallel import autocast

BATCH = {"tiny": 64, "base": 4}
REFERENCES, CORPUS = 5, 1000
FORWARD = {"encode": "model.encode_image", "generate": "explore", "reward": "rewards", "score": "scores"}
"""The parts of the forward pass, and the methods of the task that do them."""


def tokenizer_of(words: list[str], folder: str) -> Tokenizer:
    """BERT's special tokens and some words."""
    path = Path(folder, "vocab.txt")
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    return wordpiece_from_vocab(path)


class Step:
    """One optimiser step, as :class:`triptych.training.loop.Trainer` makes it, with a clock on each part."""

    def __init__(self, size: str, precision: str, tokens: int, how: Options) -> None:
        config, dice = SIZES[size], random.Random(0)
        # Of letters: tokens of captions are found much faster where no digits or marks are.
        words = list(islice(map("".join, product(ascii_lowercase, repeat=4)), config.text.vocab_size - 5))
        captions = [
            tuple(" ".join(dice.choices(words, k=10)) for _ in range(REFERENCES)) for _ in range(CORPUS + BATCH[size])
        ]
        search = BeamSearch(5, min_length=tokens, max_length=tokens)
        side = config.vision.image_size
        with TemporaryDirectory() as folder:
            self.task = SelfCritical(
                MPlug(config), tokenizer_of(words, folder), Preprocessing(side), SelfCriticalConfig(explore=search)
            )
            records = [Record(str(n), None, texts, str(n)) for n, texts in enumerate(captions)]
            self.task.study(records, Path(folder, "frequencies.json.gz"))
        self.task.train()
        self.task.model.train_only(*self.task.uses)
        pixels = torch.randint(0, 256, (BATCH[size], 3, side, side), dtype=torch.uint8)
        self.batch = ReferencedBatch(pixels, tuple(captions[: BATCH[size]]))
        self.optimizer = build_optimizer(self.task, OptimConfig(lr=1e-5))
        self.how, self.precision = how, precision
        self.seconds: dict[str, float] = {}
        for part, method in FORWARD.items():
            owner, _, name = f"task.{method}".rpartition(".")
            self._put_clock(part, self.task if owner == "task" else self.task.model, name)

    def _put_clock(self, part: str, owner: nn.Module, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def clocked(*args: Any) -> Any:
            results: list[Any] = []
            self.seconds[part] = self.how.seconds(lambda: results.append(method(*args)))
            return results[0]

        setattr(owner, name, clocked)

    def __call__(self) -> dict[str, float]:
        """Seconds of each part."""
        losses: list[torch.Tensor] = []
        forward = self.how.seconds(lambda: losses.append(self._loss()))
        self.seconds["rest"] = forward - sum(self.seconds[part] for part in FORWARD)
        self.seconds["backward"] = self.how.seconds(losses[0].backward)
        self.seconds["optimiser"] = self.how.seconds(self._update)
        return dict(self.seconds)

    def _loss(self) -> torch.Tensor:
        with autocast(torch.device("cpu"), self.precision):
            return self.task(self.batch)["self_critical"]

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    description = parser(__doc__, rounds=3)
    description.add_argument("--size", choices=BATCH, default="tiny")
    description.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = description.parse_args()
    how = options(arguments)
    size, tokens = ("tiny", 5) if how.quick else (arguments.size, 25)
    torch.manual_seed(0)
    step = Step(size, arguments.precision, tokens, how)
    step()
    rounds = [step() for _ in range(how.rounds)]
    shares = [{part: seconds / sum(own.values()) for part, seconds in own.items()} for own in rounds]
    rows = [
        {
            "part": part,
            "seconds": median(own[part] for own in rounds),
            "share": median(own[part] for own in shares),
        }
        for part in (*FORWARD, "rest", "backward", "optimiser")
    ]
    settings = {
        "model": f"mplug {size}",
        "precision": arguments.precision,
        "batch": BATCH[size],
        "beams": 5,
        "tokens": tokens,
        "references": REFERENCES,
        "image": SIZES[size].vision.image_size,
    }
    report("self_critical", settings, rows, {"seconds of a step": median(sum(own.values()) for own in rounds)})


if __name__ == "__main__":
    main()
