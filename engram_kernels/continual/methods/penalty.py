"""The quadratic penalty that `ewc` and `si` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .config import PenaltyConfig
from .finetune import MLP, FullPrecisionMethod


class QuadraticPenalty(FullPrecisionMethod):
    """Pulls each weight back to its value after the last experience, in proportion to its importance.

    The pull goes straight into the gradients: no graph, and no copy of more than one parameter at a time.

    Attributes:
        anchors: the weights after the last experience, at first the initial ones; like the model's parameters.
        importance: of each of them, in the same shapes; None before the first experience has ended.
    """

    config: PenaltyConfig

    def __init__(self, config: PenaltyConfig, model: MLP) -> None:
        super().__init__(config, model)
        self.anchors = [parameter.detach().clone() for parameter in model.parameters()]
        self.importance: list[Tensor] | None = None

    def pull(self) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Each parameter with its importance and its way from its anchor; nothing before an experience has ended."""
        if self.importance is not None:
            for parameter, anchor, importance in zip(
                self.model.parameters(), self.anchors, self.importance, strict=True
            ):
                yield parameter, importance, parameter.detach() - anchor

    def consolidate(self, importance: list[Tensor]) -> None:
        """Holds the weights where they are now, by ``importance``."""
        for parameter, anchor in zip(self.model.parameters(), self.anchors, strict=True):
            anchor.copy_(parameter.detach())
        self.importance = importance

    def state_dict(self) -> dict[str, Any]:
        """Adds anchors and importance."""
        return super().state_dict() | {"anchors": self.anchors, "importance": self.importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.anchors = clones(state["anchors"])
        self.importance = None if state["importance"] is None else clones(state["importance"])


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors."""
    return [tensor.clone() for tensor in tensors]
