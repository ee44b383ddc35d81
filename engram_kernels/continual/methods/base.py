"""The interface between the training loop and every method, and the losses that methods share."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses import batch_cross_entropy
from .. import processes
from ..scenarios import Experience, Samples
from .config import GradientConfig, MethodConfig


class TrainingError(RuntimeError):
    """Training can't go on: the loss or a weight is no longer finite."""


class Method:
    """A model and its training. ``model`` maps float32 (B, features) to scores (B, classes).

    The loop calls :meth:`before_training_exp`, then :meth:`observe` for every minibatch of the experience that it
    returned, then :meth:`after_training_exp` (Avalanche's names). None of them gets a task label.

    Attributes:
        config: the hyper-parameters.
        model: evaluated by calling it.
        optimizer: of its parameters; None for a model that is counted together rather than trained.
    """

    def __init__(self, config: MethodConfig, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.batch = 0  # samples of the minibatch at hand, in all processes

    def before_training_exp(self, experience: Experience) -> Samples:
        """The samples to train on in place of a new experience; by default that experience."""
        return experience

    def samples_of(self, stream: Sequence[Samples]) -> list[int]:
        """How many samples a pass over each experience of a stream will take, for the display of progress."""
        return [len(experience) for experience in stream]

    def after_training_exp(self, experience: Samples) -> None:
        """Called when an experience is learned, with the samples that were trained on."""

    def observe(self, x: Tensor, y: Tensor) -> tuple[float | None, float | None]:
        """One step on a minibatch, x float32 (B, features), y int64 (B,): the loss and accuracy before it.

        None stands for a number that a method does not compute. Several processes are given the same minibatch, of
        which each works on a part.
        Raises: TrainingError if the loss is not finite; the weights are then unchanged.
        """
        self.batch = len(y)
        own, weight = processes.part(self.batch)
        x, y = x[own], y[own]
        with processes.counting_together(
            [b for name, b in self.model.named_buffers() if name.endswith("wins")], weight
        ):
            loss, scores = self.loss(x, y)
        hits = float((scores.detach().argmax(dim=1) == y).float().mean())
        value, accuracy = processes.mean([float(loss.detach()), hits], weight)
        if not math.isfinite(value):
            raise TrainingError(f"loss: expected a finite number, got {value}")
        torch.autograd.backward(loss)
        processes.average_gradients(self.model.parameters(), weight)
        self.update()
        return value, accuracy

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a minibatch, a scalar, and the scores (B, classes) that it was computed from."""
        assert isinstance(self.config, GradientConfig)
        scores = self.model(x)
        return LOSSES[self.config.loss](scores, y), scores

    def update(self) -> None:
        """Applies the gradients and forgets them, so that gradients and activations never exist together."""
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from. Methods that remember more add it."""
        state: dict[str, Any] = {"model": self.model.state_dict()}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def save_model(self, path: Path, options: dict[str, Any], data: dict[str, Any]) -> None:
        """Writes all that predicting needs: a file named ``config.model_file`` in the end.

        `trained.TrainedModel` reads it. ``options`` are those of the run, ``data`` is that of `Scenario.data`.
        Raises: OSError.
        """
        buffer = io.BytesIO()  # torch gives no reason where it can't write
        torch.save({"state_dict": self.model.state_dict(), "config": options, "data": data}, buffer)
        path.write_bytes(buffer.getvalue())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over all classes. Scores (B, classes), labels int64 (B,) -> scalar."""
    return F.cross_entropy(scores, y)


LOSSES = {"all": cross_entropy, "batch": batch_cross_entropy}
