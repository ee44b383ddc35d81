"""Makes a packed model of a trained network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..convolution import BinaryEngramConv2d
from ..encoding import InputEncoding, SampleStandardisation
from ..engrams import BernoulliEngram, ContextEngram, Engram, StochasticEngram
from ..layers import BinaryEngramLinear
from ..networks import EngramMLP
from ..optim import MetaplasticAdam
from ..readouts import DendriticReadout, PrototypeReadout, RidgeReadout
from ..reference import Window, encode_first_moment, encode_second_moment
from .layers import KINDS, Convolution, PackedLayer, Product, encode_hidden
from .model import PackedModel

_LARGEST = torch.finfo(torch.float32).max
_READOUTS = (DendriticReadout, PrototypeReadout, RidgeReadout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_WITHOUT_EFFECT = (nn.Identity, nn.Dropout, nn.Dropout2d)


@torch.no_grad()
def pack(
    model: nn.Module,
    *,
    sample_shape: tuple[int, int, int] | None = None,
    labels: Sequence[int | str] | None = None,
    settings: dict[str, Any] | None = None,
    learning: bool | MetaplasticAdam = False,
) -> PackedModel:
    """A model of sign bits, integer thresholds and settings, whose predictions are those of ``model.eval()``.

    Takes an :class:`EngramMLP` with any read-out, and ``nn.Sequential``, nested too, of :class:`BinaryEngramLinear`,
    :class:`BinaryEngramConv2d`, ``nn.BatchNorm1d``, ``nn.BatchNorm2d``, ``nn.MaxPool2d``, :class:`ExactLayerNorm`,
    ``nn.LayerNorm`` without parameters, ``nn.Hardtanh``, ``nn.Flatten``, ``nn.Unflatten`` of the input,
    :class:`InputEncoding` and a read-out of :mod:`engram_kernels.readouts`; ``nn.Identity`` and ``nn.Dropout`` do
    nothing there. Of a normalisation and the sign after it one threshold a unit, or a channel, is left: the least
    integer for which the very functions of the model give +1, found by bisection. A normalisation of each sample is
    left out of a sign, which compares with the mean, and of a choice of the most excited. A maximum is taken of signs.

    Equal to the last tie: after ``nn.LayerNorm``, and where a scale other than a power of two comes before the
    normalisation, float32 rounding decides in training which side of the mean a unit that equals it lies. A packed
    model compares integers, as :class:`ExactLayerNorm` does.

    Args:
        model: left as it is, in the mode that it was in.
        sample_shape: (channels, height, width) of the images of a network that begins with a convolution; None where
            ``nn.Unflatten`` says it.
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
        if sample_shape is not None:
            packer.add(_Step("sample_shape", _images(sample_shape)))
        for step in steps:
            packer.add(step)
        features = _features(steps) if sample_shape is None else math.prod(sample_shape)
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
        if isinstance(module, (BinaryEngramLinear, *_READOUTS)):
            return module.in_features
        if isinstance(module, nn.Unflatten):
            return math.prod(module.unflattened_size)
    raise ValueError("model: expected a binary layer, got none")


def _images(sample_shape: Any) -> nn.Unflatten:
    three = isinstance(sample_shape, tuple) and len(sample_shape) == 3
    if not three or any(type(size) is not int or size < 1 for size in sample_shape):
        raise ValueError(f"sample_shape: expected (channels, height, width), got {sample_shape!r}")
    return nn.Unflatten(1, sample_shape)


