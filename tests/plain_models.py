"""Models that no library knows."""

from __future__ import annotations

from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    """A residual layer for models that no library knows."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden, **settings):
        return hidden + self.dropout(functional.gelu(self.up(hidden)))


class Decoder(nn.Module):
    """A model that no library knows; `between` is what it does before each layer but the first."""

    def __init__(self, layers=3, between=None, loops=1, vocabulary: int = 64, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.stack = nn.ModuleList(Layer(hidden) for _ in range(layers)) if isinstance(layers, int) else layers
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary)
        self.between = between
        self.loops = loops
        self.ended = 0

    def forward(self, ids):
        hidden = self.embed(ids)
        for _ in range(self.loops):
            for position, layer in enumerate(self.stack):
                if position and self.between:
                    hidden = self.between(hidden)
                hidden = layer(hidden)
        self.ended += 1
        return self.head(self.norm(hidden))
