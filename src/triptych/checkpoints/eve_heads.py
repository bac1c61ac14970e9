"""Heads of fine-tuned EVEs: which task each was trained for, and where its tensors go.

Source: ssyze/EVE ``models/model_vqa_beit.py``, ``model_nlvr_beit.py``, ``model_retrieval_beit.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from triptych.checkpoints.bert import table
from triptych.checkpoints.bridgetower_heads import OWN, TaskHead, head_scale, read_answers
from triptych.checkpoints.building import shapes_of
from triptych.checkpoints.mapping import Rule, Shapes, linear, rename, split
from triptych.checkpoints.reading import Tensors
from triptych.tasks.nlvr2 import BiAttentionHead, Nlvr2Config
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.vqa import VqaConfig

CLASSIFIER = "output"
"""The classifier of questions, and of NLVR2 without bi-attention."""

_PARTS = {"attn1": "first_to_second", "attn2": "second_to_first", "fc": "join", "attn_pool": "pool"}
BI_ATTENTION = (*_PARTS, "nlvr2_output")
"""What the bi-attention of NLVR2 is made of."""

FINE_TUNED = ("itm_head.", *(f"{part}." for part in (CLASSIFIER, *BI_ATTENTION)))
"""What a name of a fine-tuned file's head starts with."""

_MATCHING = ("itm_head", "mitm_head")
_CONTRASTIVE = (("itc_", "itc_temp"), ("itc_vl_", "itc_temp"), ("mitc_", "mitc_temp"))
"""Prefixes of the projections of ITC and the names of their temperature; the second pair of names of each is that of a
pre-training with these objectives, which the official loader renames."""


@dataclass(frozen=True)
class BiAttention:
    """The bi-attention of a file fine-tuned for NLVR2, of states of this width."""

    width: int
    task: ClassVar[str] = "nlvr2"
    config: ClassVar[Nlvr2Config] = Nlvr2Config(variant="biattention", head_dropout=0.1)

    @property
    def description(self) -> dict[str, Any]:
        """As a checkpoint folder keeps it."""
        return {self.task: asdict(self.config)}

    def shapes(self, where: str | Path) -> Shapes:
        """Name and shape of what the task adds to the model, after ``task.``."""
        shapes = shapes_of(lambda: BiAttentionHead(self.width, self.config.head_dropout), where)
        return {f"{OWN}head.{name}": shape for name, shape in shapes.items()}

    def rules(self) -> list[Rule]:
        """Where these come from."""
        rules = []
        for source in ("attn1", "attn2"):
            target = f"{OWN}head.{_PARTS[source]}"
            for kind in ("weight", "bias"):
                query, key_value = f"{target}.query.{kind}", f"{target}.key_value.{kind}"
                rules.append(split(f"{source}.in_proj_{kind}", (query, 1), (key_value, 2)))
            rules += linear(f"{target}.out", f"{source}.out_proj")
        rules += linear(f"{OWN}head.join", "fc.0")
        rules += linear(f"{OWN}head.pool.score", "attn_pool.fc.0")
        rules += linear(f"{OWN}head.classify", "nlvr2_output")
        return rules


def find_head(
    tensors: Tensors, width: int, heads: int, answers: Path | None, source: Path
) -> tuple[TaskHead | BiAttention | None, dict[str, str]]:
    """The head of a task that a file has, if it can be used; and why others are left out, by name.

    Args:
        width, heads: of the Transformer, and of the bi-attention.
        answers: the file with the classes of a classifier for questions.
    """
    if any(name.startswith(("attn1.", "nlvr2_output.")) for name in tensors):
        with torch.device("meta"):
            ours = BiAttentionHead(width, 0.0).first_to_second.heads
        if heads != ours:
            reason = f"a bi-attention of {heads} heads; at this width it has {ours} here"
            return None, dict.fromkeys(BI_ATTENTION, reason)
        return BiAttention(width), {}
    if not any(name.startswith(f"{CLASSIFIER}.") for name in tensors):
        return None, {}
    hidden, read = table(tensors, f"{CLASSIFIER}.0.weight", source)
    classes, _ = table(tensors, f"{CLASSIFIER}.3.weight", source)
    scale = head_scale(hidden, width)
    if read == 2 * width:
        nlvr2 = Nlvr2Config(variant="passes", head_scale=scale, head_dropout=0.0)
        return TaskHead("nlvr2", nlvr2, CLASSIFIER, classes, width), {}
    if answers is None:
        return None, {CLASSIFIER: f"its {classes} answers are not in the file: give their list with --answers"}
    vqa = VqaConfig("classify", read_answers(answers, classes), head_scale=scale)
    return TaskHead("vqa", vqa, CLASSIFIER, classes, width), {}


def ranking_rules(names: Collection[str]) -> tuple[list[Rule], list[str]]:
    """Where the heads of ITM and ITC come from, as far as a file has them; and its other ones for the same, unused.

    Fine-tuning runs one pair of projections, whatever it makes (``forward`` of ``model_retrieval_beit.py``).
    """
    matching = [name for name in _MATCHING if f"{name}.weight" in names]
    contrastive = [pair for pair in _CONTRASTIVE if f"{pair[0]}vision_proj_head.weight" in names]
    rules, unused = [], [f"{name}.*" for name in matching[1:]]
    if matching:
        rules += linear("match_head", matching[0])
    for prefix, temperature in contrastive[:1]:
        rules += [
            rename("image_projection.weight", f"{prefix}vision_proj_head.weight"),
            rename("text_projection.weight", f"{prefix}text_proj_head.weight"),
            rename("temperature", temperature),
        ]
    taken = {source for rule in rules for source in rule.sources}
    for prefix, temperature in contrastive[1:]:
        unused += [f"{prefix}vision_proj_head.weight", f"{prefix}text_proj_head.weight"]
        unused += [temperature] if temperature not in taken else []
    return rules, unused


def contrastive_width(tensors: Tensors, default: int, source: Path) -> int:
    """E, of the projections of ITC; ``default`` where there are none."""
    sources = {rule.targets[0]: rule.sources[0] for rule in ranking_rules(tensors)[0]}
    name = sources.get("image_projection.weight")
    return default if name is None else table(tensors, name, source)[0]


def retrieval_task(names: Collection[str]) -> dict[str, Any]:
    """How to retrieve with a file: as official with both heads; embeddings that were never trained rank nothing."""
    matching = any(f"{name}.weight" in names for name in _MATCHING)
    contrastive = any(f"{prefix}vision_proj_head.weight" in names for prefix, _ in _CONTRASTIVE)
    if not (matching or contrastive):
        return {"recipe": "published, without a head"}  # it can do no task before it is fine-tuned
    candidates = (128 if matching else 0) if contrastive else None
    return {"retrieval": asdict(RetrievalConfig(candidates, max_words=30, max_tokens=40))}
