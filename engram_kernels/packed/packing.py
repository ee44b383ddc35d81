"""Makes a packed model of a trained network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoding import InputEncoding, SampleStandardisation
from ..engrams import BernoulliEngram, ContextEngram, Engram, StochasticEngram
from ..layers import BinaryEngramLinear
from ..networks import EngramMLP
from ..optim import MetaplasticAdam
from ..readouts import DendriticReadout, PrototypeReadout, RidgeReadout
from ..reference import encode_first_moment, encode_second_moment
from .layers import KINDS, PackedLayer, encode_hidden
from .model import PackedModel

_LARGEST = torch.finfo(torch.float32).max


@torch.no_grad()
def pack(
    model: nn.Module,
    *,
    labels: Sequence[int | str] | None = None,
    settings: dict[str, Any] | None = None,
    learning: bool | MetaplasticAdam = False,
) -> PackedModel:
    """A model of sign bits, integer thresholds and settings, whose predictions are those of ``model.eval()``.

    Takes an :class:`EngramMLP` with any read-out, and ``nn.Sequential``, nested too, of :class:`BinaryEngramLinear`,
    ``nn.BatchNorm1d``, :class:`ExactLayerNorm`, ``nn.LayerNorm`` without parameters, ``nn.Hardtanh``,
    :class:`InputEncoding` and a read-out of :mod:`engram_kernels.readouts`; ``nn.Flatten``, ``nn.Identity`` and
    ``nn.Dropout`` do nothing there. Of a normalisation and the sign after it one threshold a unit is left: the least
    integer for which the very functions of the model give +1, found by bisection. A normalisation of each sample is
    left out of a sign, which compares with the mean, and of a choice of the most excited.

    Equal to the last tie: after ``nn.LayerNorm``, and where a scale other than a power of two comes before the
    normalisation, float32 rounding decides in training which side of the mean a unit that equals it lies. A packed
    model compares integers, as :class:`ExactLayerNorm` does.

    Args:
        model: left as it is, in the mode that it was in.
        labels: of the classes, integers or texts, for :meth:`PackedModel.predict`.
        settings: what to tell of the model in its file, as JSON holds it.
        learning: what :meth:`PackedModel.partial_fit` goes on with. True keeps the moments of a ridge read-out, K²
            numbers; a prototype read-out needs nothing more. The optimizer of a dendritic read-out keeps hidden
            weights and moments in 8 bits, 3 bytes a weight, and its settings; counted read-outs take it for True.

    Raises: TypeError for a module that is not one of these, ValueError for one with settings or in an order that have
    no packed form; the message names it. TypeError for ``learning`` that is neither a bool nor a
    :class:`MetaplasticAdam`, ValueError for an optimizer that has no weight of a dendritic read-out to keep.

    >>> model = torch.nn.Sequential(
    ...     ek.BinaryEngramLinear(64, 256, binary_input=False),
    ...     torch.nn.BatchNorm1d(256),
    ...     ek.BinaryEngramLinear(256, 10, engram=ek.StochasticEngram(0.25)),
    ... ).eval()
    >>> packed, x = ek.pack(model), torch.randint(256, (5, 64), dtype=torch.uint8)
    >>> torch.equal(packed(x), model(x))
    True
    """
    if not isinstance(learning, (bool, MetaplasticAdam)):
        raise TypeError(f"learning: expected a bool or a MetaplasticAdam, got {type(learning).__name__}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        steps = [_Step(name, module) for name, module in _flat(model, "")]
        packer = _Packer(learning)
        for step in steps:
            packer.add(step)
        features = _features(steps)
        return PackedModel(features, packer.finish(), labels=labels, settings=settings)
    finally:
        for module, training in modes.items():
            module.training = training


class _Step(NamedTuple):
    name: str
    module: nn.Module | _Factor | _Bias | _Norm


class _Factor(NamedTuple):
    """A factor of all values, above 0."""

    value: float


class _Bias(NamedTuple):
    """A bias of each unit."""

    value: Tensor


class _Norm(NamedTuple):
    """A standardisation of each sample."""


def _learning_state(readout: DendriticReadout, optimizer: MetaplasticAdam) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors with which a dendritic read-out goes on learning."""
    weight = readout.weight
    groups = [group for group in optimizer.param_groups if any(own is weight for own in group["params"])]
    if not groups:
        raise ValueError("learning: expected the optimizer that has the weight of the dendritic read-out, got another")
    (group,), state = groups, optimizer.state.get(weight, {})
    nearest = torch.tensor(1 << 15)  # the middle of the draws that codes are rounded with
    codes, scale = encode_hidden(weight.detach().float().cpu(), torch.zeros(2, dtype=torch.int64))
    tensors = {"hidden": codes, "hidden_scale": scale}
    for name, encode in (("exp_avg", encode_first_moment), ("exp_avg_sq", encode_second_moment)):
        if f"{name}_scale" in state:
            tensors |= {key: state[key] for key in (name, f"{name}_scale")}
        else:
            moment = state[name].float().cpu() if name in state else torch.zeros(weight.shape)
            tensors |= dict(zip((name, f"{name}_scale"), encode(moment, nearest), strict=True))
    bound, (beta1, beta2) = float(group["weight_bound"]), group["betas"]
    fields: dict[str, Any] = {name: float(group[name]) for name in ("lr", "eps", "weight_decay", "metaplasticity")}
    fields |= {"beta1": beta1, "beta2": beta2, "weight_bound": bound if math.isfinite(bound) else None}
    fields |= {"conscience": readout.conscience, "step": int(state.get("step", 0))}
    return fields, tensors | {"wins": readout.wins}


