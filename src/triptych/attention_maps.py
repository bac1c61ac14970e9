"""Where each word of a text looks in a picture: the attention of text to image in a model's fusion layers.

Shape legend: B batch, C channels, L text tokens, N image tokens, T = N + L, P patches, W words, H and W (after a
height) height and width, of pixels or of patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing
from triptych.models.bridgetower import BridgeTower
from triptych.models.eve import Eve
from triptych.models.layers import record_attention
from triptych.models.mplug import AsymmetricLayer, ConnectedLayer, MPlug
from triptych.models.protocol import Encoded, VisionLanguageModel
from triptych.models.text import CoAttentionLayer

_KINDS: dict[type, tuple[str, str]] = {
    AsymmetricLayer: ("block.cross_attention", "cross-attention"),
    CoAttentionLayer: ("text_block.cross_attention", "co-attention"),
    ConnectedLayer: ("block.attention", "connected"),
}
"""The attention of each kind of fusion layer in which text looks at the image, and the layer's name for people."""


@dataclass(frozen=True)
class WordMaps:
    """A text's words, and for each fusion layer (named) how much of a word's attention each patch gets.

    Attributes:
        layers: name and share_WHW, 0 to 1; what the image's summary token gets, and in connected layers the text, is
            missing from the sum. In EVE's blocks, where a word looks at words, too, it is the share of what all patches
            get together: the sum is 1.
    """

    words: tuple[str, ...]
    layers: tuple[tuple[str, NDArray[np.float32]], ...]


def word_maps(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    preprocessing: Preprocessing,
    pixels_CHW: Tensor,
    text: str,
    *,
    max_tokens: int | None = None,
) -> WordMaps:
    """How the words of a text attend to a picture (uint8 pixels), the mean of all heads and of a word's pieces.

    Args:
        max_tokens: longer texts are cut, as in training; words that are cut off have no map.

    Raises:
        ValueError: a model whose fusion this does not know, or a text without words.
    """
    if not isinstance(model, MPlug | BridgeTower | Eve):
        raise ValueError(f"there are no attention maps for a {model.model_type}, only for mplug, bridgetower and eve")
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids_BL, mask_BL = tokenizer.encode_batch([text], max_length=max_tokens, end=model.ends_texts)
    pieces = _pieces_of_words(encoding.word_ids, ids_BL.shape[1] - 1 - int(model.ends_texts))
    if not pieces:
        raise ValueError(f"the text {text!r} has no words")
    device = next(model.parameters()).device
    with torch.inference_mode():
        image = model.encode_image(preprocessing.normalize(pixels_CHW[None].to(device)))
        encoded = model.encode_text(ids_BL.to(device), mask_BL.to(device))
        shares = _joint_shares(model, image, encoded) if isinstance(model, Eve) else _shares(model, image, encoded)
    patch = model.config.vision.patch
    height, width = pixels_CHW.shape[1] // patch, pixels_CHW.shape[2] // patch
    layers = []
    for name, share_LP in shares:
        # Token 0 is [CLS].
        share_WP = torch.stack([share_LP[[1 + piece for piece in word]].mean(0) for word in pieces])
        layers.append((name, share_WP.view(-1, height, width).cpu().numpy()))
    spans = [(encoding.offsets[word[0]][0], encoding.offsets[word[-1]][1]) for word in pieces]
    return WordMaps(tuple(text[start:end] for start, end in spans), tuple(layers))


def _shares(model: MPlug | BridgeTower, image: Encoded, text: Encoded) -> list[tuple[str, Tensor]]:
    """Name of each fusion layer, and how much of each text token's attention each patch gets, [L, P]."""
    tokens = image.hidden_BLD.shape[1]
    with record_attention(model.fusion) as attention:
        model.fuse(image, text)
    shares = []
    for number, layer in enumerate(model.fusion.layers):
        name, kind = _KINDS[type(layer)]
        share_LN = attention[f"layers.{number}.{name}"][0].float().mean(0)
        if isinstance(layer, ConnectedLayer):
            share_LN = share_LN[tokens:, :tokens]
        shares.append((f"layer {number + 1}, {kind}", share_LN[:, 1:]))
    return shares


def _joint_shares(model: Eve, image: Encoded, text: Encoded) -> list[tuple[str, Tensor]]:
    """The same of each block, in whose one attention the text's tokens come after the image's; each row adds to 1."""
    tokens = image.hidden_BLD.shape[1]
    with record_attention(model.network) as attention:
        model.fuse(image, text)
    shares = []
    for number in range(len(model.network.blocks)):
        share_TT = attention[f"blocks.{number}.attention"][0].float().mean(0)
        share_LP = share_TT[tokens:, 1:tokens]
        whole_L1 = share_LP.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        shares.append((f"block {number + 1}, joint", share_LP / whole_L1))
    return shares


def _pieces_of_words(word_ids: list[int | None], count: int) -> list[list[int]]:
    """The positions of each word's pieces, of the first ``count``."""
    pieces: dict[int, list[int]] = {}
    for position, word in enumerate(word_ids[:count]):
        if word is not None:
            pieces.setdefault(word, []).append(position)
    return list(pieces.values())
