"""Full-precision networks of the sizes of the binarized ones, trained by Adam: the baselines, each a class.

`FullPrecisionMethod` is `finetune`, which does nothing against forgetting, and what the others start from. `FloatTwin`
is the network of `engram-fp`: our own recipe, its signs real numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_kernels.readouts import pull_loss, segment_scores

from ..scenarios import Experience, Joint, Samples
from .base import LOSSES, Method
from .config import EWCConfig, FloatTwinConfig, FullPrecisionConfig, LwFConfig, PenaltyConfig, ReplayConfig

FISHER_SAMPLES = 1000  # of an experience, at most
SI_DAMPING = 0.1  # xi of Zenke et al. 2017, their value
COSINE_SCALE = 10.0  # of engram-fp's activations, so that the conscience weighs as it does in the binary read-out
_CHUNK = 250  # samples that are looked at together after an experience, which bounds the memory it takes


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, torch's default initialisation.

    Args:
        sizes: units per layer, input and output included.

    Shapes: floats (B, sizes[0]) -> logits (B, sizes[-1]).
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in pairwise(sizes))

    def inputs(self, x: Tensor) -> list[Tensor]:
        """The input of each layer, (B, units) each; the first is ``x``."""
        inputs = [x]
        for layer in self.layers[:-1]:
            inputs.append(torch.relu(layer(inputs[-1])))
        return inputs

    def forward(self, x: Tensor) -> Tensor:
        """Floats (B, features) -> logits (B, classes)."""
        return self.layers[-1](self.inputs(x)[-1])


class SeenClassesMLP(MLP):
    """An `MLP` whose scores are -inf for classes of which it was never told (``seen``, bool (classes,))."""

    seen: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.register_buffer("seen", torch.zeros(sizes[-1], dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Floats (B, features) -> logits (B, classes)."""
        return super().forward(x).masked_fill(~self.seen, -torch.inf)


class FullPrecisionMethod(Method):
    """`finetune`: an `MLP` and Adam. What the others start from."""

    config: FullPrecisionConfig
    model: MLP
    optimizer: torch.optim.Optimizer
    network: type[MLP] = MLP

    def __init__(self, config: FullPrecisionConfig, model: MLP) -> None:
        assert not isinstance(config.lr, tuple)
        super().__init__(config, model, torch.optim.Adam(model.parameters(), lr=config.lr, fused=True))

    @classmethod
    def build(cls, config: Any, features: int, hidden: Sequence[int], num_classes: int) -> Method:
        """Model and optimizer for ``config``, initialised from torch's global generator."""
        return cls(config, cls.network([features, *hidden, num_classes]))


class QuadraticPenalty(FullPrecisionMethod):
    """Pulls each weight back to what it was after the last experience, by how much it mattered.

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
        """Restores what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.anchors = _clones(state["anchors"])
        self.importance = None if state["importance"] is None else _clones(state["importance"])


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
        """Restores what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.path = _clones(state["path"])


class LwF(FullPrecisionMethod):
    """Learning without forgetting: the outputs for earlier classes stay what the network before would have said.

    ``cross-entropy + strength * mean of -sum_c before_c log now_c``, before and now the softmax of the old and of the
    new network's ``scores / T`` over the classes seen so far, T the distillation temperature (Li and Hoiem 2017). With
    loss ``all`` the cross-entropy is over these classes too. Of classes new in this experience the old network says 0,
    as van de Ven et al. 2022 have it; that is what holds the others up, for if both softmaxes were over the earlier
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
        """Restores what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = self._frozen_copy()
            self.teacher.load_state_dict(state["teacher"])

    def _frozen_copy(self) -> SeenClassesMLP:
        return copy.deepcopy(self.model).requires_grad_(False)


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
        replayed_x, replayed_y = self.buffer.draw(len(y))
        loss, scores = super().loss(torch.cat([x, replayed_x]), torch.cat([y, replayed_y]))
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
        """Restores what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        for name, value in state["buffer"].items():
            setattr(self.buffer, name, value.clone())


class JointTraining(FullPrecisionMethod):
    """Goes on training, each time on all experiences so far: what could be reached if nothing had to be forgotten."""

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
        """Restores what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.experiences = state["experiences"]


class FloatTwin(nn.Module):
    """Fixed random hidden layers whose most active units pass, and dendritic segments compared by cosine.

    ``h <- relu(z) * gate, z = layer_norm(h W^T)``, the gate of the ``max(1, round(rate * units))`` largest z; then
    ``s[m, c, j] = COSINE_SCALE * cos(h[m], weight[c S + j])`` and ``logit[m, c] = max_j s[m, c, j]``. The counterpart
    of `EngramMLP` with a `DendriticReadout`.

    Args:
        sizes: units per layer, input and output included.
        rate: share of the units recruited in each hidden layer.
        segments: S per class.
        top_segments: how many of the most active ones speak for their class.

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
            values, units = z.topk(max(1, round(self.rate * z.shape[1])), dim=1, sorted=False)
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


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]