def _flat(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The steps of a model, by name, in the order in which they are taken."""
    if isinstance(model, EngramMLP):
        prefix = f"{name}." if name else ""
        if model.encoding is not None:
            yield f"{prefix}encoding", model.encoding
        for i, layer in enumerate(model.layers):
            yield f"{prefix}layers.{i}", layer
            if i < model.hidden_layers:
                yield f"{prefix}layers.{i}", _Norm()
        if model.readout is not None:
            yield from _flat(model.readout, f"{prefix}readout")
        elif model.logit_scale != 1.0:
            yield f"{prefix}logit_scale", _Factor(model.logit_scale)
    elif isinstance(model, nn.Sequential):
        for child_name, child in model.named_children():
            yield from _flat(child, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, model


def _features(steps: Sequence[_Step]) -> int:
    for _, module in steps:
        if isinstance(module, (InputEncoding, SampleStandardisation)):
            return module.features
        if isinstance(module, (BinaryEngramLinear, DendriticReadout, PrototypeReadout, RidgeReadout)):
            return module.in_features
    raise ValueError("model: expected a binary layer, got none")


class _Packer:
    """Takes the steps one by one. What lies between a product and the next use of its values is kept until that use."""

    def __init__(self, learning: bool | MetaplasticAdam) -> None:
        self._learning = learning
        self._layers: list[PackedLayer] = []
        self._between: list[_Step] = []
        self._real = True  # whether values may be floats: those of the input and of the first product
        self._largest = math.inf  # magnitude of integers
        self._products = 0
        self._ended = False

    def add(self, step: _Step) -> None:
        """The next one."""
        name, module = step
        if self._ended:
            raise ValueError(f"{name}: expected nothing after the read-out, got {_kind(module)}")
        if isinstance(module, BinaryEngramLinear):
            self._add_linear(name, module)
        elif isinstance(module, (DendriticReadout, PrototypeReadout, RidgeReadout)):
            self._add_readout(name, module)
        elif isinstance(module, InputEncoding):
            if self._layers or self._between:
                raise ValueError(f"{name}: expected an InputEncoding before all other layers, got one after some")
            fields = {"features": module.features, "inputs": module.inputs}
            self._emit("encode", fields, mean=module.mean, scale=module.scale)
        elif isinstance(module, SampleStandardisation):
            if self._layers or self._between:
                raise ValueError(
                    f"{name}: expected a SampleStandardisation before all other layers, got one after some"
                )
            self._emit("standardise", {"features": module.features})
        elif isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
            if isinstance(module, nn.Flatten) and (self._layers or module.start_dim != 1 or module.end_dim != -1):
                raise ValueError(f"{name}: expected nn.Flatten(1) before all layers, got {module}")
        elif isinstance(module, (_Factor, _Norm, nn.BatchNorm1d, nn.LayerNorm, nn.Hardtanh)):
            _check_between(name, module)
            self._between.append(step)
        else:
            raise TypeError(
                f"{name}: expected a binary layer, BatchNorm1d, LayerNorm without parameters or a read-out, "
                f"got {type(module).__name__}"
            )

    def finish(self) -> list[PackedLayer]:
        """All layers, scores at the end."""
        if not self._ended:
            self._emit_values()
        return self._layers

    # ---- layers

    def _add_linear(self, name: str, layer: BinaryEngramLinear) -> None:
        scale = 1.0
        if layer.binary_input:
            self._emit_sign(name, layer.in_features)
            scale = self._emit_gate(name, layer.engram, layer.in_features)
        elif self._products or self._between:
            raise ValueError(f"{name}: expected binary_input=True after the first layer, got False")
        _, bits = layer.signed_weight()
        fields = {"inputs": layer.in_features, "outputs": layer.out_features, "real": not layer.binary_input}
        self._emit("product", fields, weight=bits)
        self._between = []
        self._real = not layer.binary_input
        self._largest = layer.in_features
        self._products += 1
        # in the order of operations of the layer
        if layer.scaled:
            scale /= math.sqrt(layer.in_features if layer.engram is None else layer.engram.recruited(layer.in_features))
        if scale != 1.0:
            self._between.append(_Step(name, _Factor(scale)))
        if layer.bias is not None:
            self._between.append(_Step(name, _Bias(layer.bias)))

    def _add_readout(self, name: str, readout: DendriticReadout | PrototypeReadout | RidgeReadout) -> None:
        k = readout.in_features
        self._emit_gate(name, readout.engram, k)
        fields: dict[str, Any] = {"inputs": k, "classes": readout.num_classes, "recruited": readout.engram.recruited(k)}
        if isinstance(readout, DendriticReadout):
            fields |= {"segments": readout.segments, "top_segments": readout.top_segments, "rate": readout.rate}
            weight = readout.signed_weight()[1]
            if isinstance(self._learning, MetaplasticAdam):
                learned_fields, learned = _learning_state(readout, self._learning)
                self._emit("learning dendritic", fields | learned_fields, weight=weight, **learned)
            else:
                self._emit("dendritic", fields, weight=weight)
        elif isinstance(readout, PrototypeReadout):
            self._emit("prototype", fields, counts=_int32(name, readout.counts), samples=readout.samples)
        else:
            weight, bias = readout.solve()
            moments = {"counts": _int32(name, readout.counts), "gram": readout.gram} if self._learning else {}
            tensors = {"weight": weight, "bias": bias, "samples": readout.samples, **moments}
            self._emit("ridge", fields | {"penalty": readout.penalty}, **tensors)
        self._ended = True

    # ---- what lies between

    def _emit_sign(self, name: str, units: int) -> None:
        """Signs of the values, as they are after the steps between."""
        norms = [i for i, (_, module) in enumerate(self._between) if _standardises(module)]
        if norms:
            first = norms[0]
            for step in self._between[first + 1 :]:
                if not isinstance(step.module, (_Factor, nn.Hardtanh)):
                    got = _kind(step.module)
                    raise ValueError(f"{step.name}: expected a binary layer or a read-out after a LayerNorm, got {got}")
            if any(not isinstance(step.module, _Factor) for step in self._between[:first]):
                self._emit_affine(self._between[:first])
            self._between = self._between[first:]
            self._emit("sign", {"units": units, "by": "mean"})
            return
        at_one = [step.name for step in self._between]
        tail = _functions(self._between)
        if self._real:
            threshold, flip = _thresholds(tail, units, _float_of_order, _order_of(_LARGEST), at_one or [name])
            self._emit("sign", {"units": units, "by": "threshold"}, threshold=threshold, flip=flip)
        else:
            threshold, flip = _thresholds(tail, units, Tensor.float, int(self._largest), at_one)
            self._emit("sign", {"units": units, "by": "threshold"}, threshold=threshold.int(), flip=flip)

    def _emit_gate(self, name: str, engram: Engram | None, units: int) -> float:
        """The gate of an engram in evaluation mode; returns the factor of the product."""
        if engram is None:
            return 1.0
        if isinstance(engram, BernoulliEngram) and not engram.sample_at_eval:
            return engram.rate
        if isinstance(engram, ContextEngram):
            if not isinstance(engram.context, int):
                raise ValueError(f"{name}: expected one context for all samples, got {engram.context!r}")
            self._emit("gate", {"units": units}, gate=engram.gates(units, torch.device("cpu"))[engram.context])
            return 1.0
        if not isinstance(engram, StochasticEngram):
            got = f"{type(engram).__name__}({engram.extra_repr()})"
            raise TypeError(f"{name}: expected a StochasticEngram, ContextEngram or BernoulliEngram, got {got}")
        self._emit_recruit(name, engram, units)
        return 1.0

    def _emit_recruit(self, name: str, engram: StochasticEngram, units: int) -> None:
        norms = [i for i, (_, module) in enumerate(self._between) if _standardises(module)]
        first = norms[0] if norms else len(self._between)
        for step in self._between[first + 1 :]:
            if not isinstance(step.module, _Factor):
                raise ValueError(
                    f"{step.name}: expected nothing between a LayerNorm and an engram, got {_kind(step.module)}"
                )
        magnitude = engram.score == "magnitude"
        if any(not isinstance(step.module, _Factor) for step in self._between[:first]):
            self._emit_affine(self._between[:first])
            self._between = self._between[first:]
        score = (
            "distance" if magnitude and norms else "magnitude" if magnitude else "standardised" if norms else "value"
        )
        self._emit("recruit", {"units": units, "recruited": engram.recruited(units), "score": score})

    def _emit_values(self) -> None:
        """The values themselves, as scores."""
        if not self._products:
            raise ValueError("model: expected a binary layer, got none")
        for name, module in self._between:
            if not isinstance(module, (_Factor, _Bias, nn.BatchNorm1d)):
                raise ValueError(f"{name}: expected a binary layer or a read-out after it, got the end of the model")
        if self._between:
            self._emit_affine(self._between)

    def _emit_affine(self, steps: Sequence[_Step]) -> None:
        """Values as float32, in the operations of the steps."""
        units = self._units()
        factors: list[float] = []
        for name, module in steps:
            if isinstance(module, _Factor):
                factors.append(module.value)
                continue
            if isinstance(module, _Bias):
                tensors = {"shift": module.value.float()}
            elif isinstance(module, nn.BatchNorm1d):
                tensors = dict(zip(("scale", "shift"), _affine_of(module), strict=True))
            else:
                raise ValueError(f"{name}: expected BatchNorm1d before an engram or at the end, got {_kind(module)}")
            self._emit("affine", {"units": units, "factors": factors}, **tensors)
            factors = []
        if factors:
            self._emit("affine", {"units": units, "factors": factors})
        self._real = True

    def _units(self) -> int:
        for layer in reversed(self._layers):
            if layer.kind == "product":
                return int(layer.outputs)  # type: ignore[arg-type]
        raise ValueError("model: expected a binary layer before the first normalisation, got none")

    def _emit(self, kind: str, fields: dict[str, Any], **tensors: Tensor) -> None:
        where = f"layer {len(self._layers)}"
        own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self._layers.append(KINDS[kind](where, fields, own))


def _kind(module: Any) -> str:
    return {_Factor: "a factor", _Bias: "a bias", _Norm: "a normalisation"}.get(type(module), type(module).__name__)


def _standardises(module: Any) -> bool:
    return isinstance(module, (_Norm, nn.LayerNorm))


def _check_between(name: str, module: Any) -> None:
    if isinstance(module, nn.LayerNorm):
        if module.elementwise_affine or len(module.normalized_shape) != 1:
            raise ValueError(f"{name}: expected a LayerNorm of one dimension without parameters, got {module}")
    elif isinstance(module, nn.BatchNorm1d):
        if module.running_mean is None or module.running_var is None:
            raise ValueError(f"{name}: expected a BatchNorm1d with running statistics, got {module}")
        held = (module.running_mean, module.running_var, module.weight, module.bias)
        for tensor in held:
            if tensor is not None and (tensor.dtype != torch.float32 or not bool(tensor.isfinite().all())):
                raise ValueError(f"{name}: expected a BatchNorm1d of finite float32 numbers, got {tensor.dtype}")
    elif isinstance(module, nn.Hardtanh) and not module.min_val < 0 <= module.max_val:
        raise ValueError(f"{name}: expected a Hardtanh of a range around 0, got {module}")


def _functions(steps: Sequence[_Step]) -> Callable[[Tensor], Tensor]:
    """The steps as one function of float32 (M, N), in the model's own operations."""

    def tail(y: Tensor) -> Tensor:
        for _, module in steps:
            if isinstance(module, _Factor):
                y = y * module.value
            elif isinstance(module, _Bias):
                y = y + module.value
            else:
                y = module(y)  # type: ignore[operator]
        return y

    return tail


def _affine_of(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """The factor and the summand that torch's batch normalisation makes of its parameters, float32 (N,)."""
    assert norm.running_mean is not None and norm.running_var is not None
    one, zero = torch.ones(1, norm.num_features), torch.zeros(1, norm.num_features)
    scale = nn.functional.batch_norm(one, zero[0], norm.running_var, norm.weight, None, False, 0.0, norm.eps)
    return scale[0], norm(zero)[0]


# Floats in the order of their values as integers: those of the bits, mirrored below 0.


def _order_of(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32))


def _float_of_order(order: Tensor) -> Tensor:
    return torch.where(order >= 0, order, -(2**31) - order).to(torch.int32).view(torch.float32)


def _thresholds(
    tail: Callable[[Tensor], Tensor], units: int, number_of: Callable[[Tensor], Tensor], largest: int, names: list[str]
) -> tuple[Tensor, Tensor]:
    """Where the sign of a monotonic function changes, by bisection: thresholds, float64 or float32 (N,), and flips.

    ``tail`` takes float32 (1, N), ``number_of`` makes them of integers in [-largest, largest], in their order. The sign
    is ``(number >= threshold) != flip``. Where it never changes the threshold is one that all or none reach.
    """

    def sign(order: Tensor) -> Tensor:
        z = tail(number_of(order)[None])[0]
        if bool(z.isnan().any()):
            raise ValueError(f"{', '.join(names)}: expected numbers for every input, got NaN")
        return z >= 0

    low = torch.full((units,), -largest, dtype=torch.int64)
    high = torch.full_like(low, largest)
    at_low, at_high = sign(low), sign(high)
    flip = at_low & ~at_high
    constant = at_low == at_high
    while bool((high - low > 1).any()):
        middle = (low + high) >> 1
        as_low = sign(middle) == at_low
        low, high = torch.where(as_low, middle, low), torch.where(as_low, high, middle)
    if number_of is _float_of_order:
        threshold = _float_of_order(high)
        never = torch.where(at_low, -math.inf, math.inf)
        return torch.where(constant, never, threshold), flip.to(torch.uint8)
    never = torch.where(at_low, -(2**31), 2**31 - 1)
    return torch.where(constant, never, high), flip.to(torch.uint8)


def _int32(name: str, counts: Tensor) -> Tensor:
    if counts.numel() and int(counts.max()) > torch.iinfo(torch.int32).max:
        raise ValueError(f"{name}: expected counts below 2**31, got {int(counts.max())}")
    return counts.int()
