"""Drop-in layers whose weights and activations are signs, and the paper's network made of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import ops
from .checks import check_flag, check_hidden_dtype, check_number, check_size
from .engrams import Engram, Recruitment
from .hidden_weight import HiddenWeight, as_hidden_weight

_BLOCK_ELEMENTS = 1 << 18  # of a gradient that is consumed block by block
INIT_RANGE = 0.05  # hidden weights start uniform in [-0.05, 0.05] (Laborieux et al. 2021)


def _consume(ctx: Any, update: Callable[..., None]) -> bool:
    """Hands the weight's gradient, in the shape of the ``update`` it makes, to the weight's consumer.

    False if there is none, or if the gradient would not have gone to ``weight.grad`` either, as in torch.autograd.grad.
    """
    consumer = None if ctx.weight is None else ctx.weight.gradient_consumer()
    if consumer is None or not ctx.weight.requires_grad:
        return False
    try:
        accumulates = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError:  # the weight is among the inputs of torch.autograd.grad
        return False
    if accumulates:
        consumer(ctx.weight, update)
    return accumulates


class _BinaryLinear(torch.autograd.Function):
    """Gated product of signs with straight-through gradients; keeps bits only."""

    @staticmethod
    def forward(ctx, x, weight, w_bits, gate_bits, window, consumed):
        x_bits = ops.pack_signs(x)
        mask_bits = ops.pack_window(x, window, gate_bits) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x_bits, w_bits, gate_bits, mask_bits)
        ctx.k, ctx.weight_dtype, ctx.weight = weight.shape[1], weight.dtype, weight if consumed else None
        return ops.binary_matmul(x_bits, w_bits, ctx.k, gate_bits).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        if ctx.weight is not None:
            ctx.weight.refuse_second_gradient()  # before torch finds that the first one has changed w_bits
        x_bits, w_bits, gate_bits, mask_bits = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ops.masked_input_grad(d, w_bits, ctx.k, mask_bits)
        # after dx: the update changes w_bits
        if ctx.needs_input_grad[1] and not _consume(
            ctx, functools.partial(ops.gated_metaplastic_adam_, d, x_bits, gate_bits)
        ):
            dw = ops.gated_weight_grad(d.to(ctx.weight_dtype), x_bits, ctx.k, gate_bits)
        return dx, dw, None, None, None, None


def _real_gradient(d: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``d.T @ x`` in the dtype of ``d``, its factors rounded to ``dtype``."""
    return d.T @ x if dtype is None else (d.T.to(dtype) @ x).to(d.dtype)


def _update_by_blocks(gradient_of_rows, weight, exp_avg, exp_avg_sq, sign_bits, **settings):
    """``ops.metaplastic_adam_`` with a gradient of which only a block of rows exists at a time."""
    scales = {name: settings.pop(name) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        block = slice(first, first + rows)
        own: dict[str, Any] = {name: scale if scale is None else scale[block] for name, scale in scales.items()}
        grad = gradient_of_rows(block).float()
        ops.metaplastic_adam_(
            weight[block], grad, exp_avg[block], exp_avg_sq[block], sign_bits[block], first_row=first, **own, **settings
        )


class _SignLinear(torch.autograd.Function):
    """Product of a real-valued input with signs; keeps the input, which the weight's gradient needs."""

    @staticmethod
    def forward(ctx, x, weight, w_bits, consumed, backward_dtype):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w_bits)
        ctx.backward_dtype = backward_dtype
        ctx.k, ctx.weight_dtype, ctx.weight = weight.shape[1], weight.dtype, weight if consumed else None
        y = ops.sign_matmul_t(x, w_bits, ctx.k)
        return y.float() if x.dtype == torch.uint8 else y

    @staticmethod
    def backward(ctx, d):
        if ctx.weight is not None:
            ctx.weight.refuse_second_gradient()
        x, w_bits = ctx.saved_tensors
        dw = None
        dx = ops.sign_matmul(d, w_bits, ctx.k) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            dtype = ctx.backward_dtype
            x = x.to(d.dtype if dtype is None else dtype)

            def gradient_of_rows(rows: slice) -> Tensor:
                return _real_gradient(d[:, rows], x, dtype)

            if not _consume(ctx, functools.partial(_update_by_blocks, gradient_of_rows)):
                dw = gradient_of_rows(slice(None)).to(ctx.weight_dtype)
        return dx, dw, None, None, None


