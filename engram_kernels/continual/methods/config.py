"""The hyper-parameters of each family of methods, each stated once (see `parameters`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..parameters import PerLayer, check_parameters, documented, parameter

STATE_DTYPES = ("float32", "bfloat16", "int8")
WEIGHT_DTYPES = ("float32", "bfloat16")
READOUTS = ("linear", "dendritic", "prototype", "ridge")
COUNTED_READOUTS = ("prototype", "ridge")  # counted together rather than trained in steps
LOSS_NAMES = ("all", "batch", "local")

# groups of options
READOUT_GROUP, HYPER_PARAMETER_GROUP, MEMORY_GROUP = "read-out", "hyper-parameters", "memory"

# hyper-parameters of two families
_RATE: dict[str, Any] = {"help": "share of the units recruited per sample", "above": 0, "at_most": 1}
_SEGMENTS: dict[str, Any] = {"help": "dendritic segments per class", "default": 100, "at_least": 1}
_TOP_SEGMENTS: dict[str, Any] = {
    "help": "how many of them, the most active ones, give the score of their class, from 1 to all",
    "default": 1,
}
_CONSCIENCE: dict[str, Any] = {
    "help": "weight of the local loss's preference for segments that win seldom",
    "default": 5.0, "at_least": 0, "below": math.inf,
}  # fmt: skip


def values(value: PerLayer) -> tuple[float, ...]:
    """One or several values, as several."""
    return value if isinstance(value, tuple) else (value,)


def _check_top_segments(top_segments: int, segments: int) -> None:
    if not 1 <= top_segments <= segments:
        raise ValueError(f"top_segments: expected an integer from 1 to segments = {segments}, got {top_segments}")


def _check_one_lr(lr: PerLayer) -> None:
    if isinstance(lr, tuple):
        raise ValueError(f"lr: expected one value with a full-precision method, got {lr}")


@documented
@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Hyper-parameters of every method.

    Raises: ValueError, which names the hyper-parameter, what was expected and what was got.
    """

    batch_size: int = parameter("samples per step", 100, at_least=1)
    epochs: int = parameter("passes over each task; a method that counts its samples takes one", 1, at_least=1)

    model_file: ClassVar[str] = "model.pt"  # in the folder of a run, where its model is saved
    takes_features: ClassVar[bool] = False  # as the data set has them, rather than the inputs of a network

    def __post_init__(self) -> None:
        """Raises ValueError."""
        check_parameters(self)

    @property
    def takes_steps(self) -> bool:
        """Whether it is trained in steps, so that more passes teach it more."""
        return True

    @property
    def passes(self) -> int:
        """Passes over each task that are made."""
        return self.epochs if self.takes_steps else 1


@documented
@dataclass(frozen=True, kw_only=True)
class GradientConfig(MethodConfig):
    """Hyper-parameters of every method that is trained by gradients.

    The losses: ``all`` is cross-entropy over all classes, ``batch`` over the classes present in the batch only, so that
    learning new classes does not push the old ones' logits down. That uses no task label: the labels of the batch are
    all it needs. ``local`` is that of a dendritic read-out, see `DendriticReadout`.
    """

    lr: PerLayer = parameter(
        "step size of Adam; one value, three (first layer, all between, output layer) or one per trainable weight "
        "matrix, input side first",
        above=0, below=math.inf,
    )  # fmt: skip
    loss: str = parameter(
        "cross-entropy over all classes, over those present in the batch, or a dendritic read-out's local loss", "all",
        choices=LOSS_NAMES,
    )  # fmt: skip


