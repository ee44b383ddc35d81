"""`finetune`: a full-precision network trained by Adam, which the other baselines start from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .base import Method
from .config import FullPrecisionConfig


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, torch's default initialisation.

    Args:
        sizes: units per layer, input and output included.

    Shapes: floats (B, sizes[0]) -> logits (B, sizes[-1]).
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in pairwise(sizes))

    def inputs(self, x: Tensor) -> list[Tensor]:
        """The input of each layer, (B, units) each; the first is ``x``."""
        inputs = [x]
        for layer in self.layers[:-1]:
            inputs.append(torch.relu(layer(inputs[-1])))
        return inputs

    def forward(self, x: Tensor) -> Tensor:
        """Floats (B, features) -> logits (B, classes)."""
        return self.layers[-1](self.inputs(x)[-1])


class FullPrecisionMethod(Method):
    """`finetune`: an `MLP` and Adam, from which the other baselines start."""

    config: FullPrecisionConfig
    model: MLP
    optimizer: torch.optim.Optimizer
    network: type[MLP] = MLP

    def __init__(self, config: FullPrecisionConfig, model: MLP) -> None:
        assert not isinstance(config.lr, tuple)
        super().__init__(config, model, torch.optim.Adam(model.parameters(), lr=config.lr, fused=True))

    @classmethod
    def build(cls, config: Any, features: int, hidden: Sequence[int], num_classes: int) -> Method:
        """Model and optimizer for ``config``, initialised from torch's global generator."""
        return cls(config, cls.network([features, *hidden, num_classes]))
