"""The layers of a packed model: what each holds, and what it does to values, signs and gate.

``docs/packed-format.md`` defines them. A layer reads and writes the state ``(y, bits, gate)`` of a batch: the latest
values (M, N), the latest signs (M, words) and the recruited units (M, words) or (words,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..autograd import sign_convolution, sum_over_samples
from ..encoding import as_inputs, inputs_of, standardize
from ..engrams import StochasticEngram
from ..fakes import check_window
from ..norms import standardise
from ..readouts import (
    PrototypeReadout,
    RidgeReadout,
    check_labels,
    regression_scores,
    segment_scores,
    winning_segments,
)
from ..reference import (
    PACKED_SCORES,
    PACKED_STAGES,
    SCALE_BLOCK,
    Window,
    decode_first_moment,
    group_signs,
    pool_signs,
    top_units,
    words_for,
)

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Fields = dict[str, Callable[[Any], bool]]


class State(NamedTuple):
    """What layers read and write; after a pool y is of no use but for the number of its samples."""

    y: Tensor
    bits: Tensor | None = None
    gate: Tensor | None = None


class Flow(NamedTuple):
    """What is known of the state before a model has run: the units of y, and which of the others there are."""

    units: int
    is_input: bool = True
    values: bool = True
    bits: bool = False
    gate: bool = False
    scores: bool = False


class Stage(NamedTuple):
    """A layer as a stage of `ops.packed_network`: its numbers, its factors, and the names of its tensors."""

    numbers: list[int]
    tensors: tuple[str, ...] = ()
    factors: tuple[float, ...] = ()


def _stage(name: str, numbers: Sequence[int], tensors: Sequence[str] = (), factors: Sequence[float] = ()) -> Stage:
    return Stage([list(PACKED_STAGES).index(name), *numbers], tuple(tensors), tuple(factors))


class PackedLayer(nn.Module):
    """One layer: ``kind``, ``fields`` as JSON holds them, and tensors, which are buffers of the same names.

    Raises: ValueError for fields or tensors other than those of the kind; the message names the layer.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1  # of the format, the first that has it
    fields: ClassVar[Fields]
    optional: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, where: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.where = where
        if set(fields) != set(self.fields):
            raise self.fault("fields", ", ".join(self.fields) or "none", ", ".join(map(str, fields)) or "none")
        for name, valid in self.fields.items():
            if not valid(fields[name]):
                raise self.fault(name, f"a {name} of this kind of layer", repr(fields[name]))
            setattr(self, name, fields[name])
        layout = self.layout()
        for name in tensors:
            if name not in layout:
                raise self.fault("tensors", ", ".join(layout) or "none", name)
        for name, (dtype, shape) in layout.items():
            tensor = tensors.get(name)
            if tensor is None:
                if name not in self.optional:
                    raise self.fault(name, f"{dtype} {shape}", "nothing")
            elif tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise self.fault(name, f"{dtype} {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")
            self.register_buffer(name, tensor)
        self.check()

    def layout(self) -> Layout:
        """The tensors, in the order of the format: dtype and shape."""
        return {}

    def check(self) -> None:
        """Checks values, and derives what is not in the file."""

    def fault(self, name: str, expected: str, got: str) -> ValueError:
        """The error for a wrong field or tensor."""
        return ValueError(f"{self.where} ({self.kind}), {name}: expected {expected}, got {got}")

    def described(self) -> dict[str, Any]:
        """The layer as JSON holds it."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.fields}}

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds of it."""
        return {name: tensor for name in self.layout() if (tensor := getattr(self, name)) is not None}

    def flow(self, before: Flow) -> Flow:
        """The state after the layer. Raises: ValueError for a layer that can't stand where it stands."""
        raise NotImplementedError

    def forward(self, state: State) -> State:
        """The state after the layer."""
        raise NotImplementedError

    def stage(self, whole: bool) -> Stage | None:
        """What does the same, bit for bit, where values are integers, or floats without ``whole``; None if nothing."""
        return None

    def extra_repr(self) -> str:
        """The fields, for ``print``."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.fields)

    def _require(
        self, before: Flow, units: int, *, values: bool = False, bits: bool = False, gate: bool = False
    ) -> None:
        if before.scores:
            raise self.fault("order", "nothing after the read-out", f"a layer of kind {self.kind}")
        if units != before.units:
            raise self.fault("units", f"{before.units}, as the layer before gives", str(units))
        for name, needed, there in (
            ("values", values, before.values), ("bits", bits, before.bits), ("gate", gate, before.gate)
        ):  # fmt: skip
            if needed and not there:
                raise self.fault("order", f"a layer before it that makes {name}", "none")


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _window(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == set(Window._fields) and all(type(n) is int for n in value.values())


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _at_least_0(value: Any) -> bool:
    return _finite(value) and value >= 0


def _decay(value: Any) -> bool:
    return _finite(value) and 0 <= value < 1


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


class Encode(PackedLayer):
    """`InputEncoding` in evaluation mode."""

    kind = "encode"
    fields: ClassVar[Fields] = {"features": _size, "inputs": _size}
    features: int
    inputs: int
    mean: Tensor
    scale: Tensor

    def layout(self) -> Layout:
        """Mean and scale of the features."""
        return {name: (torch.float32, (self.features,)) for name in ("mean", "scale")}

    def check(self) -> None:
        """The number of inputs follows from the features."""
        if self.inputs != inputs_of(self.features):
            raise self.fault("inputs", str(inputs_of(self.features)), str(self.inputs))

    def flow(self, before: Flow) -> Flow:
        """First of all layers."""
        self._require(before, self.features)
        if not before.is_input:
            raise self.fault("order", "the first layer", "a later one")
        return before._replace(units=self.inputs)

    def forward(self, state: State) -> State:
        """Scaled and coded, but for images."""
        y = state.y
        if y.dtype == torch.uint8 and self.inputs == self.features:
            return state
        return State(as_inputs((y.float() - self.mean) / self.scale))


class Standardise(PackedLayer):
    """The standardisation of a training run's images: each sample by its own mean and deviation."""

    kind = "standardise"
    fields: ClassVar[Fields] = {"features": _size}
    features: int

    def flow(self, before: Flow) -> Flow:
        """First of all layers."""
        self._require(before, self.features)
        if not before.is_input:
            raise self.fault("order", "the first layer", "a later one")
        return before

    def forward(self, state: State) -> State:
        """Floats."""
        return State(standardize(state.y))


