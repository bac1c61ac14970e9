"""Heads that tasks put on a network.

Shape legend: X any number of rows, P pooled width, K classes; a box is 4 numbers.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import init_weights


class ClassifierHead(nn.Module):
    """Linear, norm, GELU, linear, on pooled states ``[X, P]``: logits ``[X, K]``.

    Source: microsoft/BridgeTower ``bt_module.py`` (VQA, NLVR2, SNLI-VE), whose hidden width is a multiple of P;
    EVE's VQA head is the same.
    """

    def __init__(self, width: int, classes: int, *, scale: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * scale)
        self.dropout = nn.Dropout(dropout)
        self.expand = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.activation = nn.GELU()
        self.classify = nn.Linear(hidden, classes)
        init_weights(self, width)

    def forward(self, pooled_XP: Tensor) -> Tensor:
        return self.classify(self.activation(self.norm(self.expand(self.dropout(pooled_XP)))))


class BoxHead(nn.Module):
    """Three linear layers with ReLU between them, on pooled states ``[X, P]``: boxes ``[X, 4]``, numbers of 0..1.

    Source: djiajunustc/TransVG ``models/trans_vg.py`` (MLP, bbox_embed).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.box = nn.Linear(width, 4)
        init_weights(self, width)

    def forward(self, pooled_XP: Tensor) -> Tensor:
        hidden_XP = F.relu(self.second(F.relu(self.first(pooled_XP))))
        return self.box(hidden_XP).float().sigmoid()
