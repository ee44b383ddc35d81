"""Binarized networks trained by metaplastic Adam: `engram`, `mbnn`, `bnn`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...distributed import merged_counts
from ...engrams import StochasticEngram
from ...networks import EngramMLP
from ...optim import MetaplasticAdam
from ...readouts import DendriticReadout, PrototypeReadout, RidgeReadout
from .. import processes
from ..parameters import PerLayer
from ..scenarios import Experience, Samples
from .base import LOSSES, Method
from .config import BinaryConfig, values


class DendriticMethod(Method):
    """Trains a dendritic read-out, and the hidden layers through it where they are trained."""

    config: BinaryConfig

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Local loss, with its share of the batch's cross-entropy, or one of the other losses."""
        readout = self.model.readout
        assert isinstance(self.model, EngramMLP) and isinstance(readout, DendriticReadout)
        features = self.model.features(x)
        if self.config.loss != "local":
            scores = readout(features)
            return LOSSES[self.config.loss](scores * self.config.logit_scale, y), scores
        # the local loss would have all inputs of a class recruit the same units: it stays within the read-out
        activations = readout.activations(features.detach())
        scores, loss = readout.scores(activations), readout.local_loss(activations, y)
        if self.config.cross_entropy_weight:
            scores = readout(features)
            cross_entropy = LOSSES["batch"](scores * self.config.logit_scale, y)
            loss = loss + self.config.cross_entropy_weight * cross_entropy
        return loss, scores


class CountingMethod(Method):
    """Counts a read-out together on fixed hidden layers; takes no steps.

    Of several processes each counts its part of every minibatch; after each experience all are given what all have
    counted, with which the first one goes on, and the others begin anew.
    """

    def before_training_exp(self, experience: Experience) -> Samples:
        """Leaves what was counted before to the first process."""
        if processes.rank() > 0:
            assert isinstance(self.model.readout, nn.Module)
            for counts in self.model.readout.buffers(recurse=False):
                counts.zero_()
        return super().before_training_exp(experience)

    def after_training_exp(self, experience: Samples) -> None:
        """Puts together what the processes have counted."""
        if processes.size() > 1:
            self.model.load_state_dict(merged_counts(self.model).state_dict())

    @torch.no_grad()
    def observe(self, x: Tensor, y: Tensor) -> tuple[float | None, float | None]:
        """Counts a minibatch. No loss; the accuracy would cost more than the counting."""
        assert isinstance(self.model, EngramMLP)
        assert isinstance(self.model.readout, (PrototypeReadout, RidgeReadout))
        own, weight = processes.part(len(y))
        if weight:
            self.model.readout.observe(self.model.features(x[own]), y[own])
        return None, None


def build(config: BinaryConfig, features: int, hidden: Sequence[int], num_classes: int) -> Method:
    """Model and optimizer for ``config``, initialised from torch's global generator.

    Raises:
        ValueError: per-layer values that do not match the trainable weight matrices, or trained hidden layers
            before a read-out that is counted together.
    """
    dtype = getattr(torch, config.weight_dtype)
    engram = None
    if config.rate is not None:
        engram = StochasticEngram(config.rate, temperature=1.0 if config.temperature is None else config.temperature)
    kind: type[Method] = Method
    readout: nn.Module | str = "linear"
    if config.readout == "dendritic":
        assert engram is not None
        kind = DendriticMethod
        readout = DendriticReadout(
            hidden[-1], num_classes, config.segments,
            engram=engram, top_segments=config.top_segments,
            conscience=config.conscience, ste_window=config.ste_window,
        )  # fmt: skip
    elif config.readout != "linear":
        assert engram is not None
        if config.train_hidden:
            raise ValueError(f"train_hidden: expected False with readout {config.readout}, whose units are counted")
        kind = CountingMethod
        if config.readout == "prototype":
            readout = PrototypeReadout(hidden[-1], num_classes, engram=engram)
        else:
            readout = RidgeReadout(hidden[-1], num_classes, engram=engram, penalty=config.penalty)
    model = EngramMLP(
        [features, *hidden, num_classes],
        engram=engram,
        train_hidden=config.train_hidden,
        ste_window=config.ste_window,
        logit_scale=config.logit_scale,
        balanced=config.balanced,
        readout=readout,
        encode=False,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return kind(config, model, None if kind is CountingMethod else build_optimizer(config, model))


def build_optimizer(config: BinaryConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Metaplastic Adam over the trainable parameters.

    They are one group, or where values differ between layers, one for each weight matrix. A parameter that
    is no matrix (bias, gain) joins the group of the matrix before it.
    """
    groups: list[list[nn.Parameter]] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if not groups or (parameter.ndim >= 2 and any(p.ndim >= 2 for p in groups[-1])):
            groups.append([])
        groups[-1].append(parameter)
    names = ("lr", "metaplasticity", "weight_bound")
    of_groups = [
        dict(zip(names, own, strict=True))
        for own in zip(*(_per_layer(name, getattr(config, name), len(groups)) for name in names), strict=True)
    ]
    if all(own == of_groups[0] for own in of_groups):
        groups, of_groups = [[p for group in groups for p in group]], of_groups[:1]
    return MetaplasticAdam(
        [{"params": group, **own} for group, own in zip(groups, of_groups, strict=True)],
        weight_decay=config.weight_decay,
        state_dtype=getattr(torch, config.state_dtype),
        fuse_backward=config.fuse_backward,
    )


def _per_layer(name: str, value: PerLayer, layers: int) -> tuple[float, ...]:
    given = values(value)
    if len(given) == 1:
        return given * layers
    if len(given) == 3:
        first, between, last = given
        return (first, *[between] * (layers - 2), last)[-layers:]
    if len(given) != layers:
        raise ValueError(
            f"{name}: expected one value, three (first layer, between, output layer) or one for each of the {layers} "
            f"trainable weight matrices, got {len(given)}"
        )
    return given