class _Packer:
    """Takes the steps one by one. What lies between a product and the next use of its values is kept until that use.

    Values of images lie pixel by pixel, the channels of a pixel together, where the model has channel by channel.
    """

    def __init__(self, learning: bool | MetaplasticAdam) -> None:
        self._learning = learning
        self._layers: list[PackedLayer] = []
        self._between: list[_Step] = []
        self._real = True  # whether values may be floats: those of the input and of the first product
        self._largest = math.inf  # magnitude of integers
        self._products = 0
        self._ended = False
        self._image: tuple[int, int, int] | None = None  # channels, height, width of the values; None: no image
        self._shape: tuple[int, int, int] | None = None  # the same after the steps between; None: flat
        self._by_channel = False  # whether the values of an image lie as the model has them

    def add(self, step: _Step) -> None:
        """The next one."""
        name, module = step
        if self._ended:
            raise ValueError(f"{name}: expected nothing after the read-out, got {_kind(module)}")
        if isinstance(module, BinaryEngramLinear):
            self._add_linear(name, module)
        elif isinstance(module, BinaryEngramConv2d):
            self._add_convolution(name, module)
        elif isinstance(module, _READOUTS):
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
        elif isinstance(module, nn.Unflatten):
            self._add_unflatten(name, module)
        elif isinstance(module, nn.Flatten):
            self._add_flatten(step, module)
        elif isinstance(module, _WITHOUT_EFFECT):
            pass
        elif isinstance(module, nn.MaxPool2d):
            self._add_pool(step, module)
        elif isinstance(module, (_Factor, _Norm, *_BATCH_NORMS, nn.LayerNorm, nn.Hardtanh)):
            _check_between(name, module, self._shape)
            self._between.append(step)
        else:
            raise TypeError(
                f"{name}: expected a binary layer, BatchNorm1d, BatchNorm2d, MaxPool2d, LayerNorm without parameters "
                f"or a read-out, got {type(module).__name__}"
            )

    def finish(self) -> list[PackedLayer]:
        """All layers, scores at the end."""
        if not self._ended:
            self._emit_values()
        return self._layers

    # ---- shapes

    def _add_unflatten(self, name: str, module: nn.Unflatten) -> None:
        size = tuple(module.unflattened_size)
        if self._products or self._between or self._shape is not None or module.dim != 1 or len(size) != 3:
            raise ValueError(
                f"{name}: expected nn.Unflatten(1, (channels, height, width)) before the first convolution, and no "
                f"sample_shape beside it, got {module}"
            )
        self._image = self._shape = size

    def _add_flatten(self, step: _Step, module: nn.Flatten) -> None:
        if (self._products and self._shape is None) or module.start_dim != 1 or module.end_dim != -1:
            raise ValueError(
                f"{step.name}: expected nn.Flatten(1) before all layers or after a convolution, got {module}"
            )
        if not self._products:  # values as they come
            self._image = None
        elif self._shape is not None:
            self._between.append(step)
        self._shape = None

    def _add_pool(self, step: _Step, module: nn.MaxPool2d) -> None:
        if not self._products or self._shape is None:
            raise ValueError(f"{step.name}: expected a convolution before MaxPool2d, got none")
        if module.ceil_mode or module.return_indices:
            raise ValueError(f"{step.name}: expected a MaxPool2d without ceil_mode and indices, got {module}")
        window = _pool_window(module, self._shape)
        self._shape = (self._shape[0], window.out_height, window.out_width)
        if min(self._shape) < 1:
            raise ValueError(f"{step.name}: expected images that are larger than the kernel, got {module}")
        self._between.append(step)

    def _pixels(self) -> int:
        """Of the values."""
        return 1 if self._image is None else self._image[1] * self._image[2]

    def _of_units(self, of_channels: Tensor) -> Tensor:
        """What channels have (C,), for all units as they lie."""
        return of_channels.repeat_interleave(self._pixels()) if self._by_channel else of_channels.repeat(self._pixels())

    def _transpose(self, rows: int, columns: int) -> None:
        if rows > 1 and columns > 1:
            self._emit("transpose", {"rows": rows, "columns": columns})

    def _as_in_the_model(self, name: str) -> None:
        """Brings the values of an image that has been flattened into the order in which the model counts them."""
        if self._image is None or self._by_channel:
            return
        if self._shape is not None:
            raise ValueError(f"{name}: expected nn.Flatten() before it, got images of {self._shape}")
        self._no_pools(name)
        self._transpose(self._pixels(), self._image[0])
        self._by_channel = True

    def _no_pools(self, name: str) -> None:
        """Of maxima the signs alone are known."""
        for pool in self._between:
            if isinstance(pool.module, nn.MaxPool2d):
                raise ValueError(f"{pool.name}: expected signs after MaxPool2d, got values that {name} needs")

    # ---- layers

    def _add_linear(self, name: str, layer: BinaryEngramLinear) -> None:
        if self._shape is not None:
            raise ValueError(f"{name}: expected nn.Flatten() before it, got images of {self._shape}")
        image, scale = self._image, 1.0
        if image is not None and layer.engram is not None and not isinstance(layer.engram, BernoulliEngram):
            self._as_in_the_model(name)
        turned = image is not None and not self._by_channel
        if layer.binary_input:
            self._emit_sign(name, layer.in_features)
            scale = self._emit_gate(name, layer.engram, layer.in_features)
        elif self._products or self._between:
            raise ValueError(f"{name}: expected binary_input=True after the first layer, got False")
        _, bits = layer.signed_weight()
        if turned:
            assert image is not None
            bits = _pixel_by_pixel(bits, layer.in_features, image[0])
        fields = {"inputs": layer.in_features, "outputs": layer.out_features, "real": not layer.binary_input}
        self._emit("product", fields, weight=bits)
        # in the order of operations of the layer
        if layer.scaled:
            scale /= math.sqrt(layer.in_features if layer.engram is None else layer.engram.recruited(layer.in_features))
        self._begin_values(name, layer, scale, layer.in_features, None)

    def _add_convolution(self, name: str, layer: BinaryEngramConv2d) -> None:
        if self._shape is None:
            if not self._layers:
                raise ValueError(
                    "sample_shape: expected (channels, height, width) of a network that begins with a convolution, "
                    f"{name}, got None"
                )
            raise ValueError(f"{name}: expected images before a convolution, got flat values")
        channels, height, width = self._shape
        if channels != layer.in_channels:
            raise ValueError(f"{name}: expected images of {layer.in_channels} channels, got {channels}")
        if not self._products:
            self._transpose(channels, height * width)
        scale, share, window = 1.0, 1.0, layer.window(height, width)
        if layer.binary_input:
            self._emit_sign(name, window.units)
            if layer.engram is not None:
                scale, share = self._emit_image_gate(name, layer, window)
        elif self._products or self._between:
            raise ValueError(f"{name}: expected binary_input=True after the first layer, got False")
        fields = {"window": window._asdict(), "outputs": layer.out_channels, "real": not layer.binary_input}
        self._emit("convolution", fields, weight=layer.signed_weight()[1])
        if layer.scaled:  # as in the layer
            scale /= math.sqrt(window.group_units * share)
        after = (layer.out_channels, window.out_height, window.out_width)
        self._begin_values(name, layer, scale, window.group_units, after)

    def _begin_values(
        self,
        name: str,
        layer: BinaryEngramLinear | BinaryEngramConv2d,
        scale: float,
        largest: int,
        image: tuple[int, int, int] | None,
    ) -> None:
        """The values of a layer, which come next."""
        self._between = []
        self._real = not layer.binary_input
        self._largest = largest
        self._products += 1
        self._image = self._shape = image
        self._by_channel = False
        if scale != 1.0:
            self._between.append(_Step(name, _Factor(scale)))
        if layer.bias is not None:
            self._between.append(_Step(name, _Bias(layer.bias)))

    def _emit_image_gate(self, name: str, layer: BinaryEngramConv2d, window: Window) -> tuple[float, float]:
        """The gate of a convolution; returns the factor of its sums and the share of the units that it recruits."""
        engram, by_channel = layer.engram, layer.gates == "channels"
        assert engram is not None
        counted = window.channels if by_channel else window.units
        share = engram.recruited(counted) / counted
        if by_channel and isinstance(engram, StochasticEngram):
            raise ValueError(
                f"{name}: expected gates='units' of a StochasticEngram, since means of channels are no integers, got "
                "gates='channels'"
            )
        if by_channel and isinstance(engram, ContextEngram):
            gate = self._context_gate(name, engram, window.channels)
            signs = ops.unpack_signs(gate[None], window.channels).repeat(1, window.height * window.width)
            self._emit("gate", {"units": window.units}, gate=ops.pack_signs(signs)[0])
            return 1.0, share
        return self._emit_gate(name, engram, window.units), share

    def _add_readout(self, name: str, readout: DendriticReadout | PrototypeReadout | RidgeReadout) -> None:
        k = readout.in_features
        self._as_in_the_model(name)
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
            self._no_pools(self._between[norms[0]].name)
            first = norms[0]
            for step in self._between[first + 1 :]:
                if not isinstance(step.module, (_Factor, nn.Hardtanh)):
                    got = _kind(step.module)
                    raise ValueError(f"{step.name}: expected a binary layer or a read-out after a LayerNorm, got {got}")
            if any(not isinstance(step.module, (_Factor, nn.Flatten)) for step in self._between[:first]):
                self._emit_affine(self._between[:first])
            self._between = self._between[first:]
            self._emit("sign", {"units": units, "by": "mean"})
            return
        threshold, flip = self._thresholds(name, units)
        pools = [i for i, (_, module) in enumerate(self._between) if isinstance(module, nn.MaxPool2d)]
        if self._image is None or not pools:
            self._emit("sign", {"units": units, "by": "threshold"}, threshold=threshold, flip=flip)
            return
        # of what falls with a maximum the sign is that of a minimum
        falls = [_falls(self._between[i:], self._image[0]) for i in [*pools, len(self._between)]]
        units = self._image[0] * self._pixels()
        self._emit("sign", {"units": units, "by": "threshold"}, threshold=threshold, flip=flip ^ falls[0])
        shape = self._image
        for number, i in enumerate(pools):
            pool = self._between[i].module
            assert isinstance(pool, nn.MaxPool2d)
            window = _pool_window(pool, shape)
            flips = falls[number] ^ falls[number + 1]
            self._emit("max_pool", {"window": window._asdict()}, **({"flip": flips} if bool(flips.any()) else {}))
            shape = (shape[0], window.out_height, window.out_width)

    def _thresholds(self, name: str, units: int) -> tuple[Tensor, Tensor]:
        """Thresholds and flips of the units as they lie, or of channels that come again in each pixel."""
        image, steps = self._image, self._between
        of_units = [step for step in steps if isinstance(step.module, nn.BatchNorm1d)]
        if image is None:
            size, tail = units, _functions(steps)
        elif of_units:  # each has its own factors, in the order of the model
            self._no_pools(of_units[0].name)
            size, tail = units, _image_functions(steps, image)
        else:
            size, tail = image[0], _channel_functions(steps)
        names = [step.name for step in steps] or [name]
        if self._real:
            threshold, flip = _thresholds(tail, size, _float_of_order, _order_of(_LARGEST), names)
        else:
            threshold, flip = _thresholds(tail, size, Tensor.float, int(self._largest), names)
            threshold = threshold.int()
        if image is None:
            return threshold, flip
        if of_units:
            return (threshold, flip) if self._by_channel else (_turned(threshold, image[0]), _turned(flip, image[0]))
        return (self._of_units(threshold), self._of_units(flip)) if self._by_channel else (threshold, flip)

    def _emit_gate(self, name: str, engram: Engram | None, units: int) -> float:
        """The gate of an engram in evaluation mode; returns the factor of the product."""
        if engram is None:
            return 1.0
        if isinstance(engram, BernoulliEngram) and not engram.sample_at_eval:
            return engram.rate
        if isinstance(engram, ContextEngram):
            self._emit("gate", {"units": units}, gate=self._context_gate(name, engram, units))
            return 1.0
        if not isinstance(engram, StochasticEngram):
            got = f"{type(engram).__name__}({engram.extra_repr()})"
            raise TypeError(f"{name}: expected a StochasticEngram, ContextEngram or BernoulliEngram, got {got}")
        self._emit_recruit(name, engram, units)
        return 1.0

    @staticmethod
    def _context_gate(name: str, engram: ContextEngram, units: int) -> Tensor:
        if not isinstance(engram.context, int):
            raise ValueError(f"{name}: expected one context for all samples, got {engram.context!r}")
        return engram.gates(units, torch.device("cpu"))[engram.context]

    def _emit_recruit(self, name: str, engram: StochasticEngram, units: int) -> None:
        self._no_pools(f"the engram of {name}")
        norms = [i for i, (_, module) in enumerate(self._between) if _standardises(module)]
        first = norms[0] if norms else len(self._between)
        for step in self._between[first + 1 :]:
            if not isinstance(step.module, _Factor):
                raise ValueError(
                    f"{step.name}: expected nothing between a LayerNorm and an engram, got {_kind(step.module)}"
                )
        magnitude = engram.score == "magnitude"
        if any(not isinstance(step.module, (_Factor, nn.Flatten)) for step in self._between[:first]):
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
        self._as_in_the_model("the end of the model")
        for name, module in self._between:
            if not isinstance(module, (_Factor, _Bias, *_BATCH_NORMS, nn.Flatten)):
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
            if isinstance(module, nn.Flatten):
                continue
            if isinstance(module, _Bias):
                tensors = {"shift": module.value.float()}
            elif isinstance(module, _BATCH_NORMS):
                tensors = dict(zip(("scale", "shift"), _affine_of(module), strict=True))
            else:
                raise ValueError(f"{name}: expected a BatchNorm before an engram or at the end, got {_kind(module)}")
            if self._image is not None and not isinstance(module, nn.BatchNorm1d):
                tensors = {key: self._of_units(tensor) for key, tensor in tensors.items()}
            elif self._image is not None and not self._by_channel:
                tensors = {key: _turned(tensor, self._image[0]) for key, tensor in tensors.items()}
            self._emit("affine", {"units": units, "factors": factors}, **tensors)
            factors = []
        if factors:
            self._emit("affine", {"units": units, "factors": factors})
        self._real = True

    def _units(self) -> int:
        for layer in reversed(self._layers):
            if isinstance(layer, Product):
                return layer.outputs
            if isinstance(layer, Convolution):
                return layer.units_after
        raise ValueError("model: expected a binary layer before the first normalisation, got none")

    def _emit(self, kind: str, fields: dict[str, Any], **tensors: Tensor) -> None:
        where = f"layer {len(self._layers)}"
        own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self._layers.append(KINDS[kind](where, fields, own))


