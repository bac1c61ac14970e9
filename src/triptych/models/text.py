"""BERT: embeddings, an encoder, a decoder that attends to any fused state, and the language-model head.

Shape legend: B batch, L text tokens, M memory tokens, D width, V vocabulary, X selected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import Activation, KeyValueCache, Memory, PostNormBlock, init_weights, run_block
from triptych.models.protocol import Encoded


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a BERT; the number of layers is given where they are built.

    Attributes:
        first_position: row of the position table that the first token gets. BERT's is 0; RoBERTa's 2, one more than
            the id of padding, whose tokens all have the row before.
    """

    vocab_size: int = 30522
    width: int = 768
    heads: int = 12
    ffn: int = 3072
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: Activation = "gelu"
    first_position: int = 0

    @property
    def max_tokens(self) -> int:
        """How many tokens a text can have."""
        return self.max_positions - self.first_position

    def block(self, *, cross: bool) -> PostNormBlock:
        """One Transformer layer of these sizes."""
        return PostNormBlock(
            self.width,
            self.heads,
            self.ffn,
            eps=self.layer_norm_eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            cross=cross,
            activation=self.activation,
        )


class TextEmbeddings(nn.Module):
    """Word + position + segment embeddings, normalised. Only segment 0 is ever used, so it is one vector."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.first_position = config.first_position
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.segment = nn.Parameter(torch.zeros(config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, ids_BL: Tensor, start: int = 0, word_VD: Tensor | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """``start`` is the position of the first id, for decoding one token at a time.

        ``word_VD`` is what the ids are rows of, where that is not the own word embeddings. ``mask_BL`` only decides
        what padding is, where that has a position of its own.
        """
        end = start + ids_BL.shape[1]
        if end > self.position.num_embeddings - self.first_position:
            room = self.position.num_embeddings - self.first_position
            raise ValueError(f"a text of {end} tokens is longer than the {room} positions")
        word_BLD = self.word(ids_BL) if word_VD is None else F.embedding(ids_BL, word_VD)
        position = self.position.weight[self.first_position + start : self.first_position + end]
        if self.first_position and mask_BL is not None:
            position = torch.where(mask_BL[..., None], position, self.position.weight[self.first_position - 1])
        return self.dropout(self.norm(word_BLD + position + self.segment))


class TextEncoder(nn.Module):
    """Bidirectional BERT without pooler."""

    def __init__(self, config: TextConfig, layers: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.blocks = nn.ModuleList(config.block(cross=False) for _ in range(layers))
        self.checkpointing = False
        init_weights(self, config.width)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """[B, L] ids to [B, L, D] states; padding is never attended to."""
        return self.levels(ids_BL, mask_BL, 1)[0]

    def levels(self, ids_BL: Tensor, mask_BL: Tensor | None, count: int) -> list[Tensor]:
        """States [B, L, D] of the last ``count`` blocks, lowest first."""
        x_BLD = self.embeddings(ids_BL, mask_BL=mask_BL)
        levels = []
        for number, block in enumerate(self.blocks, start=1):
            x_BLD = run_block(block, x_BLD, mask_BL, checkpointing=self.checkpointing)
            if number > len(self.blocks) - count:
                levels.append(x_BLD)
        return levels


class LanguageHead(nn.Module):
    """BERT's vocabulary head: dense, GELU, norm, then the (tied) word embeddings and a bias."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self, config.width)

    def forward(self, hidden_XD: Tensor, word_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
        """[..., D] states to [..., V] logits over the given word embeddings, with their bias if not the own one."""
        hidden_XD = self.norm(F.gelu(self.transform(hidden_XD)))
        return F.linear(hidden_XD, word_VD, self.bias if bias_V is None else bias_V)


class MaskedLanguageHead(nn.Module):
    """The MLM head and its word table, which is no other module's.

    In mPLUG it is the fusion encoder's otherwise unused embeddings; in BridgeTower an output layer that is not tied.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.head = LanguageHead(config)
        init_weights(self, config.width)

    def forward(self, hidden_XD: Tensor) -> Tensor:
        return self.head(hidden_XD, self.word.weight)


class CoAttentionLayer(nn.Module):
    """Both sides attend to themselves, then to the other side's input.

    BridgeTower's and METER's cross-modal layer, and mPLUG's two-sided baseline. Source: Dou et al. 2022 (METER);
    microsoft/BridgeTower ``bt_module.py:489``.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.image_block = config.block(cross=True)
        self.text_block = config.block(cross=True)

    def forward(
        self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None, *, first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """New image states [B, N, D] and text states [B, L, D].

        Args:
            image_rows_B: the row of the image that each text meets. What the image alone decides, its self-attention
                and the keys and values that the text looks at, is then computed once an image.
            first: compute the state of token 0 alone, [B, 1, D], which is all that a pooler reads.
        """
        image_BND = self.image_block.attend_self(image.hidden_BLD, image.mask_BL, first=first)
        if image_rows_B is not None:
            image_BND = image_BND[image_rows_B]
        image_BND = self.image_block.attend_memory(image_BND, text.hidden_BLD, text.mask_BL, first=first)
        return image_BND, self.text_side(image, text, image_rows_B, first=first)

    def text_side(
        self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None, *, first: bool = False
    ) -> Tensor:
        """The new text states alone."""
        text_BLD = self.text_block.attend_self(text.hidden_BLD, text.mask_BL, first=first)
        if first:
            image = image if image_rows_B is None else image.rows(image_rows_B)
            return self.text_block.attend_memory(text_BLD, image.hidden_BLD, image.mask_BL, first=True)
        memory = self.text_block.remember(image)
        if image_rows_B is not None:
            memory = memory.select(image_rows_B)
        return self.text_block.attend_memory(text_BLD, memory)


@dataclass
class DecoderState:
    """What a decoder keeps between tokens: the growing prefix and the memory, layer by layer."""

    prefix: list[KeyValueCache]
    memory: list[Memory]

    @property
    def length(self) -> int:
        """Tokens decoded so far."""
        return self.prefix[0].length

    def select(self, rows_B: Tensor) -> None:
        """Reorder (or multiply) the rows of the prefix. The memory stays: beams of a row share it."""
        for cache in self.prefix:
            cache.select(rows_B)

    def keep(self, examples: Tensor, rows_B: Tensor) -> None:
        """Drop finished examples: ``examples`` index the memory, ``rows_B`` the prefix."""
        self.select(rows_B)
        self.memory = [memory.select(examples) for memory in self.memory]


class TextDecoder(nn.Module):
    """Causal BERT that cross-attends to any encoded or fused state; vocabulary head tied to its word embeddings.

    Source: X-PLUG/mPLUG ``models/modeling_mplug.py`` BertLMHeadModel, BertPrefixModel.
    """

    def __init__(self, config: TextConfig, layers: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.blocks = nn.ModuleList(config.block(cross=True) for _ in range(layers))
        self.head = LanguageHead(config)
        self.checkpointing = False
        init_weights(self, config.width)

    @torch.no_grad()
    def start_from(self, encoder: TextEncoder) -> None:
        """Take over an encoder's embeddings and its lowest layers; cross-attention and head stay as they are.

        As mPLUG's decoder starts from BERT (paper section 5.1).
        """
        self.embeddings.load_state_dict(encoder.embeddings.state_dict())
        for own, block in zip(self.blocks, encoder.blocks, strict=False):
            own.load_state_dict(block.state_dict(), strict=False)

    def forward(
        self,
        ids_BL: Tensor,
        memory: Encoded | Sequence[Memory],
        mask_BL: Tensor | None = None,
        word_VD: Tensor | None = None,
    ) -> Tensor:
        """States [B, L, D] of every position of a given text (training, scoring).

        Padding at the end needs no mask, since a causal model never looks ahead; with a mask, padding does not
        even see itself.

        Args:
            memory: what to attend to; or what :meth:`remember` kept of it, and then B may be a multiple of its rows:
                consecutive texts share one memory.
            word_VD: what the ids are rows of, where that is not the decoder's vocabulary.
        """
        x_BLD = self.embeddings(ids_BL, word_VD=word_VD)
        mask_BM = memory.mask_BL if isinstance(memory, Encoded) else None
        attended = [memory.hidden_BLD] * len(self.blocks) if isinstance(memory, Encoded) else memory
        for block, own in zip(self.blocks, attended, strict=True):
            x_BLD = run_block(block, x_BLD, mask_BL, own, mask_BM, causal=True, checkpointing=self.checkpointing)
        return x_BLD

    def remember(self, memory: Encoded) -> list[Memory]:
        """Keys and values of a memory for every block, to be attended to by many texts."""
        return [block.remember(memory) for block in cast(list[PostNormBlock], list(self.blocks))]

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """[..., D] states to [..., V] logits."""
        return self.head(hidden_XD, self.embeddings.word.weight)

    def start(self, memory: Encoded, capacity: int) -> DecoderState:
        """Prepare decoding of at most ``capacity`` tokens: keys and values of the memory are computed once."""
        kept = [own.contiguous() for own in self.remember(memory)]
        return DecoderState([KeyValueCache(capacity) for _ in kept], kept)

    def step(self, ids_BL: Tensor, state: DecoderState) -> Tensor:
        """Logits [B, V] for the token after ``ids_BL``, the newest tokens of each row.

        B may be a multiple of the memory's rows: consecutive rows (beams) then share one memory.
        """
        x_BLD = self.embeddings(ids_BL, start=state.length)
        for block, cache, memory in zip(self.blocks, state.prefix, state.memory, strict=True):
            x_BLD = block(x_BLD, memory=memory, causal=True, cache=cache)
        return self.logits(x_BLD[:, -1])


def pad_ids(rows: Sequence[Sequence[int]], pad: int, device: torch.device | None = None) -> Tensor:
    """Rows of ids as one [B, L] tensor, padded at the end."""
    length = max(len(row) for row in rows)
    padded = [list(row) + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)
