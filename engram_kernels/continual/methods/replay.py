"""`replay`: experience replay from a small, class-balanced buffer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import processes
from ..scenarios import Samples
from .config import ReplayConfig
from .finetune import MLP, FullPrecisionMethod

_CHUNK = 250  # samples added at a time, which bounds the memory it takes


class ReplayBuffer:
    """At most ``size`` of the samples it was ever shown, as many of each class as of any other if it can.

    Every sample draws a random key when it is shown. Kept are, class by class, those with the smallest keys, which is
    a uniform sample of all that the class ever showed. Places are given to the classes in turn, so that one with few
    samples leaves its places to the others.

    Attributes:
        x: float32 (n, features), n at most ``size``.
        y: int64 (n,).
        keys: float64 (n,).
    """

    def __init__(self, size: int, features: int) -> None:
        self.size = size
        self.x = torch.empty(0, features, dtype=torch.float32, device="cpu")
        self.y = torch.empty(0, dtype=torch.int64, device="cpu")
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        """Samples kept."""
        return len(self.y)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Shows samples, x float32 (B, features), y int64 (B,); draws their keys from torch's global generator."""
        y, keys = torch.cat([self.y, y]), torch.cat([self.keys, torch.rand_like(y, dtype=torch.float64)])
        by_key = keys.argsort()
        classes, number = y[by_key].unique(return_inverse=True)
        rank = F.one_hot(number, max(1, len(classes))).cumsum(dim=0).gather(1, number[:, None])[:, 0]  # in its class
        kept = by_key[rank.argsort(stable=True)[: self.size]]
        self.x, self.y, self.keys = torch.cat([self.x, x])[kept], y[kept], keys[kept]

    def draw(self, samples: int) -> tuple[Tensor, Tensor]:
        """``(x, y)`` of so many samples, with replacement, by torch's global generator."""
        rows = torch.randint(len(self), (samples,), device=self.y.device)
        return self.x[rows], self.y[rows]


class Replay(FullPrecisionMethod):
    """Experience replay: each step learns a minibatch together with as many samples of earlier experiences."""

    config: ReplayConfig

    def __init__(self, config: ReplayConfig, model: MLP) -> None:
        super().__init__(config, model)
        self.buffer = ReplayBuffer(config.buffer_size, model.sizes[0])

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss with replayed samples, and the scores (B, classes) of the minibatch alone."""
        if len(self.buffer) == 0:
            return super().loss(x, y)
        batch = self.batch if processes.size() > 1 else len(y)  # of all processes, which draw alike
        own, _ = processes.part(batch)
        replayed_x, replayed_y = self.buffer.draw(batch)
        loss, scores = super().loss(torch.cat([x, replayed_x[own]]), torch.cat([y, replayed_y[own]]))
        return loss, scores[: len(y)]

    def after_training_exp(self, experience: Samples) -> None:
        """Shows the experience's samples to the buffer."""
        for x, y in experience.batches(_CHUNK):
            self.buffer.add(x, y)

    def state_dict(self) -> dict[str, Any]:
        """Adds the buffer."""
        buffer = self.buffer
        return super().state_dict() | {"buffer": {"x": buffer.x, "y": buffer.y, "keys": buffer.keys}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        super().load_state_dict(state)
        for name, value in state["buffer"].items():
            setattr(self.buffer, name, value.clone())
