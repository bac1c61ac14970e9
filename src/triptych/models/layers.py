"""Attention and Transformer blocks, shared by every model.

Shape legend: B batch, L query length, M memory length, D width, H heads, K head width, W keys and values side by side
(2 D), V vocabulary.
Masks are boolean, ``True`` where a token is real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triptych.models.protocol import Encoded

Activation = Literal["gelu", "quick_gelu"]


def quick_gelu_(x: Tensor) -> Tensor:
    """CLIP's activation ``x * sigmoid(1.702 x)``, written with the fused SiLU kernel.

    Without gradients it overwrites ``x``: there is no wider tensor, and touching new memory takes longer than the
    arithmetic. (With gradients that would cost copies, since a linear layer's output is a view.)
    """
    overwrite = not x.requires_grad
    scaled = x.mul_(1.702) if overwrite else 1.702 * x
    return F.silu(scaled, inplace=overwrite).mul_(1 / 1.702)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu_}
"""They may overwrite their argument, which is what a linear layer has just made."""


class KeyValueCache:
    """Keys and values of one self-attention layer for a prefix that grows while decoding.

    Room for ``capacity`` positions is allocated once, position first, so that a prefix is one piece of memory;
    :meth:`append` writes in place and :meth:`select` copies the prefix alone, into a second buffer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept_MBW: Tensor | None = None
        self._spare_MBW: Tensor | None = None

    def append(self, new_BLW: Tensor) -> Tensor:
        """Add the newest positions and return a view of all up to now, valid until :meth:`select`."""
        end = self.length + new_BLW.shape[1]
        if end > self.capacity:
            raise ValueError(f"key/value cache holds {self.capacity} positions, {end} were asked for")
        if self._kept_MBW is None:
            self._kept_MBW = new_BLW.new_empty(self.capacity, len(new_BLW), new_BLW.shape[2])
        self._kept_MBW[self.length : end] = new_BLW.transpose(0, 1)
        self.length = end
        return self._kept_MBW[:end].transpose(0, 1)

    def select(self, rows_B: Tensor) -> None:
        """Keep the given rows, in their order: what beam search does when beams change parents."""
        kept_MBW, spare_MBW = self._kept_MBW, self._spare_MBW
        if kept_MBW is None:
            return
        if spare_MBW is None or spare_MBW.shape[1] != len(rows_B):
            spare_MBW = kept_MBW.new_empty(self.capacity, len(rows_B), kept_MBW.shape[2])
        torch.index_select(kept_MBW[: self.length], 1, rows_B, out=spare_MBW[: self.length])
        self._kept_MBW, self._spare_MBW = spare_MBW, kept_MBW


@dataclass(frozen=True)
class Memory:
    """Keys and values of one cross-attention layer, computed once for a whole decoding.

    ``mask_BM`` is ``None`` where every position is real.
    """

    keys_BHMK: Tensor
    values_BHMK: Tensor
    mask_BM: Tensor | None

    def contiguous(self) -> Memory:
        """With each head's keys and values in one piece, quicker to read again and again."""
        return Memory(self.keys_BHMK.contiguous(), self.values_BHMK.contiguous(), self.mask_BM)

    def select(self, rows_B: Tensor) -> Memory:
        """The given rows, in their order."""
        mask_BM = None if self.mask_BM is None else self.mask_BM.index_select(0, rows_B)
        return Memory(self.keys_BHMK.index_select(0, rows_B), self.values_BHMK.index_select(0, rows_B), mask_BM)


class Attention(nn.Module):
    """Multi-head attention: self (no memory given), or cross (over a memory), cached or not.

    Args:
        width: D, of queries and output.
        heads: H; must divide ``width``.
        memory_width: width of what is attended to, when it differs from ``width``.
        dropout: on the attention probabilities, in training only.
        key_bias: whether keys have a bias, which changes no result, since it adds the same to every score of a query.
            BEiT's and EVE's layers have none.

    ``explicit`` switches from PyTorch's fused kernel to written-out arithmetic with the same result; it then
    keeps the probabilities of the last call in ``probabilities_BHLM`` (see :func:`record_attention`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        memory_width: int | None = None,
        dropout: float = 0.0,
        key_bias: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention width {width} is not divisible by its {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width or width, 2 * width, bias=key_bias)
        self.value_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        self.explicit = False
        self.probabilities_BHLM: Tensor | None = None

    def remember(self, memory_BMD: Tensor, mask_BM: Tensor | None = None) -> Memory:
        """Keys and values of a memory, to be attended to many times."""
        return Memory(*self._keys_values(self._joint(memory_BMD)), mask_BM)

    def forward(
        self,
        x_BLD: Tensor,
        memory: Tensor | Memory | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend from ``x_BLD`` to itself, to a memory ``[B, M, D]``, or to a remembered :class:`Memory`.

        Args:
            mask: bool, ``[B, M]`` over keys or anything that broadcasts to ``[B, H, L, M]``.
            causal: each query sees only keys at its own position and before.
            cache: keys and values of the earlier positions; the new ones are appended.
        """
        query_BHLK = self._split(self.query(x_BLD))
        if isinstance(memory, Memory):
            return self.out(self._attend_shared(query_BHLK, memory))
        joint_BMW = self._joint(x_BLD if memory is None else memory)
        if cache is not None:
            joint_BMW = cache.append(joint_BMW)
            if causal and query_BHLK.shape[2] > 1:
                mask = _causal_mask(query_BHLK.shape[2], joint_BMW.shape[1], x_BLD.device)
            causal = False
        keys_BHMK, values_BHMK = self._keys_values(joint_BMW)
        heads_BHLK = self._attend(query_BHLK, keys_BHMK, values_BHMK, mask, causal)
        return self.out(_merge(heads_BHLK))

    def first(self, x_B1D: Tensor, memory_BMD: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """As calling it with one query and a memory, ``[B, 1, D]``, but without keys and values of the memory.

        For one query it is less work to bring the query to where the memory is: q (W_k m) = (q W_k) m, and the mean of
        W_v m is W_v of the mean of m. The keys' bias adds the same to every score, so nothing to their softmax.
        """
        if self.explicit:
            return self(x_B1D, memory_BMD, mask_BM)
        batch, memory_width = len(x_B1D), memory_BMD.shape[2]
        query_BHK = self.query(x_B1D).view(batch, self.heads, -1)
        head_width = query_BHK.shape[2]
        key_HKD, value_HKD = self.key_value.weight.view(2, self.heads, head_width, memory_width)
        asked_BHD = torch.einsum("bhk,hkd->bhd", query_BHK * head_width**-0.5, key_HKD)
        scores_BHM = asked_BHD @ memory_BMD.transpose(1, 2)
        if mask_BM is not None:
            scores_BHM = scores_BHM.masked_fill(~mask_BM[:, None], torch.finfo(scores_BHM.dtype).min)
        share_BHM = F.dropout(scores_BHM.softmax(-1), self.dropout, self.training).to(memory_BMD.dtype)
        seen_BHK = torch.einsum("bhd,hkd->bhk", share_BHM @ memory_BMD, value_HKD)
        bias = self.key_value.bias[self.heads * head_width :] if self.value_bias is None else self.value_bias
        bias_HK = bias.view(self.heads, head_width)
        seen_BHK = seen_BHK + share_BHM.sum(2, keepdim=True) * bias_HK  # with dropout shares do not add up to one
        return self.out(seen_BHK.flatten(1).unsqueeze(1))

    def _attend_shared(self, query_BHLK: Tensor, memory: Memory) -> Tensor:
        """Several queries rows (beams) for one memory row share its keys and values without copies."""
        rows, heads, length, head_width = query_BHLK.shape
        batch = memory.keys_BHMK.shape[0]
        if rows == batch:
            shared_BHLK = query_BHLK
        else:  # [batch * beams, H, L, K] -> [batch, H, beams * L, K]: beams become further queries
            shared_BHLK = query_BHLK.view(batch, rows // batch, heads, length, head_width).transpose(1, 2)
            shared_BHLK = shared_BHLK.reshape(batch, heads, rows // batch * length, head_width)
        out_BHLK = self._attend(shared_BHLK, memory.keys_BHMK, memory.values_BHMK, memory.mask_BM, False)
        if rows != batch:
            out_BHLK = out_BHLK.reshape(batch, heads, rows // batch, length, head_width).transpose(1, 2)
            out_BHLK = out_BHLK.reshape(rows, heads, length, head_width)
        return _merge(out_BHLK)

    def _attend(
        self, query_BHLK: Tensor, keys_BHMK: Tensor, values_BHMK: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :]
        if causal and mask is not None:
            mask = mask & _causal_mask(query_BHLK.shape[2], keys_BHMK.shape[2], query_BHLK.device)
            causal = False
        dropout = self.dropout if self.training else 0.0
        if not (causal or self.explicit) and _odd_keys_are_slow(query_BHLK, keys_BHMK):
            keys_BHMK, values_BHMK, mask = _round_up(keys_BHMK, values_BHMK, mask)
        if not (self.explicit or _fused_is_slow(query_BHLK)):
            return F.scaled_dot_product_attention(
                query_BHLK, keys_BHMK, values_BHMK, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
        scores_BHLM = (query_BHLK * query_BHLK.shape[-1] ** -0.5) @ keys_BHMK.transpose(-1, -2)
        if causal:
            mask = _causal_mask(query_BHLK.shape[2], keys_BHMK.shape[2], query_BHLK.device)
        if mask is not None:
            # Not -inf: a query that may see nothing, as in a text without tokens, would become NaN.
            scores_BHLM = scores_BHLM.masked_fill(~mask, torch.finfo(scores_BHLM.dtype).min)
        probabilities_BHLM = scores_BHLM.softmax(-1)
        if self.explicit:
            self.probabilities_BHLM = probabilities_BHLM
        return F.dropout(probabilities_BHLM, dropout, self.training).to(values_BHMK.dtype) @ values_BHMK

    def _joint(self, memory_BMD: Tensor) -> Tensor:
        """Keys and values, side by side."""
        if self.value_bias is None:
            return self.key_value(memory_BMD)
        return F.linear(memory_BMD, self.key_value.weight, F.pad(self.value_bias, (len(self.value_bias), 0)))

    def _keys_values(self, joint_BMW: Tensor) -> tuple[Tensor, Tensor]:
        keys_BMD, values_BMD = joint_BMW.chunk(2, dim=-1)
        return self._split(keys_BMD), self._split(values_BMD)

    def _split(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        return x_BLD.view(B, L, self.heads, D // self.heads).transpose(1, 2)


def _fused_is_slow(x: Tensor) -> bool:
    """In bf16 on a CPU the backward pass of the fused kernel takes three to five times as long as matrix products."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad


def _odd_keys_are_slow(query_BHLK: Tensor, keys_BHMK: Tensor) -> bool:
    """In bf16 on a CPU the fused kernel takes 2.2 ms for 336 keys and 5.1 for 325: it wants a multiple of 16."""
    on_cpu = query_BHLK.device.type == "cpu" and query_BHLK.dtype == torch.bfloat16 and not query_BHLK.requires_grad
    return on_cpu and keys_BHMK.shape[2] % 16 != 0 and query_BHLK.shape[2] >= 128 <= keys_BHMK.shape[2]


def _round_up(keys_BHMK: Tensor, values_BHMK: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with padding that is not attended to."""
    length = keys_BHMK.shape[2]
    extra = -length % 16
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=keys_BHMK.device)
    keys_BHMK, values_BHMK = (F.pad(x_BHMK, (0, 0, 0, extra)) for x_BHMK in (keys_BHMK, values_BHMK))
    return keys_BHMK, values_BHMK, F.pad(mask, (0, extra))


def _merge(x_BHLK: Tensor) -> Tensor:
    return x_BHLK.transpose(1, 2).flatten(2)


def _causal_mask(length: int, memory_length: int, device: torch.device) -> Tensor:
    """[1, 1, L, M] for queries that are the last ``length`` of ``memory_length`` positions."""
    ones = torch.ones(1, 1, length, memory_length, dtype=torch.bool, device=device)
    return ones.tril(memory_length - length)


def use_explicit_attention(model: nn.Module, explicit: bool = True) -> None:
    """Switch every attention of a model between the fused kernel and written-out arithmetic."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.explicit = explicit
            module.probabilities_BHLM = None


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the attention probabilities ``[B, H, L, M]`` of every layer that runs inside the block.

    The dictionary is filled when the block ends; its keys are the module names below ``model``.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    before = {name: module.explicit for name, module in modules.items()}
    maps: dict[str, Tensor] = {}
    use_explicit_attention(model)
    try:
        yield maps
        maps.update(
            (name, module.probabilities_BHLM)
            for name, module in modules.items()
            if module.probabilities_BHLM is not None
        )
    finally:
        for name, module in modules.items():
            module.explicit = before[name]
            module.probabilities_BHLM = None


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: [B, L, D] -> [B, L, F] -> [B, L, D]."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.contract(ACTIVATIONS[self.activation](self.expand(x_BLD)))


class PreNormBlock(nn.Module):
    """CLIP's Transformer block: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

    Source: openai/CLIP ``clip/model.py`` ResidualAttentionBlock.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: Activation, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, dropout=dropout)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, hidden, activation)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        return x_BLD + self.ffn(self.ffn_norm(x_BLD))


class PostNormBlock(nn.Module):
    """BERT's Transformer block, ``norm(x + sublayer(x))``, with cross-attention where ``cross`` is set.

    Source: Devlin et al. 2019; with cross-attention as ALBEF ``models/xbert.py`` BertLayer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        eps: float,
        dropout: float,
        attention_dropout: float,
        cross: bool = False,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = Attention(width, heads, dropout=attention_dropout) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.ffn = FeedForward(width, hidden, activation)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def remember(self, memory: Encoded) -> Memory:
        """Keys and values of a memory for this block's cross-attention."""
        if self.cross_attention is None:
            raise ValueError("this block has no cross-attention")
        return self.cross_attention.remember(memory.hidden_BLD, memory.mask_BL)

    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None = None,
        memory: Tensor | Memory | None = None,
        memory_mask_BM: Tensor | None = None,
        *,
        causal: bool = False,
        cache: KeyValueCache | None = None,
        second: tuple[Encoded, Attention] | None = None,
    ) -> Tensor:
        """``second`` is another memory with an attention of its own; the mean of what both attend to goes on."""
        x_BLD = self.attend_self(x_BLD, mask_BL, causal=causal, cache=cache)
        return self.attend_memory(x_BLD, memory, memory_mask_BM, second=second)

    def attend_self(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None = None,
        *,
        causal: bool = False,
        cache: KeyValueCache | None = None,
        first: bool = False,
    ) -> Tensor:
        """The half that needs no memory; ``first`` gives the state of token 0 alone."""
        if first:
            attended_BLD = self.attention.first(x_BLD[:, :1], x_BLD, mask_BL)
            return self.attention_norm(x_BLD[:, :1] + self.dropout(attended_BLD))
        attended_BLD = self.attention(x_BLD, mask=mask_BL, causal=causal, cache=cache)
        return self.attention_norm(x_BLD + self.dropout(attended_BLD))

    def attend_memory(
        self,
        x_BLD: Tensor,
        memory: Tensor | Memory | None = None,
        memory_mask_BM: Tensor | None = None,
        *,
        second: tuple[Encoded, Attention] | None = None,
        first: bool = False,
    ) -> Tensor:
        """The rest, cross-attention and the linear layers, which treat every token by itself.

        ``first`` says that there is token 0 alone; its memory is not a remembered one.
        """
        if self.cross_attention is not None and self.cross_norm is not None:
            if first:
                assert isinstance(memory, Tensor)
                crossed_BLD = self.cross_attention.first(x_BLD, memory, memory_mask_BM)
            else:
                crossed_BLD = self.cross_attention(x_BLD, memory, memory_mask_BM)
            if second is not None:
                other, attention = second
                crossed_BLD = (crossed_BLD + attention(x_BLD, other.hidden_BLD, other.mask_BL)) / 2
            x_BLD = self.cross_norm(x_BLD + self.dropout(crossed_BLD))
        return self.ffn_norm(x_BLD + self.dropout(self.ffn(x_BLD)))


def run_block(block: Callable[..., Any], *args: Any, checkpointing: bool, **kwargs: Any) -> Any:
    """Call a block; with ``checkpointing`` its activations are recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return block(*args, **kwargs)


def init_weights(module: nn.Module, width: int = 768) -> None:
    """BERT's initialisation: linear and embedding weights N(0, std), biases 0, norms 1 and 0.

    BERT's std of 0.02 belongs to its ``width`` of 768. Narrower networks get the std with which a layer passes on as
    much variance.
    """
    std = 0.02 * (768 / width) ** 0.5
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