class Product(PackedLayer):
    """The product with a sign matrix: of signs, or of a real-valued input."""

    kind = "product"
    fields: ClassVar[Fields] = {"inputs": _size, "outputs": _size, "real": lambda value: isinstance(value, bool)}
    inputs: int
    outputs: int
    real: bool
    weight: Tensor
    groups: Tensor | None

    def layout(self) -> Layout:
        """The signs."""
        return {"weight": (torch.int64, (self.outputs, words_for(self.inputs)))}

    def check(self) -> None:
        """Lays the signs out for products with uint8."""
        groups = group_signs(self.weight, self.inputs) if self.real else None
        self.register_buffer("groups", groups, persistent=False)

    def flow(self, before: Flow) -> Flow:
        """Of signs, or the first."""
        self._require(before, self.inputs, bits=not self.real)
        if self.real and not before.is_input:
            raise self.fault("real", "false after the first product", "true")
        return Flow(self.outputs, is_input=False)

    def forward(self, state: State) -> State:
        """int32 (M, N), or float32 where the input is float32."""
        if self.real:
            return State(ops.sign_matmul_t(state.y, self.weight, self.inputs, self.groups))
        assert state.bits is not None
        return State(ops.binary_matmul(state.bits, self.weight, self.inputs, state.gate))

    def stage(self, whole: bool) -> Stage | None:
        """A product of bits or bytes."""
        return _stage("product", (self.inputs, int(self.real)), ("weight", "groups") if self.real else ("weight",))


class _OnImages(PackedLayer):
    """What layers on images share, which lie pixel by pixel, the channels of a pixel together."""

    window: dict[str, int]

    def check(self) -> None:
        """The numbers of the window, and how many units come out."""
        try:
            check_window(self.taps)
        except RuntimeError as error:
            raise ValueError(f"{self.where} ({self.kind}), {error}") from None
        if not _size(self.units_after):
            raise self.fault("window", "at most 2^31 - 1 units after it", str(self.units_after))

    @property
    def taps(self) -> Window:
        """The window."""
        return Window(**self.window)

    @property
    def channels_after(self) -> int:
        """Channels that come out."""
        raise NotImplementedError

    @property
    def units_after(self) -> int:
        """Units that come out."""
        return self.taps.out_height * self.taps.out_width * self.channels_after

    def _numbers(self, flag: bool) -> list[int]:
        return [*self.taps, int(flag)]


