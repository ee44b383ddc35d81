"""What a model holds and does: bits, operations and memory in training, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .convolution import BinaryEngramConv2d
from .hidden_weight import HiddenWeight
from .layers import BinaryEngramLinear
from .readouts import DendriticReadout, PrototypeReadout, RidgeReadout
from .reference import words_for

_STATE_BITS = {torch.float32: 64.0, torch.bfloat16: 32.0, torch.int8: 16.0 + 2 * 32 / 64}  # both moments, and scales


@dataclass(frozen=True)
class LayerSummary:
    """One layer. Sizes in bytes; operations are a product and a sum each, of the input that was given.

    Attributes:
        name: in the model.
        kind: its class.
        output: shape of what it gave.
        binary_synapses: weights of which the forward pass uses the sign.
        real_parameters: other parameters.
        buffers: bytes of counts and statistics.
        binary_operations: of signs with signs.
        real_operations: of real numbers, with signs or not.
        saved: what its backward pass keeps of the input, in a binary layer bits; in a first layer nothing where its
            weight takes no gradient.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    binary_synapses: int
    real_parameters: int
    buffers: int
    binary_operations: int
    real_operations: int
    saved: int


@dataclass(frozen=True)
class Summary:
    """All layers of a model that have parameters or counts; ``str`` makes a table of it.

    Attributes:
        layers: in the order in which they were called.
        trained: parameters that take a gradient.
        hidden_bytes: real-valued hidden weights.
        sign_bytes: the same as packed signs, which is all that inference needs.
        real_bytes: other parameters.
        gradient_bytes: gradients of the trained parameters; ``fuse_backward`` never holds those of hidden weights.
        state_bytes: moments of :class:`~engram_kernels.MetaplasticAdam` for the trained parameters.
        saved_bytes: what the binary layers keep for backward.
        buffer_bytes: counts and statistics.

    >>> held = ek.summary(ek.BinaryEngramLinear(128, 10, bias=False), torch.zeros(1, 128))
    >>> held.hidden_bytes, held.sign_bytes
    (5120, 160)
    """

    layers: list[LayerSummary] = field(default_factory=list)
    trained: int = 0
    hidden_bytes: int = 0
    sign_bytes: int = 0
    real_bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    saved_bytes: int = 0
    buffer_bytes: int = 0

    @property
    def training_bytes(self) -> int:
        """Of one training step, less activations outside the binary layers."""
        parts = (self.hidden_bytes, self.sign_bytes, self.real_bytes, self.gradient_bytes, self.state_bytes)
        return sum(parts) + self.saved_bytes + self.buffer_bytes

    def __str__(self) -> str:
        """The table."""
        rows = [("layer", "kind", "output", "synapses", "other", "binary ops", "real ops", "kept for backward")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name or "(model)", layer.kind, " x ".join(map(str, layer.output)),
                    f"{layer.binary_synapses:,}", f"{layer.real_parameters:,}", _short(layer.binary_operations),
                    _short(layer.real_operations), _bytes(layer.saved),
                )
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        totals = {
            "hidden weights": self.hidden_bytes,
            "their signs, packed": self.sign_bytes,
            "other parameters": self.real_bytes,
            "gradients": self.gradient_bytes,
            "moments of MetaplasticAdam": self.state_bytes,
            "kept for backward": self.saved_bytes,
            "counts and statistics": self.buffer_bytes,
            "training, in all": self.training_bytes,
        }
        lines.append("")
        lines += [f"{name:<28}{_bytes(value):>12}" for name, value in totals.items() if value]
        return "\n".join(lines)