class CodeProduct(torch.autograd.Function):
    """Product of centred engram codes with signs, ``y[m, n] = sum_k (g[m, k] - rate) s(W[n, k])``; keeps bits only.

    ``apply(x, weight, w_bits, gate_bits, mask_bits, rate, consumed)``: of the excitabilities x (M, K) only the gradient
    counts, which reaches the units of ``mask_bits``; gates one per sample.
    """

    @staticmethod
    def forward(ctx, x, weight, w_bits, gate_bits, mask_bits, rate, consumed):
        """Floats (M, K), hidden weights (N, K), bits (N, words), (M, words), (M, words) -> (M, N)."""
        ctx.save_for_backward(w_bits, gate_bits, mask_bits)
        ctx.k, ctx.rate, ctx.dtype = weight.shape[1], rate, x.dtype
        ctx.weight_dtype, ctx.weight = weight.dtype, weight if consumed else None
        # a recruited unit counts +1: its gate's bit is its sign too
        recruited = ops.binary_matmul(gate_bits, w_bits, ctx.k, gate_bits)
        ones = ops.pack_signs(torch.ones(1, ctx.k, dtype=torch.float32, device=w_bits.device))
        every = ops.binary_matmul(ones, w_bits, ctx.k)
        return recruited.to(x.dtype) - rate * every.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        """Gradients of x, by the mask, and of the hidden weights."""
        if ctx.weight is not None:
            ctx.weight.refuse_second_gradient()
        w_bits, gate_bits, mask_bits = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ops.masked_input_grad(d, w_bits, ctx.k, mask_bits).to(ctx.dtype)
        if ctx.needs_input_grad[1]:

            def gradient_of_rows(rows: slice) -> Tensor:
                own = d[:, rows].float().contiguous()
                return ops.gated_weight_grad(own, gate_bits, ctx.k, gate_bits) - ctx.rate * own.sum(0)[:, None]

            if not _consume(ctx, functools.partial(_update_by_blocks, gradient_of_rows)):
                dw = gradient_of_rows(slice(None)).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None, None