class Convolution(_OnImages):
    """The convolution with signs: of signs, or of real-valued images."""

    kind = "convolution"
    fields: ClassVar[Fields] = {"window": _window, "outputs": _size, "real": lambda value: isinstance(value, bool)}
    outputs: int
    real: bool
    weight: Tensor
    groups: Tensor | None

    def layout(self) -> Layout:
        """The signs."""
        return {"weight": (torch.int64, (self.outputs, words_for(self.taps.group_units)))}

    def check(self) -> None:
        """Lays the signs out for products with uint8."""
        super().check()
        w = self.taps
        if self.outputs % w.groups:
            raise self.fault("outputs", f"a multiple of {w.groups} groups", str(self.outputs))
        if self.real and w.groups > 1:
            raise self.fault("window", "one group of real inputs", str(w.groups))
        groups = group_signs(self.weight, w.group_units) if self.real else None
        self.register_buffer("groups", groups, persistent=False)

    @property
    def channels_after(self) -> int:
        """The outputs."""
        return self.outputs

    def flow(self, before: Flow) -> Flow:
        """Of signs, or the first."""
        self._require(before, self.taps.units, bits=not self.real)
        if self.real and not before.is_input:
            raise self.fault("real", "false after the first product", "true")
        return Flow(self.units_after, is_input=False)

    def forward(self, state: State) -> State:
        """int32 (M, N), or float32 where the input is float32."""
        w = self.taps
        if not self.real:
            assert state.bits is not None
            return State(ops.binary_conv2d(state.bits, self.weight, w, state.gate).flatten(1).to(torch.int32))
        images = state.y.unflatten(1, (w.height, w.width, w.channels)).permute(0, 3, 1, 2)
        y = sign_convolution(images.float(), self.weight, w).permute(0, 2, 3, 1).flatten(1)
        return State(y.to(torch.int32) if state.y.dtype == torch.uint8 else y)

    def stage(self, whole: bool) -> Stage | None:
        """A convolution of bits or bytes."""
        return _stage("convolution", self._numbers(self.real), ("weight", "groups") if self.real else ("weight",))


class MaxPool(_OnImages):
    """The largest sign that a pixel sees, of each channel; some channels change their sign after that."""

    kind = "max_pool"
    fields: ClassVar[Fields] = {"window": _window}
    optional = frozenset({"flip"})
    flip: Tensor | None
    flip_bits: Tensor | None

    def layout(self) -> Layout:
        """Flips."""
        return {"flip": (torch.uint8, (self.taps.channels,))}

    def check(self) -> None:
        """One group; flips of all pixels."""
        super().check()
        w, bits = self.taps, None
        if w.groups > 1:
            raise self.fault("window", "one group", str(w.groups))
        if self.flip is not None:
            _check_flip(self, self.flip)
            bits = ops.pack_signs(self.flip.float().repeat(w.out_height * w.out_width) - 0.5)
        self.register_buffer("flip_bits", bits, persistent=False)

    @property
    def channels_after(self) -> int:
        """Those that there were."""
        return self.taps.channels

    def flow(self, before: Flow) -> Flow:
        """Of signs, which alone are left."""
        self._require(before, self.taps.units, bits=True)
        return Flow(self.units_after, is_input=False, values=False, bits=True)

    def forward(self, state: State) -> State:
        """Other signs."""
        assert state.bits is not None
        bits = pool_signs(state.bits, self.taps)
        return State(state.y, bits if self.flip_bits is None else bits ^ self.flip_bits)

    def stage(self, whole: bool) -> Stage | None:
        """The same of bits."""
        flipped = self.flip is not None
        return _stage("max_pool", self._numbers(flipped), ("flip_bits",) if flipped else ())