@torch.no_grad()
def summary(model: nn.Module, x: Tensor, *, state_dtype: torch.dtype = torch.float32) -> Summary:
    """Runs a model once, in evaluation mode, and says what its layers hold and do.

    Args:
        model: left in the mode that it was in.
        x: its input, of the batch size to tell of.
        state_dtype: of MetaplasticAdam's moments: float32, bfloat16 or int8.

    Raises: ValueError for another ``state_dtype``; what the model raises for the input.

    >>> import engram_kernels as ek
    >>> model = ek.EngramMLP((784, 2048, 10))
    >>> ek.summary(model, torch.zeros(100, 784)).sign_bytes
    485376
    """
    if state_dtype not in _STATE_BITS:
        raise ValueError(f"state_dtype: expected float32, bfloat16 or int8, got {state_dtype}")
    called: dict[nn.Module, LayerSummary] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own = _layer_summary(names[module], module, inputs[0], output)
        earlier = called.get(module)
        if earlier is not None:  # called again: it works again, and holds the same
            own = LayerSummary(
                **vars(own)
                | {
                    part: getattr(earlier, part) + getattr(own, part)
                    for part in ("binary_operations", "real_operations", "saved")
                }
            )
        called[module] = own

    hooks = [module.register_forward_hook(note) for module in names if _holds_something(module)]
    modes = {module: module.training for module in names}
    model.eval()
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    parameters = list(model.parameters())
    hidden = [p for p in parameters if isinstance(p, HiddenWeight)]
    trained = [p for p in parameters if p.requires_grad]
    state = sum(
        p.numel() * _STATE_BITS[state_dtype] / 8 if isinstance(p, HiddenWeight) else 2 * p.nbytes for p in trained
    )
    return Summary(
        layers=list(called.values()),
        trained=sum(p.numel() for p in trained),
        hidden_bytes=sum(p.nbytes for p in hidden),
        sign_bytes=sum(p.sign_bits().nbytes for p in hidden),
        real_bytes=sum(p.nbytes for p in parameters) - sum(p.nbytes for p in hidden),
        gradient_bytes=sum(p.nbytes for p in trained),
        state_bytes=round(state),
        saved_bytes=sum(layer.saved for layer in called.values()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _holds_something(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _layer_summary(name: str, module: nn.Module, x: Tensor, output: Tensor) -> LayerSummary:
    own = list(module.parameters(recurse=False))
    hidden = sum(p.numel() for p in own if isinstance(p, HiddenWeight))
    samples = x.numel() // max(1, x.shape[-1])
    binary = real = saved = 0
    words = -(-x.shape[-1] // 128) * 16  # bytes of a packed row
    if isinstance(module, BinaryEngramLinear):
        products = samples * module.in_features * module.out_features
        gates = module.engram is not None
        if module.binary_input:
            binary, saved = products, samples * words * (2 + gates)
        else:
            real, saved = products, x.nbytes * module.weight.requires_grad
    elif isinstance(module, BinaryEngramConv2d):
        products = _products_of_filters(module.weight, x, output)
        if module.binary_input:
            units, kept = math.prod(x.shape[-3:]), 2 + (module.engram is not None)
            binary, saved = products, kept * (x.numel() // units) * 8 * words_for(units)
        else:
            real, saved = products, x.nbytes * module.weight.requires_grad
    elif isinstance(module, nn.Conv2d):
        real, saved = _products_of_filters(module.weight, x, output), x.nbytes
    elif isinstance(module, DendriticReadout):
        binary, saved = samples * hidden, 2 * samples * words
    elif isinstance(module, PrototypeReadout):
        binary = samples * module.in_features * module.num_classes
    elif isinstance(module, RidgeReadout):
        real = samples * module.in_features * module.num_classes
    elif isinstance(module, nn.Linear):
        real, saved = samples * module.in_features * module.out_features, x.nbytes
    return LayerSummary(
        name=name,
        kind=type(module).__name__,
        output=tuple(output.shape),
        binary_synapses=hidden,
        real_parameters=sum(p.numel() for p in own) - hidden,
        buffers=sum(buffer.nbytes for buffer in module.buffers(recurse=False)),
        binary_operations=binary,
        real_operations=real,
        saved=saved,
    )


def _products_of_filters(weight: Tensor, x: Tensor, output: Tensor) -> int:
    """Of every filter at every output pixel, those in the padding among them."""
    return x.numel() // math.prod(x.shape[-3:]) * math.prod(output.shape[-2:]) * weight.numel()


def _short(count: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def _bytes(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
