"""`joint`: trains on all experiences so far each time: the ceiling for a continual learner."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..scenarios import Experience, Joint, Samples
from .config import FullPrecisionConfig
from .finetune import MLP, FullPrecisionMethod


class JointTraining(FullPrecisionMethod):
    """Goes on training, each time on all experiences so far: the ceiling for a continual learner."""

    def __init__(self, config: FullPrecisionConfig, model: MLP) -> None:
        super().__init__(config, model)
        self.experiences: tuple[Experience, ...] = ()

    def before_training_exp(self, experience: Experience) -> Samples:
        """All experiences so far, as one."""
        self.experiences = (*self.experiences, experience)
        return Joint(self.experiences)

    def samples_of(self, stream: Sequence[Samples]) -> list[int]:
        """All so far, each time."""
        return list(accumulate(super().samples_of(stream)))

    def state_dict(self) -> dict[str, Any]:
        """Adds the experiences, and so all their data."""
        return super().state_dict() | {"experiences": self.experiences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.experiences = state["experiences"]
