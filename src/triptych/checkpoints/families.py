"""Which published layout a set of tensor names is, so that a wrong ``--from`` gets a helpful answer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from triptych.checkpoints.errors import CheckpointError

_SIGNS = (
    ("transformers' BridgeTower (--from bridgetower-hf)", ("bridgetower.", "vision_model.visual.")),
    ("a BridgeTower checkpoint (--from bridgetower)", ("cross_modal_image_layers.", "cross_modal_text_layers.")),
    ("an EVE checkpoint (--from eve)", ("backbone.type_embed_vision", "backbone.word_embedding.")),
    ("an mPLUG checkpoint (--from mplug)", ("visual_encoder.visual.", "fusion_encoder.")),
    ("a checkpoint of this library, which needs no conversion", ("fusion.layers.", "decoder.embeddings.word.")),
    ("OpenAI's CLIP (--from clip)", ("visual.conv1.weight", "visual.class_embedding")),
    ("OpenAI's CLIP with a ResNet, which has no Transformer for images", ("visual.layer1.",)),
    ("a BEiT-2 (--from beit2)", ("blocks.0.attn.q_bias",)),
    ("transformers' CLIP (--from clip-hf)", ("vision_model.embeddings.",)),
    ("transformers' RoBERTa (--from roberta-hf)", ("roberta.embeddings.", "lm_head.layer_norm.")),
    (
        "transformers' BERT (--from bert-hf)",
        ("bert.embeddings.word_embeddings.", "embeddings.word_embeddings.", "encoder.layer.0.attention.self."),
    ),
)


def looks_like(names: Iterable[str]) -> str:
    """A phrase for what these tensor names belong to."""
    known = tuple(names)
    for phrase, signs in _SIGNS:
        if any(name.startswith(signs) for name in known):
            return f"it looks like {phrase}"
    return f"it is of a family this library does not know (first tensor: {known[0] if known else 'none'})"


def expect(wanted: str, required: Iterable[str], names: Iterable[str], source: str | Path) -> None:
    """Raise a CheckpointError unless, for each of ``required``, some name starts with it."""
    known = tuple(names)
    if not all(any(name.startswith(prefix) for name in known) for prefix in required):
        raise CheckpointError(source, f"not {wanted}: {looks_like(known)}")
