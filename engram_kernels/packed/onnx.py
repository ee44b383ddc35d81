"""Packed models as ONNX, of standard operators alone.

Signs and gates are uint8, 1 for +1 and for recruited, and sign matrices int8: with b the bits, g the gate and W the
signs, ``sum_k g s(b) W = 2 sum_k (g b) W - sum_k g W``, two products of MatMulInteger, or one and a constant without a
gate. ONNX has no packed bits, so the file has a byte where the packed model has a bit.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .. import ops
from .layers import (
    Affine,
    Dendritic,
    Encode,
    Gate,
    LearningDendritic,
    PackedLayer,
    Product,
    Prototype,
    Recruit,
    Ridge,
    Sign,
    Standardise,
)
from .model import PackedModel
from .packing import pack

if TYPE_CHECKING:
    import onnx

_OPSET = 17
_INPUTS = {torch.uint8: np.uint8, torch.float32: np.float32}


def export_onnx(model: nn.Module, path: str | os.PathLike[str], *, input_dtype: torch.dtype = torch.uint8) -> None:
    """Writes an ONNX file of standard operators, whose predictions are those of the packed model.

    The input is ``x`` (M, features) of any M, the output ``scores``, float32 (M, classes). From uint8 all is integers
    up to the read-out. From float32 the first product is one of floats, whose sums round in another order.

    Args:
        model: a :class:`PackedModel`, or a network that :func:`pack` takes.
        path: of the file.
        input_dtype: uint8 or float32.

    Raises: ImportError without the package onnx; ValueError for another dtype; TypeError for a network with
    convolutions; what :func:`pack` raises.

    >>> import tempfile, pathlib
    >>> model = ek.EngramMLP((784, 256, 10), readout="linear")
    >>> ek.export_onnx(model, pathlib.Path(tempfile.mkdtemp()) / "model.onnx")
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("export_onnx: needs the package onnx: pip install 'engram-kernels[onnx]'") from None
    if input_dtype not in _INPUTS:
        raise ValueError(f"input_dtype: expected torch.uint8 or torch.float32, got {input_dtype}")
    packed = model if isinstance(model, PackedModel) else pack(model)
    graph = _Graph(onnx, packed, input_dtype)
    for layer in packed.layers:
        graph.add(layer)  # type: ignore[arg-type]
    Path(path).write_bytes(graph.finish().SerializeToString())


def _signs(bits: Tensor, k: int) -> npt.NDArray[np.int8]:
    """Packed signs (N, words) -> int8 (K, N)."""
    return np.ascontiguousarray(ops.unpack_signs(bits.cpu(), k, torch.int8).T.numpy())


