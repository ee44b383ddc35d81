"""`si`: synaptic intelligence."""

from __future__ import annotations

from typing import Any

import torch

from ..scenarios import Samples
from .config import PenaltyConfig
from .finetune import MLP
from .penalty import QuadraticPenalty, clones

SI_DAMPING = 0.1  # xi of Zenke et al. 2017, their value


class SynapticIntelligence(QuadraticPenalty):
    """Synaptic intelligence: ``strength * sum Omega (theta - theta*)^2`` beside the loss.

    While an experience is trained, each weight collects by how much its moves lowered the loss,
    ``path -= g * (theta_after - theta_before)``, g the gradient of the task loss without the penalty. After it
    ``Omega <- max(0, Omega + path / ((theta - theta*)^2 + SI_DAMPING))``, where theta* is the weight when the
    experience began (Zenke et al. 2017; the maximum is in their code, not in the paper).

    Attributes:
        path: of this experience so far, like the model's parameters.
    """

    def __init__(self, config: PenaltyConfig, model: MLP) -> None:
        super().__init__(config, model)
        self.path = [torch.zeros_like(parameter) for parameter in model.parameters()]

    def update(self) -> None:
        """Adds the penalty's gradient, ``2 strength Omega (theta - theta*)``, steps, and follows the path."""
        parameters = list(self.model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        for parameter, importance, way in self.pull():
            # a new tensor: the path needs the gradient of the loss alone
            assert parameter.grad is not None
            parameter.grad = torch.addcmul(parameter.grad, importance, way, value=2.0 * self.config.strength)
        self.optimizer.step()
        for parameter, path, gradient, old in zip(parameters, self.path, gradients, before, strict=True):
            assert gradient is not None
            path.addcmul_(gradient, old.sub_(parameter.detach()))
        self.optimizer.zero_grad(set_to_none=True)

    def after_training_exp(self, experience: Samples) -> None:
        """Turns the path into importance."""
        importance = []
        for index, (parameter, path, anchor) in enumerate(
            zip(self.model.parameters(), self.path, self.anchors, strict=True)
        ):
            added = path / (parameter.detach() - anchor).square_().add_(SI_DAMPING)
            if self.importance is not None:
                added.add_(self.importance[index])
            importance.append(added.clamp_(min=0.0))
            path.zero_()
        self.consolidate(importance)

    def state_dict(self) -> dict[str, Any]:
        """Adds the path."""
        return super().state_dict() | {"path": self.path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.path = clones(state["path"])