def _kind(module: Any) -> str:
    return {_Factor: "a factor", _Bias: "a bias", _Norm: "a normalisation"}.get(type(module), type(module).__name__)


def _standardises(module: Any) -> bool:
    return isinstance(module, (_Norm, nn.LayerNorm))


def _check_between(name: str, module: Any, shape: tuple[int, int, int] | None) -> None:
    if isinstance(module, nn.LayerNorm):
        if module.elementwise_affine or len(module.normalized_shape) != 1:
            raise ValueError(f"{name}: expected a LayerNorm of one dimension without parameters, got {module}")
        if shape is not None:
            raise ValueError(f"{name}: expected nn.Flatten() before a LayerNorm, got images of {shape}")
    elif isinstance(module, _BATCH_NORMS):
        if isinstance(module, nn.BatchNorm2d) != (shape is not None):
            wanted = "BatchNorm1d of flat values" if shape is None else f"BatchNorm2d of images of {shape}"
            raise ValueError(f"{name}: expected a {wanted}, got {module}")
        if shape is not None and module.num_features != shape[0]:
            raise ValueError(f"{name}: expected a BatchNorm2d of {shape[0]} channels, got {module}")
        if module.running_mean is None or module.running_var is None:
            raise ValueError(f"{name}: expected a {_kind(module)} with running statistics, got {module}")
        held = (module.running_mean, module.running_var, module.weight, module.bias)
        for tensor in held:
            if tensor is not None and (tensor.dtype != torch.float32 or not bool(tensor.isfinite().all())):
                raise ValueError(f"{name}: expected a {_kind(module)} of finite float32 numbers, got {tensor.dtype}")
    elif isinstance(module, nn.Hardtanh) and not module.min_val < 0 <= module.max_val:
        raise ValueError(f"{name}: expected a Hardtanh of a range around 0, got {module}")


