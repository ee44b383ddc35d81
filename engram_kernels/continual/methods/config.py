"""Hyper-parameters: what each family of methods has, and the check of every one."""

from __future__ import annotations

import math
from dataclasses import dataclass

STATE_DTYPES = ("float32", "bfloat16", "int8")
WEIGHT_DTYPES = ("float32", "bfloat16")
READOUTS = ("linear", "dendritic", "prototype", "ridge")
COUNTED_READOUTS = ("prototype", "ridge")  # counted together rather than trained in steps
LOSS_NAMES = ("all", "batch", "local")
PerLayer = float | tuple[float, ...]


def values(value: PerLayer) -> tuple[float, ...]:
    """One or several values, as several."""
    return value if isinstance(value, tuple) else (value,)


def _check(name: str, value: PerLayer | None, wanted: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def _check_segments(segments: int, top_segments: int) -> None:
    _check("segments", segments, "an integer >= 1", segments >= 1)
    fits = 1 <= top_segments <= segments
    _check("top_segments", top_segments, f"an integer from 1 to segments = {segments}", fits)


@dataclass(frozen=True)
class MethodConfig:
    """What every method has.

    Attributes:
        lr: step size of Adam; one value, or one per trainable weight matrix, input side first. Three values serve
            networks of any depth: first layer, all between, output layer.
        loss: ``all``: cross-entropy over all classes. ``batch``: over the classes present in the batch only,
            so that learning new classes does not push the old ones' logits down. That uses no task label: the
            labels of the batch are all it needs. ``local``: of a dendritic read-out, see `DendriticReadout`.
        batch_size: samples per step.
        epochs: passes over each experience.
    """

    lr: PerLayer
    loss: str = "all"
    batch_size: int = 100
    epochs: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        for value in values(self.lr):
            _check("lr", value, "a finite number > 0", math.isfinite(value) and value > 0.0)
        if self.loss not in LOSS_NAMES:
            raise ValueError(f"loss: expected one of {', '.join(LOSS_NAMES)}, got {self.loss!r}")
        for name in ("batch_size", "epochs"):
            _check(name, getattr(self, name), "an integer >= 1", getattr(self, name) >= 1)

    @property
    def takes_steps(self) -> bool:
        """Whether it is trained in steps, so that more passes teach it more."""
        return True


@dataclass(frozen=True)
class BinaryConfig(MethodConfig):
    """Of binarized networks trained by metaplastic Adam.

    Attributes:
        metaplasticity: m of the metaplastic rule, 0 for plain Adam; one value or several, as for ``lr``.
        weight_bound: largest magnitude of a hidden weight, which bounds its consolidation, inf for none; one value
            or several, as for ``lr``.
        rate: share of each layer's input units recruited per sample, in (0, 1]; None for a method without
            gates.
        temperature: of the Gumbel noise in `StochasticEngram`; 0 is k-winners-take-all, inf uniformly random.
            None without gates.
        readout: ``linear``: a binary output layer. ``dendritic``, ``prototype``, ``ridge``: see
            `engram_kernels.readouts`; the last two are counted together, not trained, on fixed hidden layers.
        segments: of each class of a dendritic read-out.
        top_segments: how many of them, the most active ones, speak for their class, 1 to ``segments``.
        conscience: of its local loss: how strongly segments that win seldom are preferred, at least 0.
        cross_entropy_weight: weight of the batch's cross-entropy beside the local loss, at least 0.
        penalty: of a ridge read-out, a share of the mean variance, above 0.
        weight_decay: coupled L2 decay of the hidden weights.
        ste_window: the straight-through estimator passes gradient to units whose pre-activation is at most this
            in magnitude (before a dendritic read-out: this far above the weakest recruited unit's); inf to all.
        logit_scale: factor on the logits before the softmax, > 0.
        train_hidden: False keeps the hidden layers as initialised (a fixed random expansion).
        balanced: hidden weights start with as many +1 as -1 in each unit, so that no unit prefers bright images.
        state_dtype: of the optimizer's moments, one of STATE_DTYPES.
        weight_dtype: of the hidden weights, one of WEIGHT_DTYPES.
        fuse_backward: hidden weights are updated within the backward pass; no whole gradient exists.
    """

    metaplasticity: PerLayer = 0.0
    weight_bound: PerLayer = math.inf
    rate: float | None = None
    temperature: float | None = None
    readout: str = "linear"
    segments: int = 100
    top_segments: int = 1
    conscience: float = 5.0
    cross_entropy_weight: float = 0.0
    penalty: float = 0.01
    weight_decay: float = 0.0
    ste_window: float = 1.0
    logit_scale: float = 1.0
    train_hidden: bool = True
    balanced: bool = False
    state_dtype: str = "float32"
    weight_dtype: str = "float32"
    fuse_backward: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        for value in values(self.metaplasticity):
            _check("metaplasticity", value, "a finite number >= 0", math.isfinite(value) and value >= 0.0)
        for name, known in (("state_dtype", STATE_DTYPES), ("weight_dtype", WEIGHT_DTYPES), ("readout", READOUTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        rate, temperature = self.rate, self.temperature
        _check("rate", rate, "a number in (0, 1]", rate is None or 0.0 < rate <= 1.0)
        # inf is a uniformly random engram
        _check("temperature", temperature, "a number >= 0", temperature is None or temperature >= 0.0)
        _check_segments(self.segments, self.top_segments)
        for value in values(self.weight_bound):
            _check("weight_bound", value, "a number > 0", value > 0.0)
        for name in ("ste_window", "logit_scale"):
            _check(name, getattr(self, name), "a number > 0", getattr(self, name) > 0.0)
        for name in ("weight_decay", "conscience", "cross_entropy_weight"):
            value = getattr(self, name)
            _check(name, value, "a finite number >= 0", math.isfinite(value) and value >= 0.0)
        _check("penalty", self.penalty, "a finite number > 0", math.isfinite(self.penalty) and self.penalty > 0.0)
        if self.readout != "linear" and rate is None:
            raise ValueError(f"readout: expected linear with a method without engram gates, got {self.readout!r}")
        if self.loss == "local" and self.readout != "dendritic":
            raise ValueError(f"loss: expected local only with readout dendritic, got it with {self.readout}")

    @property
    def takes_steps(self) -> bool:
        """Whether it is trained in steps, so that more passes teach it more."""
        return self.readout not in COUNTED_READOUTS


@dataclass(frozen=True)
class FullPrecisionConfig(MethodConfig):
    """Of a full-precision multilayer perceptron trained by Adam: all that `finetune` and `joint` have."""

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        _check("lr", self.lr, "one value with a full-precision method", not isinstance(self.lr, tuple))
        if self.loss == "local":
            raise ValueError("loss: expected all or batch with a full-precision method, got local")


@dataclass(frozen=True)
class PenaltyConfig(FullPrecisionConfig):
    """Of a method that pulls weights back to what they were, or outputs: `si`.

    Attributes:
        strength: of what holds the network: lambda of ewc, c of si, weight of lwf's distillation; at least 0.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        strength = self.strength
        _check("strength", strength, "a finite number >= 0", math.isfinite(strength) and strength >= 0.0)


@dataclass(frozen=True)
class EWCConfig(PenaltyConfig):
    """Of `ewc`.

    Attributes:
        decay: of the earlier Fisher information when an experience is added (gamma of online EWC), in [0, 1].
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        _check("decay", self.decay, "a number in [0, 1]", 0.0 <= self.decay <= 1.0)


@dataclass(frozen=True)
class LwFConfig(PenaltyConfig):
    """Of `lwf`.

    Attributes:
        distillation_temperature: of both softmaxes of the distillation, > 0.
    """

    distillation_temperature: float = 2.0

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        temperature = self.distillation_temperature
        _check("distillation_temperature", temperature, "a finite number > 0", 0.0 < temperature < math.inf)


@dataclass(frozen=True)
class ReplayConfig(FullPrecisionConfig):
    """Of `replay`.

    Attributes:
        buffer_size: samples kept, at least 1.
    """

    buffer_size: int = 1000

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        _check("buffer_size", self.buffer_size, "an integer >= 1", self.buffer_size >= 1)


@dataclass(frozen=True)
class FloatTwinConfig(MethodConfig):
    """Of `engram-fp`, the full-precision twin of a dendritic read-out on fixed hidden layers.

    Attributes:
        rate: share of each hidden layer's units recruited per sample, in (0, 1].
        segments: of each class, at least 1.
        top_segments: how many of them, the most active ones, speak for their class, 1 to ``segments``.
        conscience: of the local loss: how strongly segments that win seldom are preferred, at least 0.
    """

    rate: float = 0.1
    segments: int = 100
    top_segments: int = 1
    conscience: float = 5.0

    def __post_init__(self) -> None:
        """Raises ValueError, naming the hyper-parameter, what it got and what it needs."""
        super().__post_init__()
        _check("lr", self.lr, "one value with a full-precision method", not isinstance(self.lr, tuple))
        _check("rate", self.rate, "a number in (0, 1]", 0.0 < self.rate <= 1.0)
        _check_segments(self.segments, self.top_segments)
        conscience = self.conscience
        _check("conscience", conscience, "a finite number >= 0", math.isfinite(conscience) and conscience >= 0.0)