class Transpose(PackedLayer):
    """Images whose channels come first as images pixel by pixel, or back."""

    kind = "transpose"
    fields: ClassVar[Fields] = {"rows": _size, "columns": _size}
    rows: int
    columns: int

    def flow(self, before: Flow) -> Flow:
        """Values alone."""
        self._require(before, self.rows * self.columns, values=True)
        return before._replace(bits=False, gate=False)

    def forward(self, state: State) -> State:
        """The same values in another order."""
        return State(state.y.unflatten(1, (self.rows, self.columns)).transpose(1, 2).flatten(1))

    def stage(self, whole: bool) -> Stage | None:
        """The same."""
        return _stage("transpose", (self.rows, self.columns))


def _check_flip(layer: PackedLayer, flip: Tensor) -> None:
    if bool((flip > 1).any()):
        raise layer.fault("flip", "0 or 1", str(int(flip.max())))


class Sign(PackedLayer):
    """Signs of values: by a threshold a unit, or by the mean of the sample.

    Thresholds of fewer units come again, as those of channels do in each pixel.
    """

    kind = "sign"
    fields: ClassVar[Fields] = {"units": _size, "by": _one_of("threshold", "mean")}
    optional = frozenset({"threshold", "flip"})
    units: int
    by: str
    threshold: Tensor | None
    flip: Tensor | None
    flipped: Tensor
    whole_threshold: Tensor

    def __init__(self, where: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        # int32, or float32 where values may be
        given = tensors.get("threshold")
        self._dtype = torch.float32 if given is not None and given.dtype == torch.float32 else torch.int32
        self._channels = given.shape[0] if given is not None and given.dim() == 1 else 0
        super().__init__(where, fields, tensors)

    def layout(self) -> Layout:
        """Thresholds and flips."""
        if self.by == "mean":
            return {}
        return {"threshold": (self._dtype, (self._channels,)), "flip": (torch.uint8, (self._channels,))}

    def check(self) -> None:
        """Thresholds for integers are those for floats, rounded up."""
        if self.by == "mean":
            return
        if self.threshold is None or self.flip is None:
            raise self.fault("threshold", "int32 or float32 threshold and uint8 flip", "nothing")
        if self._channels < 1 or self.units % self._channels:
            raise self.fault("threshold", f"a size that divides {self.units} units", str(self._channels))
        _check_flip(self, self.flip)
        if bool(self.threshold.isnan().any()):
            raise self.fault("threshold", "numbers", "NaN")
        period = threshold_period(self._channels, self.units)
        flip = self.flip.repeat(period // self._channels)
        self.register_buffer("flipped", flip.bool(), persistent=False)
        whole = self.threshold if self._dtype == torch.int32 else least_integer_that_reaches(self.threshold)
        self.register_buffer("whole_threshold", whole.repeat(period // self._channels), persistent=False)
        self.register_buffer("flip_bits", ops.pack_signs(flip.float() - 0.5), persistent=False)

    def flow(self, before: Flow) -> Flow:
        """After any layer that makes values."""
        self._require(before, self.units, values=True)
        return before._replace(bits=True)

    def forward(self, state: State) -> State:
        """The same values, with their signs."""
        y = state.y
        if y.dtype == torch.int32:
            if self.by == "mean":
                return state._replace(bits=ops.value_signs(y))
            rows = y.reshape(-1, len(self.whole_threshold))  # whose bits follow each other without padding
            bits = ops.value_signs(rows, self.whole_threshold, self.flipped)
            return state._replace(bits=bits.reshape(len(y), words_for(self.units)))
        if self.by == "mean":
            return state._replace(bits=ops.pack_signs(standardise(y)))
        assert self.threshold is not None and self.flip is not None
        channels = y.unflatten(1, (-1, self._channels))
        signs = torch.where((channels >= self.threshold) != self.flip.bool(), 1.0, -1.0).flatten(1)
        return state._replace(bits=ops.pack_signs(torch.where(y.isnan(), y, signs)))  # which packing refuses

    def stage(self, whole: bool) -> Stage | None:
        """Of integers."""
        if not whole:
            return None
        if self.by == "mean":
            return _stage("sign by mean", ())
        return _stage("sign by threshold", (), ("whole_threshold", "flip_bits"))


class Recruit(PackedLayer):
    """The most excited units: `StochasticEngram` in evaluation mode."""

    kind = "recruit"
    fields: ClassVar[Fields] = {
        "units": _size, "recruited": _size, "score": _one_of("value", "magnitude", "standardised", "distance"),
    }  # fmt: skip
    units: int
    recruited: int
    score: str

    def check(self) -> None:
        """No more than there are."""
        if self.recruited > self.units:
            raise self.fault("recruited", f"at most {self.units}", str(self.recruited))

    def flow(self, before: Flow) -> Flow:
        """After any layer that makes values."""
        self._require(before, self.units, values=True)
        return before._replace(gate=True)

    def forward(self, state: State) -> State:
        """The same values, with their gate."""
        y = state.y
        whole = not y.dtype.is_floating_point
        if self.score in ("standardised", "distance") and not whole:
            y = standardise(y)  # rounded as in training, where close values become equal ones
        elif self.score == "distance":
            y = _from_mean(y.to(torch.int64))
        if self.score in ("magnitude", "distance"):
            y = y.abs()
        if y.dtype == torch.int64:
            gate = top_units(y, self.recruited)
        elif whole:
            gate = ops.top_units(y.int(), self.recruited)
        else:
            seed = torch.zeros(2, dtype=torch.int64)
            gate = ops.sample_engram(y, seed, self.recruited / self.units, temperature=0.0)
        return state._replace(gate=gate)

    def stage(self, whole: bool) -> Stage | None:
        """But for standardised floats, whose rounding is torch's own."""
        if not whole and self.score in ("standardised", "distance"):
            return None
        return _stage("recruit", (self.recruited, PACKED_SCORES.index(self.score)))


def threshold_period(channels: int, units: int) -> int:
    """After how many units thresholds of channels come again in packed rows that have no padding; else all units."""
    period = math.lcm(channels, 128)
    return period if units % period == 0 else units


def _from_mean(y: Tensor) -> Tensor:
    """How far integers, int64 (M, N), lie from their mean, times N."""
    return y * y.shape[1] - y.sum(1, keepdim=True)


class Gate(PackedLayer):
    """One gate for all samples."""

    kind = "gate"
    fields: ClassVar[Fields] = {"units": _size}
    units: int
    gate: Tensor

    def layout(self) -> Layout:
        """The gate."""
        return {"gate": (torch.int64, (words_for(self.units),))}

    def flow(self, before: Flow) -> Flow:
        """After any layer that makes values."""
        self._require(before, self.units)
        return before._replace(gate=True)

    def forward(self, state: State) -> State:
        """The same values, with the gate."""
        return state._replace(gate=self.gate)

    def stage(self, whole: bool) -> Stage | None:
        """The gate."""
        return _stage("gate", (), ("gate",))


class Affine(PackedLayer):
    """Values as float32, times factors, then scaled and shifted unit by unit."""

    kind = "affine"
    fields: ClassVar[Fields] = {
        "units": _size,
        "factors": lambda value: isinstance(value, list) and all(map(_finite, value)),
    }
    optional = frozenset({"scale", "shift"})
    units: int
    factors: list[float]
    scale: Tensor | None
    shift: Tensor | None

    def layout(self) -> Layout:
        """Scale and shift."""
        return {name: (torch.float32, (self.units,)) for name in ("scale", "shift")}

    def check(self) -> None:
        """A scale comes with a shift."""
        if self.scale is not None and self.shift is None:
            raise self.fault("shift", f"float32 ({self.units},) beside a scale", "nothing")

    def flow(self, before: Flow) -> Flow:
        """After any layer that makes values."""
        self._require(before, self.units, values=True)
        return before

    def forward(self, state: State) -> State:
        """Other values."""
        y = state.y.float()
        for factor in self.factors:
            y = y * factor
        if self.scale is not None:
            assert self.shift is not None
            y = torch.addcmul(self.shift, y, self.scale)
        elif self.shift is not None:
            y = y + self.shift
        return state._replace(y=y)

    def stage(self, whole: bool) -> Stage | None:
        """The same operations, fused alike."""
        numbers = (len(self.factors), int(self.scale is not None), int(self.shift is not None))
        tensors = [name for name in ("scale", "shift") if getattr(self, name) is not None]
        return _stage("affine", numbers, tensors, self.factors)


class _Readout(PackedLayer):
    """What the read-outs share."""

    inputs: int
    classes: int
    recruited: int

    def flow(self, before: Flow) -> Flow:
        """Of a gate."""
        self._require(before, self.inputs, gate=True)
        return Flow(self.classes, is_input=False, scores=True)

    def forward(self, state: State) -> State:
        """Scores, float32 (M, C)."""
        gate = state.gate
        assert gate is not None
        if gate.dim() == 1:
            gate = gate.expand(state.y.shape[0], -1)
        return State(self.scores(gate))

    def scores(self, gate: Tensor) -> Tensor:
        """Scores, float32 (M, C), of engrams, bits (M, words)."""
        raise NotImplementedError

    def observe(self, gate: Tensor, y: Tensor) -> None:
        """Learns engrams, bits (M, words), and the numbers of their classes, int64 (M,)."""
        raise TypeError(
            f"{self.where} ({self.kind}): expected a read-out that is counted or, pack(model, learning=optimizer), one "
            "with its optimizer, got one that is trained"
        )

    def _engram(self) -> StochasticEngram:
        return StochasticEngram(self.recruited / self.inputs, temperature=0.0)


class Dendritic(_Readout):
    """`DendriticReadout`."""

    kind = "dendritic"
    fields: ClassVar[Fields] = {
        "inputs": _size, "classes": _size, "segments": _size, "top_segments": _size, "recruited": _size,
        "rate": _finite,
    }  # fmt: skip
    segments: int
    top_segments: int
    rate: float
    weight: Tensor
    mean_product: Tensor

    def layout(self) -> Layout:
        """The signs of all segments."""
        return {"weight": (torch.int64, (self.classes * self.segments, words_for(self.inputs)))}

    def check(self) -> None:
        """Derives the sums of signs."""
        if self.top_segments > self.segments:
            raise self.fault("top_segments", f"at most {self.segments}", str(self.top_segments))
        self._derive()

    def _derive(self) -> None:
        ones = ops.pack_signs(torch.ones(1, self.inputs, device=self.weight.device))
        every = ops.binary_matmul(ones, self.weight, self.inputs)
        self.register_buffer("mean_product", self.rate * every[0].float(), persistent=False)

    def activations(self, gate: Tensor) -> Tensor:
        """As `DendriticReadout.activations`, rounded alike: float32 (M, C, S)."""
        y = ops.binary_matmul(gate, self.weight, self.inputs, gate).float() - self.mean_product
        return (y / math.sqrt(self.recruited)).reshape(-1, self.classes, self.segments)

    def scores(self, gate: Tensor) -> Tensor:
        """As `DendriticReadout.scores`."""
        return segment_scores(self.activations(gate), self.top_segments)

    def stage(self, whole: bool) -> Stage | None:
        """Of one segment a class; torch adds up several in an order of its own."""
        if self.top_segments > 1:
            return None
        return _stage("dendritic", (self.segments, self.recruited), ("weight", "mean_product"))


class LearningDendritic(Dendritic):
    """`DendriticReadout` that goes on learning by its local loss, a step of `MetaplasticAdam` a batch.

    All that it learns with is of 8 bits: hidden weights and both moments, as ``csrc/core/compact.h`` keeps first and
    second moments. Floats exist of a block of rows at a time. Random bits follow from the number of the step.
    """

    kind = "learning dendritic"
    version = 2
    fields: ClassVar[Fields] = Dendritic.fields | {
        "conscience": _at_least_0, "lr": _at_least_0, "beta1": _decay, "beta2": _decay, "eps": _at_least_0,
        "weight_decay": _at_least_0, "metaplasticity": _at_least_0,
        "weight_bound": lambda value: value is None or (_finite(value) and value > 0), "step": _count,
    }  # fmt: skip
    conscience: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    metaplasticity: float
    weight_bound: float | None
    step: int
    hidden: Tensor
    hidden_scale: Tensor
    exp_avg: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor
    wins: Tensor

    def layout(self) -> Layout:
        """The signs, and what they are learned with."""
        rows = self.classes * self.segments
        scales = (torch.float32, (rows, -(-self.inputs // SCALE_BLOCK)))
        return super().layout() | {
            "hidden": (torch.int8, (rows, self.inputs)), "hidden_scale": scales,
            "exp_avg": (torch.int8, (rows, self.inputs)), "exp_avg_scale": scales,
            "exp_avg_sq": (torch.uint8, (rows, self.inputs)), "exp_avg_sq_scale": scales,
            "wins": (torch.float32, (self.classes, self.segments)),
        }  # fmt: skip

    def check(self) -> None:
        """The signs are those of the hidden weights."""
        for name in ("hidden_scale", "exp_avg_scale", "exp_avg_sq_scale"):
            scale = getattr(self, name)
            if not bool((scale.isfinite() & (scale >= 0)).all()):
                raise self.fault(name, "finite numbers of at least 0", "others")
        if not bool((self.wins.isfinite() & (self.wins > 0)).all()):
            raise self.fault("wins", "finite numbers above 0", "others")
        if not torch.equal(ops.pack_signs(self.hidden.float()), self.weight):
            raise self.fault("hidden", "numbers with the signs of weight", "others")
        super().check()

    def observe(self, gate: Tensor, y: Tensor) -> None:
        """One step by the local loss of a batch."""
        samples = len(gate)
        check_labels(samples, y, self.classes)
        if not gate.is_cpu:
            raise RuntimeError(f"partial_fit: expected a dendritic read-out on cpu, got one on {gate.device}")
        if samples == 0:
            return
        own = self.activations(gate)[torch.arange(samples), y]
        winner = winning_segments(own, y, self.wins, self.conscience, count=True)
        d = torch.zeros(samples, self.classes * self.segments)
        d[torch.arange(samples), y * self.segments + winner] = -1.0 / samples / math.sqrt(self.recruited)
        self.step += 1
        for first in range(0, d.shape[1], _ROWS):
            self._update(slice(first, first + _ROWS), d[:, first : first + _ROWS].contiguous(), gate)
        self._derive()

    def _update(self, rows: slice, d: Tensor, gate: Tensor) -> None:
        """One step of the hidden weights of some rows."""
        grad = ops.gated_weight_grad(d, gate, self.inputs, gate) - self.rate * sum_over_samples(d)
        weight = decode_hidden(self.hidden[rows], self.hidden_scale[rows])
        ops.metaplastic_adam_(
            weight, grad, self.exp_avg[rows], self.exp_avg_sq[rows], self.weight[rows],
            lr=self.lr, beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=self.weight_decay,
            metaplasticity=self.metaplasticity, step=self.step,
            weight_bound=math.inf if self.weight_bound is None else self.weight_bound,
            exp_avg_scale=self.exp_avg_scale[rows], exp_avg_sq_scale=self.exp_avg_sq_scale[rows],
            seed=self._seed(0), first_row=rows.start,
        )  # fmt: skip
        self.hidden[rows], self.hidden_scale[rows] = encode_hidden(weight, self._seed(1), rows.start)

    def _seed(self, key: int) -> Tensor:
        return torch.tensor([key, self.step % 2**32])


_ROWS = 128  # of a block whose hidden weights exist as floats: 1 MiB of 2048 inputs


def decode_hidden(codes: Tensor, scale: Tensor) -> Tensor:
    """As `decode_first_moment`, by a table of all codes."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    table = decode_first_moment(every.unsqueeze(1), torch.ones(256, 1)).squeeze(1)
    weight = table[codes.view(torch.uint8).int()]
    return weight.mul_(scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, : codes.shape[1]])


def encode_hidden(weight: Tensor, seed: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of hidden weights, float32 (N, K), as those of first moments; a negative one has no code 0.

    A first moment without a decay is the gradient: the update codes what it is given as that.
    """
    n, k = weight.shape
    codes, unused = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n, k, dtype=torch.uint8)
    scale, unused_scale = torch.zeros(2, n, -(-k // SCALE_BLOCK))
    ops.metaplastic_adam_(
        weight.clone(), weight, codes, unused, None,
        lr=0.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0, metaplasticity=0.0, step=1,
        exp_avg_scale=scale, exp_avg_sq_scale=unused_scale, seed=seed, first_row=first_row,
    )  # fmt: skip
    return codes.masked_fill_((codes == 0) & (weight < 0), -1), scale


class Prototype(_Readout):
    """`PrototypeReadout`, by its counts."""

    kind = "prototype"
    fields: ClassVar[Fields] = {"inputs": _size, "classes": _size, "recruited": _size}
    counts: Tensor
    samples: Tensor
    prototype_bits: Tensor
    offset: Tensor
    _counted: PrototypeReadout

    def layout(self) -> Layout:
        """The counts."""
        shape = (self.classes, self.inputs)
        return {"counts": (torch.int32, shape), "samples": (torch.int64, (self.classes,))}

    def check(self) -> None:
        """Derives the prototypes."""
        readout = PrototypeReadout(self.inputs, self.classes, engram=self._engram())
        readout.counts, readout.samples = self.counts.long(), self.samples
        object.__setattr__(self, "_counted", readout)  # no module of this one: its buffers are those of the file
        self._derive()

    def _derive(self) -> None:
        bits, offset = self._counted.prototypes()
        self.register_buffer("prototype_bits", bits, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def scores(self, gate: Tensor) -> Tensor:
        """As `PrototypeReadout`."""
        return self._counted.engram_scores(gate, self.prototype_bits, self.offset)

    def stage(self, whole: bool) -> Stage | None:
        """The prototypes."""
        return _stage("prototype", (self.recruited,), ("prototype_bits", "offset", "samples"))

    def observe(self, gate: Tensor, y: Tensor) -> None:
        """Counts."""
        self._counted.observe_engrams(gate, y)
        self.counts = self._counted.counts.int()
        self._derive()


class Ridge(_Readout):
    """`RidgeReadout`: a solution, and to go on learning its moments."""

    kind = "ridge"
    fields: ClassVar[Fields] = {"inputs": _size, "classes": _size, "recruited": _size, "penalty": _finite}
    optional = frozenset({"counts", "gram"})
    penalty: float
    weight: Tensor
    bias: Tensor
    samples: Tensor
    counts: Tensor | None
    gram: Tensor | None

    def layout(self) -> Layout:
        """Solution and moments."""
        shape = (self.classes, self.inputs)
        return {
            "weight": (torch.float32, shape), "bias": (torch.float32, (self.classes,)),
            "samples": (torch.int64, (self.classes,)), "counts": (torch.int32, shape),
            "gram": (torch.int32, (self.inputs, self.inputs)),
        }  # fmt: skip

    def check(self) -> None:
        """Derives sums, and the moments that learning goes on from."""
        self.register_buffer("weight_sums", self.weight.sum(1), persistent=False)
        self._moments: RidgeReadout | None = None
        if (self.counts is None) != (self.gram is None):
            raise self.fault("gram", "counts and gram, or neither", "one of them")
        if self.counts is not None and self.gram is not None:
            moments = RidgeReadout(self.inputs, self.classes, engram=self._engram(), penalty=self.penalty)
            moments.gram, moments.counts, moments.samples = self.gram, self.counts.long(), self.samples
            object.__setattr__(self, "_moments", moments)  # no module of this one: its buffers are those of the file

    def scores(self, gate: Tensor) -> Tensor:
        """As `RidgeReadout`."""
        return regression_scores(gate, self.weight, self.bias).masked_fill(self.samples == 0, -math.inf)

    def stage(self, whole: bool) -> Stage | None:
        """The solution."""
        return _stage("ridge", (), ("weight", "bias", "weight_sums", "samples"))

    def observe(self, gate: Tensor, y: Tensor) -> None:
        """Counts, and solves anew."""
        if self._moments is None:
            raise RuntimeError("partial_fit: expected a model packed to go on learning, pack(model, learning=True)")
        self._moments.observe_engrams(gate, y)
        self.gram, self.counts = self._moments.gram, self._moments.counts.int()
        self.weight, self.bias = self._moments.solve()
        self.weight_sums = self.weight.sum(1)


KINDS: dict[str, type[PackedLayer]] = {
    layer.kind: layer
    for layer in (
        Encode, Standardise, Product, Convolution, MaxPool, Transpose, Sign, Recruit, Gate, Affine, Dendritic,
        LearningDendritic, Prototype, Ridge,
    )
}  # fmt: skip


def least_integer_that_reaches(threshold: Tensor) -> Tensor:
    """The least integers that are at least ``threshold`` as float32: float32 (N,) -> int32 (N,).

    Beyond float32's integers several integers are one number, and the least of them counts.
    """
    low = torch.full(threshold.shape, -(2**31), dtype=torch.int64, device=threshold.device)
    high = torch.full_like(low, 2**31 - 1)  # reached by none that a product gives
    for _ in range(32):
        middle = (low + high) >> 1
        reached = middle.float() >= threshold
        low, high = torch.where(reached, low, middle + 1).clamp(max=2**31 - 1), torch.where(reached, middle, high)
    return high.int()