def _pool_window(pool: nn.MaxPool2d, image: tuple[int, int, int]) -> Window:
    """The window of a pool on images of channels, height and width."""
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    (down, across) = ([size if isinstance(size, int) else size[axis] for size in sizes] for axis in (0, 1))
    channels, height, width = image
    return Window(
        height, width, channels, down[0], across[0], down[1], across[1], down[2], down[2], across[2], across[2],
        down[3], across[3],
    )  # fmt: skip


def _falls(steps: Sequence[_Step], channels: int) -> Tensor:
    """Channels whose sign after the steps falls where their values rise, uint8 (C,); factors are above 0."""
    falls = torch.zeros(channels, dtype=torch.uint8)
    for _, module in steps:
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            falls = falls ^ (module.weight.cpu() < 0).to(torch.uint8)
    return falls


def _turned(t: Tensor, channels: int) -> Tensor:
    """What units have (..., N), from the order of the model, channel by channel, into that of pixels."""
    return t.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2).contiguous()


def _pixel_by_pixel(bits: Tensor, units: int, channels: int) -> Tensor:
    """Sign bits (N, words of units) likewise."""
    return ops.pack_signs(_turned(ops.unpack_signs(bits, units), channels))


def _functions(steps: Sequence[_Step]) -> Callable[[Tensor], Tensor]:
    """The steps as one function of float32 (M, N) or (M, C, height, width), in the model's own operations.

    Without the maxima, which are the values themselves where the values of a channel are equal.
    """

    def tail(y: Tensor) -> Tensor:
        for _, module in steps:
            if isinstance(module, _Factor):
                y = y * module.value
            elif isinstance(module, _Bias):
                y = y + (module.value if y.dim() == 2 else module.value[:, None, None])
            elif not isinstance(module, nn.MaxPool2d):
                y = module(y)  # type: ignore[operator]
        return y

    return tail