@documented
@dataclass(frozen=True, kw_only=True)
class BinaryConfig(GradientConfig):
    """Hyper-parameters of binarized networks trained by metaplastic Adam.

    The read-outs: ``linear`` is a binary output layer; ``dendritic``, ``prototype`` and ``ridge`` are those of
    `engram_kernels.readouts`, the last two counted together, not trained, on fixed hidden layers.
    """

    metaplasticity: PerLayer = parameter(
        "resistance of large weights to shrinking (m of the metaplastic rule), 0 for plain Adam; like lr", 0.0,
        at_least=0, below=math.inf,
    )  # fmt: skip
    weight_bound: PerLayer = parameter(
        "largest magnitude of a hidden weight, which bounds its consolidation, inf for none; like lr", math.inf, above=0
    )
    rate: float | None = parameter(default=None, **_RATE)
    temperature: float | None = parameter(
        "temperature of the engrams' Gumbel noise; 0: always the most excitable units; inf: uniformly random", None,
        at_least=0,
    )  # fmt: skip
    readout: str = parameter(
        "read-out of engram: a binary output layer, dendritic segments, counted prototypes, ridge regression; of "
        "classifier: counted moments of pairs (ridge), means alone (prototype), or dendritic segments",
        "linear", choices=READOUTS, group=READOUT_GROUP,
    )  # fmt: skip
    segments: int = parameter(**_SEGMENTS)
    top_segments: int = parameter(**_TOP_SEGMENTS)
    conscience: float = parameter(**_CONSCIENCE)
    cross_entropy_weight: float = parameter(
        "weight of the batch's cross-entropy beside the local loss", 0.0, at_least=0, below=math.inf
    )
    penalty: float = parameter(
        "penalty of the ridge regression, a share of the mean variance", 0.1, above=0, below=math.inf
    )
    weight_decay: float = parameter("coupled L2 decay of the hidden weights", 0.0, at_least=0, below=math.inf)
    ste_window: float = parameter(
        "largest pre-activation that passes gradient (straight-through estimator), before a dendritic read-out as far "
        "above the weakest recruited unit's; inf: all",
        1.0, above=0,
    )  # fmt: skip
    logit_scale: float = parameter("factor on the logits before the softmax", 1.0, above=0)
    train_hidden: bool = parameter("train the hidden layers, or keep them as initialised (a random expansion)", True)
    balanced: bool = parameter("start hidden units with as many +1 as -1, so that none prefers bright images", False)
    state_dtype: str = parameter(
        "dtype of the optimizer's moments", "float32", choices=STATE_DTYPES, group=MEMORY_GROUP
    )
    weight_dtype: str = parameter("dtype of the hidden weights", "float32", choices=WEIGHT_DTYPES, group=MEMORY_GROUP)
    fuse_backward: bool = parameter(
        "update hidden weights within the backward pass, so that no whole gradient exists", False, group=MEMORY_GROUP
    )

    def __post_init__(self) -> None:
        """Raises ValueError."""
        super().__post_init__()
        _check_top_segments(self.top_segments, self.segments)
        if self.readout != "linear" and self.rate is None:
            raise ValueError(f"readout: expected linear with a method without engram gates, got {self.readout!r}")
        if self.loss == "local" and self.readout != "dendritic":
            raise ValueError(f"loss: expected local only with readout dendritic, got it with {self.readout}")

    @property
    def takes_steps(self) -> bool:
        """Whether it is trained in steps, so that more passes teach it more."""
        return self.readout not in COUNTED_READOUTS


@documented
@dataclass(frozen=True, kw_only=True)
class FullPrecisionConfig(GradientConfig):
    """Hyper-parameters of a full-precision multilayer perceptron trained by Adam: those of `finetune` and `joint`."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        super().__post_init__()
        _check_one_lr(self.lr)
        if self.loss == "local":
            raise ValueError("loss: expected all or batch with a full-precision method, got local")


@documented
@dataclass(frozen=True, kw_only=True)
class PenaltyConfig(FullPrecisionConfig):
    """Hyper-parameters of a method that pulls weights or outputs back to their earlier values: those of `si`."""

    strength: float = parameter("lambda of ewc, c of si, weight of lwf's distillation", 1.0, at_least=0, below=math.inf)


@documented
@dataclass(frozen=True, kw_only=True)
class EWCConfig(PenaltyConfig):
    """Hyper-parameters of `ewc`."""

    decay: float = parameter(
        "factor on ewc's earlier Fisher information with every task (gamma of online EWC)", 1.0, at_least=0, at_most=1
    )


@documented
@dataclass(frozen=True, kw_only=True)
class LwFConfig(PenaltyConfig):
    """Hyper-parameters of `lwf`."""

    distillation_temperature: float = parameter(
        "temperature of both softmaxes of lwf's distillation", 2.0, above=0, below=math.inf
    )


@documented
@dataclass(frozen=True, kw_only=True)
class ReplayConfig(FullPrecisionConfig):
    """Hyper-parameters of `replay`."""

    buffer_size: int = parameter("samples that replay keeps", 1000, at_least=1)


@documented
@dataclass(frozen=True, kw_only=True)
class FloatTwinConfig(GradientConfig):
    """Hyper-parameters of `engram-fp`, the full-precision twin of a dendritic read-out on fixed hidden layers."""

    rate: float = parameter(default=0.1, **_RATE)
    segments: int = parameter(**_SEGMENTS)
    top_segments: int = parameter(**_TOP_SEGMENTS)
    conscience: float = parameter(**_CONSCIENCE)

    def __post_init__(self) -> None:
        """Raises ValueError."""
        super().__post_init__()
        _check_one_lr(self.lr)
        _check_top_segments(self.top_segments, self.segments)


@documented
@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(MethodConfig):
    """Hyper-parameters of `classifier`."""

    batch_size: int = parameter("samples per step", 4096, at_least=1)
    readout: str = parameter(
        "the discriminant of counted pairs, the nearest counted class mean, or dendritic segments", "ridge",
        choices=("ridge", "prototype", "dendritic"), group=READOUT_GROUP,
    )  # fmt: skip
    segments: int = parameter(**_SEGMENTS, group=READOUT_GROUP)
    rate: float = parameter("share of the code's units that fire", 0.25, above=0, below=1)
    penalty: float | None = parameter(
        "penalty of the discriminant, a share of the code's variance; none: by generalised cross-validation", None,
        above=0, below=math.inf,
    )  # fmt: skip

    model_file: ClassVar[str] = "model.safetensors"
    takes_features: ClassVar[bool] = True

    @property
    def takes_steps(self) -> bool:
        """Whether it is trained in steps, so that more passes teach it more."""
        return False
