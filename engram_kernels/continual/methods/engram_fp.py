"""`engram-fp`: the full-precision twin of `engram` with a dendritic read-out, a recipe of our own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...readouts import pull_loss, segment_scores
from ...reference import recruited_units
from .base import LOSSES, Method
from .config import FloatTwinConfig

COSINE_SCALE = 10.0  # of the activations, so that the conscience weighs as it does in the binary read-out


class FloatTwin(nn.Module):
    """Fixed random hidden layers whose most active units pass, and dendritic segments compared by cosine.

    ``h <- relu(z) * gate, z = layer_norm(h W^T)``, the gate of the ``max(1, round(rate * units))`` largest z; then
    ``s[m, c, j] = COSINE_SCALE * cos(h[m], weight[c S + j])`` and ``logit[m, c] = max_j s[m, c, j]``. The counterpart
    of `EngramMLP` with a `DendriticReadout`.

    Args:
        sizes: units per layer, input and output included.
        rate: share of the units recruited in each hidden layer.
        segments: S per class.
        top_segments: how many of the most active ones give the score of their class.

    Attributes: ``hidden_weights`` Gaussian, of variance 1 / inputs, fixed; ``weight`` (C S, sizes[-2]), uniform in
    [-0.05, 0.05] at first; ``wins`` float32 (C, S), how often each segment won in training, from 1.

    Shapes: floats (B, sizes[0]) -> logits (B, sizes[-1]).
    """

    wins: Tensor

    def __init__(self, sizes: Sequence[int], rate: float, segments: int, top_segments: int = 1) -> None:
        super().__init__()
        *widths, classes = sizes
        self.rate, self.top_segments = rate, top_segments
        self.hidden_weights = nn.ParameterList(
            nn.Parameter(torch.randn(n, k) / k**0.5, requires_grad=False) for k, n in pairwise(widths)
        )
        self.weight = nn.Parameter(torch.empty(classes * segments, widths[-1]).uniform_(-0.05, 0.05))
        self.register_buffer("wins", torch.ones(classes, segments))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Floats (B, sizes[0]) -> code of the last hidden layer (B, sizes[-2])."""
        for weight in self.hidden_weights:
            z = F.layer_norm(x @ weight.T, weight.shape[:1])
            values, units = z.topk(recruited_units(self.rate, z.shape[1]), dim=1, sorted=False)
            x = torch.zeros_like(z).scatter_(1, units, values.relu_())
        return x

    def activations(self, x: Tensor) -> Tensor:
        """Floats (B, sizes[0]) -> activations of all segments (B, C, S)."""
        cosines = F.normalize(self.features(x)) @ F.normalize(self.weight).T
        return (COSINE_SCALE * cosines).view(-1, *self.wins.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Floats (B, features) -> logits (B, classes)."""
        return self.scores(self.activations(x))

    def scores(self, activations: Tensor) -> Tensor:
        """Activations of all segments (B, C, S) -> logits (B, C)."""
        return segment_scores(activations, self.top_segments)


class FloatTwinMethod(Method):
    """Trains the segments of a `FloatTwin`."""

    config: FloatTwinConfig
    model: FloatTwin

    def __init__(self, config: FloatTwinConfig, model: FloatTwin) -> None:
        assert not isinstance(config.lr, tuple)
        super().__init__(config, model, torch.optim.Adam([model.weight], lr=config.lr, fused=True))

    @classmethod
    def build(cls, config: FloatTwinConfig, features: int, hidden: Sequence[int], num_classes: int) -> Method:
        """Model and optimizer for ``config``, initialised from torch's global generator."""
        sizes = [features, *hidden, num_classes]
        return cls(config, FloatTwin(sizes, config.rate, config.segments, config.top_segments))

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Local loss or one of the others, and the scores (B, classes)."""
        activations = self.model.activations(x)
        scores = self.model.scores(activations)
        if self.config.loss != "local":
            return LOSSES[self.config.loss](scores, y), scores
        loss = pull_loss(activations, y, self.model.wins, self.config.conscience, count=self.model.training)
        return loss, scores