class _Graph:
    """The graph so far, with the names of the state: values, and signs and gate where there are any."""

    def __init__(self, onnx: Any, model: PackedModel, input_dtype: torch.dtype) -> None:
        self._onnx, self._model = onnx, model
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._input_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(_INPUTS[input_dtype]))
        self._y, self._bits, self._gate = "x", "", ""
        self._floats = input_dtype == torch.float32

    def add(self, layer: PackedLayer) -> None:
        """Adds the nodes of a layer."""
        kinds = {
            Encode: self._encode, Standardise: self._standardise, Product: self._product, Sign: self._sign,
            Recruit: self._recruit, Gate: self._fixed_gate, Affine: self._affine, Dendritic: self._dendritic,
            LearningDendritic: self._dendritic, Prototype: self._prototype, Ridge: self._ridge,
        }  # fmt: skip
        if type(layer) not in kinds:
            raise TypeError(f"model: expected a network without layers on images, got {layer.where} ({layer.kind})")
        kinds[type(layer)](layer)  # type: ignore[operator]

    def finish(self) -> onnx.ModelProto:
        """The whole model, checked."""
        helper, names = self._onnx.helper, self._onnx.TensorProto
        self._nodes.append(helper.make_node("Cast", [self._y], ["scores"], to=names.FLOAT))
        graph = helper.make_graph(
            self._nodes,
            "engram_kernels",
            [helper.make_tensor_value_info("x", self._input_type, ["samples", self._model.features])],
            [helper.make_tensor_value_info("scores", names.FLOAT, ["samples", self._model.classes])],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
        self._onnx.checker.check_model(model, full_check=True)
        return model

    # ---- nodes

    def _node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{operator.lower()}_{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def _constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def _cast(self, name: str, dtype: npt.DTypeLike) -> str:
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return str(self._node("Cast", name, to=kind))

    def _integer_product(self, x: str, signs: npt.NDArray[np.int8]) -> str:
        return str(self._node("MatMulInteger", x, self._constant(signs, np.int8)))

    # ---- layers

    def _encode(self, layer: Encode) -> None:
        if layer.inputs == layer.features and not self._floats:
            return
        y = self._node("Sub", self._cast(self._y, np.float32), self._constant(layer.mean.numpy(), np.float32))
        y = self._node("Div", y, self._constant(layer.scale.numpy(), np.float32))
        units = layer.inputs // layer.features
        if units == 1:
            self._y = self._clip(y, 3.0)
            return
        self._floats = True
        u = (torch.arange(units, dtype=torch.float32) + 0.5) / units
        thresholds = 0.3 * torch.tan(math.pi * (u - 0.5))
        y = self._node("Unsqueeze", y, self._constant([2], np.int64))
        y = self._node("Sub", y, self._constant(thresholds.numpy(), np.float32))
        y = self._clip(self._node("Mul", y, self._constant(2.0, np.float32)), 1.0)
        self._y = self._node("Reshape", y, self._constant([-1, layer.inputs], np.int64))

    def _standardise(self, layer: Standardise) -> None:
        def positive_or(y: str, bound: float, otherwise: float) -> str:
            reached = self._node("Greater", y, self._constant(bound, np.float32))
            return str(self._node("Where", reached, y, self._constant(otherwise, np.float32)))

        x = self._cast(self._y, np.float32)
        x = self._node("Div", x, positive_or(self._node("ReduceMax", self._node("Abs", x), axes=[1]), 0.0, 1.0))
        x = self._node("Sub", x, self._node("ReduceMean", x, axes=[1]))
        deviation = self._node("Sqrt", self._node("ReduceMean", self._node("Mul", x, x), axes=[1]))
        self._y = self._node("Div", x, positive_or(deviation, 1e-5, math.inf))
        self._floats = True

    def _clip(self, y: str, bound: float) -> str:
        return str(self._node("Clip", y, self._constant(-bound, np.float32), self._constant(bound, np.float32)))

    def _product(self, layer: Product) -> None:
        signs = _signs(layer.weight, layer.inputs)
        if layer.real and self._floats:
            self._y = self._node("MatMul", self._y, self._cast(self._constant(signs, np.int8), np.float32))
            return
        if layer.real:
            self._y = self._integer_product(self._y, signs)
        else:
            two = self._constant(2, np.int32)
            if self._gate:
                both = self._node("And", self._bits, self._gate)
                recruited = self._integer_product(self._cast(self._gate, np.uint8), signs)
                plus = self._integer_product(self._cast(both, np.uint8), signs)
            else:
                recruited = self._constant(signs.sum(0, dtype=np.int32), np.int32)
                plus = self._integer_product(self._cast(self._bits, np.uint8), signs)
            self._y = self._node("Sub", self._node("Mul", plus, two), recruited)
        self._floats, self._gate = False, ""

    def _sign(self, layer: Sign) -> None:
        if layer.by == "mean":
            if self._floats:
                y = self._cast(self._y, np.float64)
                self._bits = self._node("GreaterOrEqual", y, self._node("ReduceMean", y, axes=[1]))
            else:
                y = self._cast(self._y, np.int64)
                total = self._node("ReduceSum", y, self._constant([1], np.int64))
                self._bits = self._node("GreaterOrEqual", self._times(y, layer.units), total)
            return
        assert layer.threshold is not None
        whole = layer.whole_threshold.numpy()
        threshold = (
            self._constant(layer.threshold.numpy(), np.float32) if self._floats else self._constant(whole, np.int32)
        )
        reached = self._node("GreaterOrEqual", self._y, threshold)
        self._bits = self._node("Xor", reached, self._constant(layer.flipped.numpy(), np.bool_))

    def _times(self, y: str, factor: int) -> str:
        return str(self._node("Mul", y, self._constant(factor, np.int64)))

    def _recruit(self, layer: Recruit) -> None:
        y = self._y
        if layer.score == "distance":
            if self._floats:
                y = self._node("Sub", y, self._node("ReduceMean", y, axes=[1]))
            else:
                y = self._cast(y, np.int64)
                total = self._node("ReduceSum", y, self._constant([1], np.int64))
                y = self._node("Sub", self._times(y, layer.units), total)
        if layer.score in ("magnitude", "distance"):
            y = self._node("Abs", y)
        places = self._node("TopK", y, self._constant([layer.recruited], np.int64), outputs=2)[1]
        none = self._onnx.helper.make_tensor("none", self._onnx.TensorProto.BOOL, [1], [False])
        empty = self._node("ConstantOfShape", self._node("Shape", y), value=none)
        ones = self._node("Expand", self._constant([[True]], np.bool_), self._node("Shape", places))
        self._gate = self._node("ScatterElements", empty, places, ones, axis=1)

    def _fixed_gate(self, layer: Gate) -> None:
        self._gate = self._constant(_signs(layer.gate[None], layer.units).T > 0, np.bool_)

    def _affine(self, layer: Affine) -> None:
        y = self._cast(self._y, np.float32)
        for factor in layer.factors:
            y = self._node("Mul", y, self._constant(factor, np.float32))
        if layer.scale is not None:
            y = self._node("Mul", y, self._constant(layer.scale.numpy(), np.float32))
        if layer.shift is not None:
            y = self._node("Add", y, self._constant(layer.shift.numpy(), np.float32))
        self._y, self._floats = y, True

    def _gate_product(self, signs: npt.NDArray[np.int8], offset: Tensor, recruited: int) -> str:
        y = self._cast(self._integer_product(self._cast(self._gate, np.uint8), signs), np.float32)
        y = self._node("Sub", y, self._constant(offset.numpy(), np.float32))
        return str(self._node("Div", y, self._constant(math.sqrt(recruited), np.float32)))

    def _dendritic(self, layer: Dendritic) -> None:
        y = self._gate_product(_signs(layer.weight, layer.inputs), layer.mean_product, layer.recruited)
        y = self._node("Reshape", y, self._constant([-1, layer.classes, layer.segments], np.int64))
        if layer.top_segments > 1:
            y = self._node("TopK", y, self._constant([layer.top_segments], np.int64), outputs=2)[0]
            self._y = self._node("ReduceMean", y, axes=[2], keepdims=0)
        else:
            self._y = self._node("ReduceMax", y, axes=[2], keepdims=0)

    def _prototype(self, layer: Prototype) -> None:
        signs = _signs(layer.prototype_bits, layer.inputs)
        self._seen(layer, self._gate_product(signs, layer.offset, layer.recruited))

    def _ridge(self, layer: Ridge) -> None:
        weight = np.ascontiguousarray(layer.weight.numpy().T)
        y = self._node("MatMul", self._cast(self._gate, np.float32), self._constant(weight, np.float32))
        self._seen(layer, self._node("Add", y, self._constant(layer.bias.numpy(), np.float32)))

    def _seen(self, layer: Prototype | Ridge, y: str) -> None:
        seen = self._constant((layer.samples > 0).numpy()[None], np.bool_)
        self._y = self._node("Where", seen, y, self._constant(-math.inf, np.float32))