def _channel_functions(steps: Sequence[_Step]) -> Callable[[Tensor], Tensor]:
    """The same of channels, float32 (1, C): of an image that has four pixels alike."""
    tail = _functions([step for step in steps if not isinstance(step.module, nn.Flatten)])

    def of_channels(y: Tensor) -> Tensor:
        image = y[:, :, None, None].expand(-1, -1, 2, 2).contiguous(memory_format=torch.channels_last)
        return tail(image)[:, :, 0, 0]

    return of_channels


def _image_functions(steps: Sequence[_Step], image: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
    """The same of the units of an image, float32 (1, N), which the steps flatten."""
    tail = _functions(steps)

    def of_units(y: Tensor) -> Tensor:
        return tail(y.unflatten(1, image).contiguous(memory_format=torch.channels_last))

    return of_units


def _affine_of(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The factor and the summand that torch's batch normalisation makes of its parameters, float32 (N,)."""
    assert norm.running_mean is not None and norm.running_var is not None
    one, zero = torch.ones(1, norm.num_features), torch.zeros(1, norm.num_features)
    settings = norm.running_var, norm.weight
    scale = nn.functional.batch_norm(one, zero[0], *settings, None, False, 0.0, norm.eps)
    shift = nn.functional.batch_norm(zero, norm.running_mean, *settings, norm.bias, False, 0.0, norm.eps)
    return scale[0], shift[0]


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
