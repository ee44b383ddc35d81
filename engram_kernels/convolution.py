"""The binary convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .autograd import BiasSum, GatedSignConvolution, SignConvolution, image_sign_bits
from .checks import check_flag, check_hidden_dtype, check_number, check_size
from .engrams import Engram
from .fused_backward import gradient_consumer
from .hidden_weight import HiddenWeight
from .layers import INIT_RANGE, HiddenWeightModule
from .reference import Window

_GATES = ("channels", "units")
_Pair = int | tuple[int, int]


class BinaryEngramConv2d(HiddenWeightModule):
    """Drop-in for ``nn.Conv2d`` whose filters and inputs are signs, gated by an engram.

    ``y[b, n, p] = sum over taps t inside the image and recruited channels c of sign(x[b, c, p + t]) * sign(weight[n, c,
    t]) / sqrt(recruited)`` (+ bias), sign(0) = +1. Padding is 0, neither +1 nor -1: it counts nothing.

    Shapes: input (B, C, height, width) or (C, height, width), output as of ``nn.Conv2d``, in the input's dtype
    (float32, bfloat16 or float16) and channels last in memory, which is the fastest layout for what follows. ``weight``
    is the hidden weight (O, C / groups, kernel_h, kernel_w), so that a float checkpoint loads; it lies channels last.
    Any optimizer works; :class:`~engram_kernels.MetaplasticAdam` updates it by the metaplastic rule. For the backward
    pass only bits are kept. Gradients are those of :class:`~engram_kernels.BinaryEngramLinear`.

    The engram recruits ``"channels"``, by their mean over the image, for all pixels of a sample alike; or ``"units"``,
    each pixel of each channel by itself, in the order (row, column, channel).

    Outputs and gradients do not depend on the number of threads. With ``binary_input=False`` they are torch's own
    products, and may.

    Args:
        in_channels: C, at least 1 and a multiple of ``groups``.
        out_channels: O, at least 1 and a multiple of ``groups``.
        kernel_size: one number, or (height, width), each at least 1.
        stride: likewise.
        padding: likewise, at least 0; or "valid", none; or "same", for outputs as large as inputs (stride 1 only).
        dilation: likewise, at least 1.
        groups: each sees C / groups channels and makes O / groups outputs.
        bias: adds a real-valued bias (O,).
        padding_mode: "zeros", the only one.
        scaled: divides the sums by the square root of the units that a pixel inside the image recruits; False leaves
            the integers, as before a norm.
        engram: rule that recruits, for instance :class:`~engram_kernels.StochasticEngram`; None: every unit.
        gates: what it recruits: "channels" or "units".
        binary_input: False takes the input as it is, real-valued, as a first layer does; excludes ``engram``. Such a
            layer takes uint8 as well, as images come, and gives float32.
        ste_window: half-width of the straight-through window, above 0.
        device: of the parameters.
        dtype: of the parameters: float32, bfloat16 or float16.

    Raises: TypeError for an argument of another type; ValueError for one out of range, a padding mode other than zeros,
    or an engram on a real-valued input; RuntimeError for an input of another shape or dtype, one smaller than the
    kernel, or NaN, and for a computed weight with zeros.

    >>> layer = ek.BinaryEngramConv2d(1, 1, 3, padding=1, bias=False, scaled=False)
    >>> _ = layer.load_state_dict({"weight": torch.full((1, 1, 3, 3), 0.1)})
    >>> layer(torch.ones(1, 1, 3, 3))[0, 0].tolist()  # a corner sees four pixels
    [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """

    weight_dims = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        scaled: bool = True,
        engram: Engram | None = None,
        gates: str = "channels",
        binary_input: bool = True,
        ste_window: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = check_size("in_channels", in_channels)
        self.out_channels = check_size("out_channels", out_channels)
        self.groups = check_size("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: expected a multiple of {groups} groups, got {channels}")
        self.kernel_size = _pair("kernel_size", kernel_size)
        self.stride = _pair("stride", stride)
        self.dilation = _pair("dilation", dilation)
        self.padding = padding if isinstance(padding, str) else _pair("padding", padding, least=0)
        self._sides = self._padding_of_sides()
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {padding_mode!r}")
        self.padding_mode = padding_mode
        self.scaled = check_flag("scaled", scaled)
        self.binary_input = check_flag("binary_input", binary_input)
        self.ste_window = check_number("ste_window", ste_window, "above 0", above=0.0, infinite=True)
        check_flag("bias", bias)
        if engram is not None and not isinstance(engram, Engram):
            raise TypeError(f"engram: expected an engram such as StochasticEngram(0.1), or None, got {engram!r}")
        if engram is not None and not binary_input:
            raise ValueError("engram: expected None with binary_input=False, since a gate recruits binary units")
        if gates not in _GATES:
            raise ValueError(f"gates: expected 'channels' or 'units', got {gates!r}")
        dtype = check_hidden_dtype(dtype)
        self.engram, self.gates = engram, gates
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = HiddenWeight(torch.empty(shape, device=device, dtype=dtype, memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden weights uniform in [-0.05, 0.05], bias 0."""
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def window(self, height: int, width: int) -> Window:
        """The window of this layer on images of a size.

        Raises: RuntimeError for images smaller than the kernel, or with more units than 2^31 - 1.
        """
        top, bottom, left, right = self._sides
        return Window(
            height, width, self.in_channels, *self.kernel_size, *self.stride, top, bottom, left, right, *self.dilation,
            self.groups,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width) -> (B, O, out_height, out_width); one image likewise without B."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            expected = f"shape (B, {self.in_channels}, height, width) or ({self.in_channels}, height, width)"
            raise RuntimeError(f"input: expected {expected}, got {tuple(x.shape)}")
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        weight, w_bits = self.signed_weight()
        consumed = gradient_consumer(weight) is not None
        window = self.window(x.shape[2], x.shape[3])
        scale = 1.0
        if self.binary_input:
            gate_bits, scale, share = self._recruit(x, window)
        if self.scaled:
            scale /= math.sqrt(window.group_units * (share if self.binary_input else 1.0))
        if self.binary_input:
            x_bits = image_sign_bits(x.detach())
            y = GatedSignConvolution.apply(
                x, weight, x_bits, w_bits, gate_bits, window, scale, self.ste_window, consumed
            )
        else:
            x = x.float() if x.dtype == torch.uint8 else x
            y = SignConvolution.apply(x, weight, w_bits, window, scale, consumed)
        if self.bias is not None:
            rows = BiasSum.apply(y.permute(0, 2, 3, 1).flatten(0, 2), self.bias)
            y = rows.unflatten(0, (y.shape[0], y.shape[2], y.shape[3])).permute(0, 3, 1, 2)
        return y

    def _recruit(self, x: Tensor, window: Window) -> tuple[Tensor | None, float, float]:
        """Gates over the units of a sample, (words,) or (B, words); the engram's scale; the share that it recruits."""
        if self.engram is None:
            return None, 1.0, 1.0
        by_channel = self.gates == "channels"
        scores = x.detach().mean(dim=(2, 3)) if by_channel else x.detach().permute(0, 2, 3, 1).flatten(1)
        gate_bits, scale = self.engram(scores)
        if gate_bits is not None and by_channel:
            gate_bits = _for_all_pixels(gate_bits, window)
        return gate_bits, scale, self.engram.recruited(scores.shape[1]) / scores.shape[1]

    def _padding_of_sides(self) -> tuple[int, int, int, int]:
        """Top, bottom, left and right; "same" puts an odd one below and to the right, as torch does."""
        if isinstance(self.padding, tuple):
            (height, width) = self.padding
            return height, height, width, width
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding != "same":
            raise ValueError(f"padding: expected a number, two of them, 'valid' or 'same', got {self.padding!r}")
        if self.stride != (1, 1):
            raise ValueError(f"padding: expected a number or 'valid' with stride {self.stride}, got 'same'")
        height, width = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return height // 2, height - height // 2, width // 2, width - width // 2

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults: dict[str, Any] = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "scaled": True}
        defaults |= {"binary_input": True, "gates": "channels"}
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        text += "".join(f", {name}={value!r}" for name, value in changed.items())
        return text if self.bias is not None else text + ", bias=False"


def _pair(name: str, value: Any, least: int = 1) -> tuple[int, int]:
    """One number for both axes, or one for each. Raises: TypeError, ValueError."""
    both = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not (isinstance(both, (tuple, list)) and len(both) == 2 and all(type(number) is int for number in both)):
        raise TypeError(f"{name}: expected a whole number or two of them, got {value!r}")
    if min(both) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return both[0], both[1]


def _for_all_pixels(gate_bits: Tensor, window: Window) -> Tensor:
    """Gates over channels, (words,) or (B, words), as gates over the units of a sample."""
    repeated = Window(1, 1, window.channels, window.height, window.width, dilation_h=0, dilation_w=0)
    if gate_bits.dim() == 1:
        return ops.unfold_bits(gate_bits.unsqueeze(0), repeated).squeeze(0)
    return ops.unfold_bits(gate_bits, repeated)