class BinaryEngramLinear(nn.Module):
    """Drop-in for ``nn.Linear`` whose weights and inputs are signs, gated by an engram.

    ``y[m, n] = sum over recruited k of sign(x[m, k]) * sign(weight[n, k])`` (+ bias), sign(0) = +1

    Shapes: input (*, in_features), output (*, out_features) in the input's dtype (float32, bfloat16 or float16).
    ``weight`` is the real-valued hidden weight (Courbariaux et al. 2016), same name and shape as in ``nn.Linear``, so a
    float checkpoint loads; any optimizer works, :class:`~engram_kernels.MetaplasticAdam` updates it by the metaplastic
    rule. Its packed signs are kept between calls and never stale. Gradients are straight-through: the weight's passes
    unchanged, the input's only to recruited units with ``|x| <= ste_window`` (``inf``: to all recruited units).

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: adds a real-valued bias (N,).
        engram: rule that recruits input units, for instance :class:`~engram_kernels.StochasticEngram`; None: all units.
        binary_input: False takes the input as it is, real-valued, as a first layer does; excludes ``engram``. Such a
            layer takes uint8 as well, as images come, and gives float32: exact, and faster.
        ste_window: half-width of the straight-through window, above 0.
        backward_dtype: bfloat16 rounds both factors of the weight gradient of a real-valued input, the one product of
            the backward pass that multiplies, and so uses the processor's bfloat16 units (slow where it has none).
            Excludes ``binary_input``, whose products are sums.
        device: of the parameters.
        dtype: of the parameters: float32, bfloat16 or float16.

    Raises: TypeError for an argument of another type; ValueError for sizes below 1, a window of 0 or less, an engram on
    a real-valued input, or a dtype that is not supported; RuntimeError if the input's last dimension is not
    ``in_features``, its dtype is not one of the three, or it contains NaN.
    """

    weight: HiddenWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        engram: Engram | None = None,
        binary_input: bool = True,
        ste_window: float = 1.0,
        backward_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.binary_input = check_flag("binary_input", binary_input)
        self.ste_window = check_number("ste_window", ste_window, "above 0", above=0.0, infinite=True)
        check_flag("bias", bias)
        if engram is not None and not isinstance(engram, Engram):
            raise TypeError(f"engram: expected an engram such as StochasticEngram(0.1), or None, got {engram!r}")
        dtype = check_hidden_dtype(dtype)
        if engram is not None and not binary_input:
            raise ValueError("engram: expected None with binary_input=False, since a gate recruits binary units")
        if backward_dtype not in (None, torch.bfloat16) or (backward_dtype is not None and binary_input):
            raise ValueError(
                f"backward_dtype: expected None, or torch.bfloat16 with binary_input=False, got {backward_dtype}"
            )
        self.backward_dtype = backward_dtype
        self.engram = engram
        self.weight = HiddenWeight(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden weights uniform in [-0.05, 0.05], bias 0."""
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Makes whatever is assigned to ``weight`` a hidden weight."""
        super().register_parameter(name, as_hidden_weight(param) if name == "weight" and param is not None else param)

    def _apply(self, fn, recurse=True):
        """Moves and converts like any module; torch may make a plain parameter of the weight on the way."""
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")  # pruning and parametrization keep it elsewhere
        if weight is not None:
            self._parameters["weight"] = as_hidden_weight(weight)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Floats (*, in_features) -> (*, out_features)."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise RuntimeError(f"input: expected shape (*, {self.in_features}), got {tuple(x.shape)}")
        if type(self.weight) is nn.Parameter:  # swapped in past every hook
            as_hidden_weight(self.weight)
        weight = self.weight
        # a plain tensor stands here under torch.func.functional_call
        w_bits = weight.sign_bits() if isinstance(weight, HiddenWeight) else ops.pack_signs(weight.detach())
        consumed = isinstance(weight, HiddenWeight) and weight.gradient_consumer() is not None
        rows = x.reshape(-1, self.in_features)
        if self.binary_input:
            gate_bits, scale = Recruitment(None) if self.engram is None else self.engram(rows)
            y = _BinaryLinear.apply(rows, weight, w_bits, gate_bits, self.ste_window, consumed)
            if scale != 1.0:
                y = y * scale
        else:
            y = _SignLinear.apply(rows, weight, w_bits, consumed, self.backward_dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.binary_input else text + ", binary_input=False"


class EngramMLP(nn.Module):
    """The paper's network: fully connected, binary, with an engram in every layer after the first.

    ``z_1 = norm(x s(W_1)^T)``, ``z_i = norm((g_i * s(z_{i-1})) s(W_i)^T)``, and in the last layer
    ``logits = logit_scale (g * s(z)) s(W)^T / sqrt(recruited units)``. ``norm`` standardises each sample over its units
    (LayerNorm without parameters): no statistics of a batch are used or kept, in training or at test.

    Args:
        sizes: units per layer, input and output included.
        engram: one rule for all layers after the first, or None for no gates. A module; it is shared, since rules keep
            no state per layer.
        train_hidden: False leaves all but the last layer as initialised: fixed random features.
        ste_window: see :class:`BinaryEngramLinear`. The units that a sparse engram recruits by excitability lie far
            outside ``|z| <= 1``: use ``inf`` there.
        logit_scale: softness of the softmax that follows, above 0; 1 gives untrained logits unit variance.
        backward_dtype: of the first layer, see :class:`BinaryEngramLinear`.
        balanced: see :func:`balance_`; of the hidden layers.
        readout: takes the place of the last layer: a module from normalised pre-activations (M, sizes[-2]) to logits
            (M, sizes[-1]), such as :class:`~engram_kernels.DendriticReadout`; ``logit_scale`` is not applied to it.

    Shapes: floats (M, sizes[0]) -> logits (M, sizes[-1]).
    Raises: TypeError for an argument of another type; ValueError for fewer than two sizes, a size below 1 or a scale of
    0 or less.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 2048, 2048, 10),
        *,
        engram: Engram | None = None,
        train_hidden: bool = True,
        ste_window: float = 1.0,
        logit_scale: float = 1.0,
        backward_dtype: torch.dtype | None = None,
        balanced: bool = False,
        readout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_flag("train_hidden", train_hidden)
        check_flag("balanced", balanced)
        if not isinstance(sizes, Sequence) or isinstance(sizes, str):
            raise TypeError(f"sizes: expected a sequence of integers, got {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least an input and an output size, got {tuple(sizes)}")
        for size in sizes:
            check_size("sizes", size)
        if readout is not None and not isinstance(readout, nn.Module):
            raise TypeError(f"readout: expected a module such as DendriticReadout, or None, got {readout!r}")
        self.engram = engram
        self.logit_scale = check_number("logit_scale", logit_scale, "a finite number above 0", above=0.0)
        self.layers = nn.ModuleList(
            BinaryEngramLinear(
                k,
                n,
                binary_input=i > 0,
                engram=engram if i > 0 else None,
                ste_window=ste_window,
                backward_dtype=backward_dtype if i == 0 else None,
            )
            for i, (k, n) in enumerate(pairwise(sizes if readout is None else sizes[:-1]))
        )
        self.readout = readout
        self.hidden_layers = len(sizes) - 2
        for layer in self.layers[: self.hidden_layers]:
            layer.requires_grad_(train_hidden)
            if balanced:
                balance_(layer.weight)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Floats (M, sizes[0]) -> normalised pre-activations of the last hidden layer (M, sizes[-2])."""
        for layer in self.layers[: self.hidden_layers]:
            x = layer(x)
            x = nn.functional.layer_norm(x, x.shape[-1:])
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Floats (M, features) -> logits (M, classes)."""
        x = self.features(x)
        if self.readout is not None:
            return self.readout(x)
        k = x.shape[-1]
        recruited = k if self.engram is None else self.engram.recruited(k)
        return self.layers[-1](x) * (self.logit_scale / math.sqrt(recruited))


@torch.no_grad()
def balance_(weight: Tensor) -> None:
    """Gives each unit of ``weight`` (N, K), in place, as many negative signs as others (one fewer where K is odd).

    Magnitudes stay; which synapses are negative is drawn from torch's generator. Without it the units that happen to
    have more positive signs are the most excitable ones for every input whose mean is not 0.
    """
    k = weight.shape[1]
    for rows in weight.split(256):  # the order of a draw takes 8 bytes a synapse
        negative = torch.rand(rows.shape, dtype=torch.float32, device=rows.device).argsort(dim=1) < k // 2
        rows.copy_(torch.where(negative, -rows.abs(), rows.abs()))
