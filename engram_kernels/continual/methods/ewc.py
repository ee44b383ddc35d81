"""`ewc`: online elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..scenarios import Samples
from .config import EWCConfig
from .finetune import MLP
from .penalty import QuadraticPenalty

FISHER_SAMPLES = 1000  # of an experience, at most
_CHUNK = 250  # samples at a time, which bounds the memory it takes


class EWC(QuadraticPenalty):
    """Online elastic weight consolidation: ``strength / 2 * sum F (theta - theta*)^2`` beside the loss.

    After each experience ``F <- decay F + diagonal Fisher information`` of at most FISHER_SAMPLES of its samples,
    see `fisher_diagonal`, and ``theta*`` becomes the weights as they are (Kirkpatrick et al. 2017; one F and one
    anchor for all experiences: Schwarz et al. 2018).
    """

    config: EWCConfig

    def update(self) -> None:
        """Adds the penalty's gradient, ``strength F (theta - theta*)``, and steps."""
        for parameter, importance, way in self.pull():
            assert parameter.grad is not None
            parameter.grad.addcmul_(importance, way, value=self.config.strength)
        super().update()

    def after_training_exp(self, experience: Samples) -> None:
        """Adds this experience's Fisher information; which samples is drawn from torch's global generator."""
        fisher = [torch.zeros_like(parameter) for parameter in self.model.parameters()]
        samples = min(len(experience), FISHER_SAMPLES)
        # the distribution that was trained: under the loss over a batch's classes, that over the experience's
        classes = experience.classes if self.config.loss == "batch" else None
        for rows in torch.randperm(len(experience), device="cpu")[:samples].split(_CHUNK):
            part = fisher_diagonal(self.model, experience.samples(rows)[0], classes)
            torch._foreach_add_(fisher, part, alpha=len(rows) / samples)
        if self.importance is not None:
            torch._foreach_add_(fisher, self.importance, alpha=self.config.decay)
        self.consolidate(fisher)


@torch.no_grad()
def fisher_diagonal(model: MLP, x: Tensor, classes: Sequence[int] | None = None) -> list[Tensor]:
    """Diagonal of the Fisher information of the model's label distribution, a tensor like each parameter.

    ``mean over samples of sum_c p(c | x) (d log p(c | x) / d theta)^2``: the expectation over labels is exact, and so
    are the squares, which are taken per sample. The gradient of one sample in a weight matrix is the outer product
    of an error and an input, so its square is that of their squares and the sum over samples a single product,
    ``(errors^2)^T (inputs^2)``; errors are squared and summed over labels first.

    Args:
        model: the network.
        x: (B, features), B at least 1.
        classes: the labels that the distribution is over; None for all.
    """
    inputs = model.inputs(x)
    logits = model.layers[-1](inputs[-1])
    labels = range(logits.shape[1]) if classes is None else classes
    possible = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    possible[list(labels)] = True
    p = logits.masked_fill(~possible, -torch.inf).softmax(dim=1)
    squares = [x.new_zeros(len(x), units) for units in model.sizes[1:]]
    for label in labels:
        error = p.clone()
        error[:, label] -= 1.0
        for index in reversed(range(len(squares))):
            squares[index].addcmul_(error.square(), p[:, label, None])
            if index > 0:
                error = (error @ model.layers[index].weight) * (inputs[index] > 0)
    fisher = []
    for square, layer_input in zip(squares, inputs, strict=True):
        fisher += [square.T @ layer_input.square() / len(x), square.mean(dim=0)]
    return fisher
