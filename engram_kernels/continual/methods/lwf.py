"""`lwf`: learning without forgetting."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scenarios import Experience, Samples
from .config import LwFConfig
from .finetune import MLP, FullPrecisionMethod


class SeenClassesMLP(MLP):
    """An `MLP` whose scores are -inf for classes that were never trained (``seen``, bool (classes,))."""

    seen: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.register_buffer("seen", torch.zeros(sizes[-1], dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Floats (B, features) -> logits (B, classes)."""
        return super().forward(x).masked_fill(~self.seen, -torch.inf)


class LwF(FullPrecisionMethod):
    """Learning without forgetting: the outputs for earlier classes stay those of the network before.

    ``cross-entropy + strength * mean of -sum_c before_c log now_c``, before and now the softmax of the old and of the
    new network's ``scores / T`` over the classes seen so far, T the distillation temperature (Li and Hoiem 2017). With
    loss ``all`` the cross-entropy is over these classes too. The old network's softmax is 0 for classes new in
    this experience (van de Ven et al. 2022), which keeps the other scores up: if both softmaxes were over the earlier
    classes alone, their scores could sink together. Scores of classes not seen yet are -inf.

    Attributes:
        teacher: the network before this experience; None in the first one.
    """

    config: LwFConfig
    model: SeenClassesMLP
    network = SeenClassesMLP

    def __init__(self, config: LwFConfig, model: SeenClassesMLP) -> None:
        super().__init__(config, model)
        self.teacher: SeenClassesMLP | None = None

    def before_training_exp(self, experience: Experience) -> Samples:
        """Keeps the network as it is for a teacher, and admits the experience's classes."""
        if self.model.seen.any():
            self.teacher = self._frozen_copy()
        self.model.seen[list(experience.classes)] = True
        return experience

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and distillation, and the scores (B, classes)."""
        loss, scores = super().loss(x, y)
        if self.teacher is not None and self.config.strength > 0.0:
            seen, temperature = self.model.seen, self.config.distillation_temperature
            with torch.no_grad():
                targets = (self.teacher(x)[:, seen] / temperature).softmax(dim=1)  # 0 for the classes new to it
            distillation = F.cross_entropy(scores[:, seen] / temperature, targets)
            loss = loss + self.config.strength * distillation
        return loss, scores

    def state_dict(self) -> dict[str, Any]:
        """Adds the teacher."""
        return super().state_dict() | {"teacher": None if self.teacher is None else self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = self._frozen_copy()
            self.teacher.load_state_dict(state["teacher"])

    def _frozen_copy(self) -> SeenClassesMLP:
        return copy.deepcopy(self.model).requires_grad_(False)
