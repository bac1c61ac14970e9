"""Ranking a list of answers for questions: states computed once, against scoring each pair from scratch.

    python benchmarks/ranking.py > benchmarks/results/ranking.json

64 questions about 64 pictures and 3,129 answers, the size of VQA v2's list, of one to three tokens and the end token.
From scratch, every pair of a question and an answer encodes the picture and the question, fuses them and decodes the
answer. That is measured on one answer for each question, since all 200,256 pairs would take hours, and multiplied:
every pair costs the same. Ours ranks all answers exactly, or the 128 with the most probable first tokens (official).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from common import Work, in_turns, options, parser, report
from triptych.data.batches import Tokens
from triptych.generation import rank_texts
from triptych.models.mplug import SIZES, MPlug

QUESTIONS, ANSWERS, TOKENS, CANDIDATES = 64, 3129, 16, 128
LENGTHS = (0.7, 0.22, 0.08)
"""Shares of answers with one, two and three tokens."""


def make_answers(count: int, vocabulary: int) -> Tokens:
    """``[CLS] answer [SEP]`` of random tokens."""
    length_A = torch.multinomial(torch.tensor(LENGTHS), count, replacement=True) + 1
    position_L = torch.arange(len(LENGTHS) + 2)
    ids_AL = torch.randint(200, vocabulary, (count, len(position_L)))
    ids_AL[:, 0] = 101
    ids_AL[position_L == length_A[:, None] + 1] = 102
    return Tokens(ids_AL, position_L <= length_A[:, None] + 1)


def main() -> None:
    how = options(parser(__doc__, rounds=3).parse_args())
    size, questions, count = ("tiny", 4, 50) if how.quick else ("base", QUESTIONS, ANSWERS)
    torch.manual_seed(0)
    model = MPlug(SIZES[size]).eval()
    side, vocabulary = model.config.vision.image_size, model.config.text.vocab_size
    pixels_BCHW = torch.randn(questions, 3, side, side)
    ids_BL = torch.randint(1, vocabulary, (questions, TOKENS))
    answers = make_answers(count, vocabulary)
    answers = Tokens(answers.ids_BL % vocabulary, answers.mask_BL)

    @torch.no_grad()
    def rank(candidates: int) -> Tensor:
        fused = model.fuse(model.encode_image(pixels_BCHW), model.encode_text(ids_BL))
        return rank_texts(model.decoder, fused.states(), answers, candidates=candidates)[0]

    @torch.no_grad()
    def from_scratch() -> Tensor:
        fused = model.fuse(model.encode_image(pixels_BCHW), model.encode_text(ids_BL))
        chosen_BL = answers.ids_BL[torch.randint(count, (questions,))]
        hidden_BLD = model.decoder(chosen_BL[:, :-1], fused.states())
        return model.decoder.logits(hidden_BLD).log_softmax(-1)

    works = {
        "all answers": Work(partial(rank, 0)),
        f"{CANDIDATES} candidates": Work(partial(rank, CANDIDATES)),
        "one pair a question, from scratch": Work(from_scratch),
    }
    from_scratch()
    timings = in_turns(works, how)
    scratch = "one pair a question, from scratch"
    rows = [
        {
            "ranked": name,
            "seconds": timings.median(name),
            "from scratch, seconds": timings.median(scratch) * count,
            "times faster": timings.ratio(scratch, name) * count,
        }
        for name in works
        if name != scratch
    ]
    settings = {"model": f"mplug {size}", "questions": questions, "answers": count, "image": side, "tokens": TOKENS}
    report("ranking", settings, rows, {"target": "50 times"})


if __name__ == "__main__":
    main()
