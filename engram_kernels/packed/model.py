"""A packed model: layers that never leave bits and integers between the first product and the read-out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .layers import Convolution, Encode, Flow, PackedLayer, Product, Sign, State, Transpose, _Readout


class PackedModel(nn.Module):
    """A network for evaluation that holds signs, thresholds and settings, and no hidden weights as floats.

    :func:`~engram_kernels.pack` makes it of a trained network, :func:`~engram_kernels.load_packed` reads its file. Its
    scores are those of that network in evaluation mode.

    Attributes: ``features``, of a sample; ``classes``; ``labels``, a list of the labels of the classes, or None;
    ``settings``, any object that describes the model; ``layers``.

    Shapes: uint8, or float32, (M, features), or (M, ...) of as many numbers -> scores, float32 (M, classes).
    Raises: ValueError for layers that do not follow each other, or labels of another number; RuntimeError for an input
    of another dtype or shape, or one with NaN.

    >>> model = ek.EngramMLP((64, 256, 10), readout="linear", encode=False).eval()
    >>> packed, x = ek.pack(model), torch.randn(5, 64)
    >>> torch.equal(packed(x), model(x))
    True
    """

    def __init__(
        self,
        features: int,
        layers: Sequence[PackedLayer],
        *,
        labels: Sequence[int | str] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.layers = nn.ModuleList(layers)
        flow = Flow(features)
        for layer in layers:
            flow = layer.flow(flow)
        if flow.is_input:
            raise ValueError("layers: expected a product among the layers, got none")
        if not flow.values:
            raise ValueError("layers: expected values at the end, got signs alone")
        self.classes = flow.units
        if labels is not None:
            if any(isinstance(label, bool) or not isinstance(label, (int, str)) for label in labels):
                raise TypeError(f"labels: expected integers or texts, got {list(labels)!r}")
            if len(labels) != self.classes:
                raise ValueError(f"labels: expected {self.classes}, one for each class, got {len(labels)}")
        self.labels = None if labels is None else list(labels)
        self.settings = {} if settings is None else settings
        self._order = tuple(layers)
        whole_inputs = isinstance(layers[0], Encode) and layers[0].inputs == layers[0].features
        self._skipped = 1 if whole_inputs else 0  # layers that leave bytes as they are
        # from each product that may take what came before to the end, and to the gate of the read-out
        readout = isinstance(layers[-1], _Readout)
        self._programs = {
            (start, end): program
            for end in (len(layers), len(layers) - 1)[: 1 + readout]
            for start, layer in enumerate(layers)
            if isinstance(layer, (Product, Convolution)) and (program := _program(layers[start:end])) is not None
        }
        whole = self._programs.get((self._skipped, len(layers)))
        self._of_bytes = whole if whole is not None and whole.real else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Scores, float32 (M, classes)."""
        program = self._of_bytes  # one call, on which the time of a single sample depends
        if program is not None and x.dtype == torch.uint8 and x.dim() == 2 and x.shape[1] == self.features and x.is_cpu:
            return program.call(x, None)
        with torch.no_grad():
            return self._run(self._begin(x), len(self._order)).y.float()

    @torch.no_grad()
    def predict(self, x: Tensor) -> list[int | str]:
        """The label of each sample: the first class of the largest score. Without labels its number."""
        classes = self(x).argmax(dim=1).tolist()
        return classes if self.labels is None else [self.labels[i] for i in classes]

    @torch.no_grad()
    def partial_fit(self, x: Tensor, y: Tensor) -> PackedModel:
        """Goes on learning with samples (M, features) and the numbers of their classes, int64 (M,); returns itself.

        Prototype and ridge read-outs are counted: the scores are then those of a read-out that has observed all samples
        in the first place. A dendritic read-out that was packed with its optimizer takes one step by its local loss, on
        the CPU.
        Raises: TypeError for another read-out; ValueError for other labels; RuntimeError for a ridge read-out packed
        without its moments, and for a dendritic one on another device.
        """
        readout = self.layers[-1]
        if not isinstance(readout, _Readout):
            raise TypeError(f"partial_fit: expected a prototype, ridge or dendritic read-out, got {readout.kind}")
        gate = self._run(self._begin(x), len(self._order) - 1).gate
        assert gate is not None
        readout.observe(gate if gate.dim() == 2 else gate.expand(len(x), -1).contiguous(), y)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, which :func:`~engram_kernels.load_packed` and the C++ runtime read.

        Raises: OSError if it can't be written; what was there before then stays.
        """
        from .file import save

        save(self, path)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"features={self.features}, classes={self.classes}"

    def _run(self, state: State, end: int) -> State:
        """The state after the first ``end`` layers: one operator from the first product on that it can begin with."""
        exact = state.y.dtype == torch.uint8
        for i in range(self._skipped if exact else 0, end):
            layer = self._order[i]
            if isinstance(layer, (Product, Convolution)) and layer.real is exact and state.y.device.type == "cpu":
                if (program := self._programs.get((i, end))) is not None:
                    return program.run(state)
                last = self._programs.get((i, end - 1)) if end == len(self._order) else None
                if last is not None:
                    return self._order[-1](last.run(state))
            state = layer(state)
            exact = state.y.dtype == torch.uint8
        return state

    def _begin(self, x: Tensor) -> State:
        if x.dtype not in (torch.uint8, torch.float32):
            raise RuntimeError(f"input: expected uint8 or float32, got {x.dtype}")
        if x.dim() > 2:
            x = x.flatten(1)
        if x.dim() != 2 or x.shape[1] != self.features:
            raise RuntimeError(f"input: expected shape (M, {self.features}), got {tuple(x.shape)}")
        first = next(layer for layer in self._order if not isinstance(layer, Transpose))
        if x.dtype == torch.uint8 and isinstance(first, Sign):
            raise RuntimeError("input: expected float32, of which the first layer takes the signs, got uint8")
        return State(x)


class _Program(NamedTuple):
    """Layers as one call of `ops.packed_network`."""

    real: bool
    gives_gate: bool
    layout: list[int]
    factors: list[float]
    held: list[tuple[PackedLayer, str]]  # the tensors: buffers, so that those in use are found after a change

    def call(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """The values, or the gate, that the last layer makes of bytes or of signs and their gate."""
        tensors = [layer._buffers[name] for layer, name in self.held]
        return ops.packed_network(x, gate, self.layout, self.factors, tensors)  # type: ignore[arg-type]

    def run(self, state: State) -> State:
        """The state after the layers: the values or the gate that the last one makes, and nothing else of it."""
        x = state.y if self.real else state.bits
        assert x is not None
        out = self.call(x, state.gate)
        return State(state.y, None, out) if self.gives_gate else State(out)


def _program(layers: Sequence[PackedLayer]) -> _Program | None:
    """Layers from a product on as one operator; None where one of them is none of its stages."""
    whole = True
    layout: list[int] = []
    factors: list[float] = []
    held: list[tuple[PackedLayer, str]] = []
    for layer in layers:
        stage = layer.stage(whole)
        if stage is None:
            return None
        whole = isinstance(layer, (Product, Convolution)) or (whole and layer.kind != "affine")
        layout += stage.numbers
        factors += stage.factors
        held += [(layer, name) for name in stage.tensors]
    first = layers[0]
    assert isinstance(first, (Product, Convolution))
    return _Program(first.real, layers[-1].kind in ("recruit", "gate"), layout, factors, held)
