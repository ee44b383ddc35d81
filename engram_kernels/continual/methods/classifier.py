"""`classifier`: counted second moments of a random binary code, `engram_kernels.EngramClassifier`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import require
from ..scenarios import Experience, Samples
from .base import Method
from .config import ClassifierConfig

if TYPE_CHECKING:
    from ...estimators import EngramClassifier

_SHORTEST_SIDE = 6  # of an image that has room for the smallest patches, wherever they are pooled
_MOST_CHANNELS = 4


class ClassifierModule(nn.Module):
    """An `EngramClassifier` as a module: features (B, features) to probabilities (B, classes), 0 for classes not seen.

    Attributes: ``estimator``, which is not fitted at first.
    """

    def __init__(self, estimator: EngramClassifier, num_classes: int) -> None:
        super().__init__()
        self.estimator, self.num_classes = estimator, num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Uint8 or floats (B, features) -> float32 (B, classes)."""
        y = torch.zeros(len(x), self.num_classes, device="cpu")
        if self.is_fitted():
            y[:, torch.from_numpy(self.estimator.classes_)] = torch.from_numpy(
                self.estimator.predict_proba(x.numpy())
            ).float()
        return y

    def is_fitted(self) -> bool:
        """Whether it has learned anything."""
        return hasattr(self.estimator, "moments_")

    def get_extra_state(self) -> dict[str, Any]:
        """The estimator's state, or the seed of one that has learned nothing."""
        return self.estimator.state_dict() if self.is_fitted() else {"seed": self.estimator.random_state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_extra_state` gave."""
        if "state" in state:
            self.estimator = self.estimator.from_state_dict(state)
        else:
            self.estimator = type(self.estimator)(**{**self.estimator.get_params(), "random_state": state["seed"]})


class ClassifierMethod(Method):
    """Counts every sample once, with as many units as the hidden layers have together; takes no steps."""

    config: ClassifierConfig
    model: ClassifierModule

    def __init__(self, config: ClassifierConfig, model: ClassifierModule) -> None:
        super().__init__(config, model, None)

    @classmethod
    def build(cls, config: ClassifierConfig, features: int, hidden: Sequence[int], num_classes: int) -> Method:
        """The estimator for ``config``, its seed from torch's global generator.

        Raises:
            MissingExtraError: without scikit-learn or safetensors.
        """
        for module, package in (("sklearn", "scikit-learn"), ("safetensors", "safetensors")):
            require(module, package, "method classifier")
        from ...estimators import EngramClassifier

        estimator = EngramClassifier(
            sum(hidden),
            readout=config.readout,
            segments=config.segments,
            rate=config.rate,
            penalty=config.penalty,
            random_state=int(torch.randint(2**31 - 1, (), device="cpu")),
        )
        return cls(config, ClassifierModule(estimator, num_classes))

    def before_training_exp(self, experience: Experience) -> Samples:
        """Looks at patches where the first experience is of images.

        The solution of before is dropped, so that a run that goes on from a checkpoint has the same one to the bit.
        """
        estimator = self.model.estimator
        if self.model.is_fitted():
            estimator.discriminants_.forget()
        else:
            estimator.set_params(image_shape=image_shape(experience.sample_shape))
        return experience

    def observe(self, x: Tensor, y: Tensor) -> tuple[float | None, float | None]:
        """Counts a minibatch. No loss; the accuracy would cost more than the counting."""
        self.model.estimator.partial_fit(x.numpy(), y.numpy())
        return None, None

    def save_model(self, path: Path, options: dict[str, Any], data: dict[str, Any]) -> None:
        """Writes a file of `EngramClassifier.load`; its classes are the labels of the data set. Raises: OSError."""
        estimator = copy.copy(self.model.estimator)
        estimator.classes_ = np.array(data["labels"])[estimator.classes_]
        estimator.save(path)


def image_shape(sample_shape: Sequence[int]) -> tuple[int, ...] | None:
    """Height, width and maybe channels of samples that are images large enough for patches; None of other samples."""
    shape = tuple(extent for extent in sample_shape if extent != 1)
    if len(shape) not in (2, 3) or min(shape[:2]) < _SHORTEST_SIDE or shape[2:] > (_MOST_CHANNELS,):
        return None
    return shape
