"""The layers' gradients: straight-through, kept in bits, handed to an optimizer that consumes them where one asks.

The functions have a ``setup_context`` and rules for ``torch.vmap``, so that torch.func's grad, jacrev and vmap take
them. None has a second derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from . import ops
from .fused_backward import LayerGradient, gradient_consumer
from .hidden_weight import HiddenWeight, from_rows, rows_of
from .library import operators
from .reference import Window, words_for

_BLOCK_ELEMENTS = 1 << 18  # of a gradient that is consumed block by block
_BLOCK_SAMPLES = 128  # of a sum over samples


def _transformed() -> bool:
    """Whether torch.func or torch.compile runs the code, which take what they have rules for."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


class _Function(torch.autograd.Function):
    """An autograd function with rules for ``torch.vmap``, without what torch's ``apply`` costs at every call."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *arguments):
        """As in torch, which inspects the signature of ``forward`` first to fill in default values.

        That takes as long as the rest of a small layer.
        """
        if _transformed():
            return super().apply(*arguments)
        unwrap = torch._C._functorch.unwrap_if_dead
        alive = [unwrap(a) if type(a) is Tensor else a for a in arguments]  # what wraps a tensor is a plain one
        return super(torch.autograd.Function, cls).apply(*alive)  # type: ignore[misc]


class _FirstDerivative(_Function):
    """A gradient as it is, that refuses to be differentiated."""

    @staticmethod
    def forward(gradient, d):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "backward: expected a first derivative of a binary layer, got a second one; the straight-through gradient "
            "stands in for the derivative of a sign and has none itself, so a penalty on gradients (create_graph=True) "
            "or a Hessian cannot pass through the layer"
        )


def _first_derivatives(d: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """``gradients``, which depend on ``d``; a second derivative of them is an error."""
    if not torch.is_grad_enabled():  # without create_graph=True
        return gradients
    return tuple(None if gradient is None else _FirstDerivative.apply(gradient, d) for gradient in gradients)


def _remember(ctx: Any, k: int, weight: Tensor, consumed: bool) -> None:
    """Keeps what the gradients need to know of ``weight`` (N, K), which takes longer to tell its K than its caller."""
    with torch._C.DisableTorchFunctionSubclass():  # which takes longer to tell this, too
        ctx.k, ctx.weight_dtype = k, weight.dtype
    ctx.weight = weight if consumed else None


def _refuse_second_gradient(weight: HiddenWeight | None) -> None:
    """Before torch finds that the first gradient, consumed by now, has changed the bits."""
    if weight is not None:
        weight.fused_backward.refuse_second_gradient()  # type: ignore[union-attr]


def _consume(ctx: Any, update: Callable[..., None]) -> bool:
    """Hands the weight's gradient, in the shape of the ``update`` it makes, to the weight's consumer.

    False if there is none, or if the gradient would not have gone to ``weight.grad`` either, as in torch.autograd.grad.
    """
    if ctx.weight is None:
        return False
    with torch._C.DisableTorchFunctionSubclass():  # hidden weights answer slowly, and what is asked here is known
        consumer = gradient_consumer(ctx.weight) if ctx.weight.requires_grad else None
        if consumer is None:
            return False
        try:
            accumulates = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
        except RuntimeError:  # the weight is among the inputs of torch.autograd.grad
            return False
        if accumulates:
            consumer(ctx.weight, update)
    return accumulates


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


def _product_over_samples(d: Tensor, x: Tensor) -> Tensor:
    """``d.T @ x`` with factors rounded to the dtype of x: (M, N), (M, K) -> (N, K) in the dtype of d.

    A block of samples at a time: sums over more BLAS shares out among threads, whose number would show in the result.
    """
    if torch.compiler.is_compiling() or d.shape[0] <= _BLOCK_SAMPLES:
        return (d.T.to(x.dtype) @ x).to(d.dtype)
    blocks = zip(d.split(_BLOCK_SAMPLES), x.split(_BLOCK_SAMPLES), strict=True)
    return functools.reduce(Tensor.add_, ((own.T.to(x.dtype) @ part).float() for own, part in blocks)).to(d.dtype)


def sum_over_samples(d: Tensor) -> Tensor:
    """Floats (M, N) -> (N, 1). The bits of torch's sum depend on the number of threads; those of the kernel do not."""
    if d.shape[0] == 1:
        return d.T
    plus = torch.ones(d.shape[0], words_for(1), dtype=torch.int64, device=d.device)  # bit 0: the sign of one unit
    return ops.gated_weight_grad(d, plus, 1)


class BiasSum(_Function):
    """``apply(y, bias)``: ``y + bias``, floats (M, N), (N,) -> (M, N)."""

    @staticmethod
    def forward(y, bias):
        """The sum."""
        return y + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps nothing."""
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, d):
        """Gradients of y and of the bias."""
        db = sum_over_samples(d.detach()).squeeze(1).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return (d, *_first_derivatives(d, db))


def _scaled_and_shifted(sums: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """``scale sums + bias``: floats (M, N), (N,) -> (M, N)."""
    y = sums if scale == 1.0 else sums * scale
    return y if bias is None else y + bias


def _remember_scale(ctx: Any, x: Tensor, scale: float, bias: Tensor | None) -> None:
    """Keeps what the gradients through :func:`_scaled_and_shifted` need to know."""
    ctx.scale = scale
    ctx.sums_dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _in_one_call(x: Tensor, bias_dtype: torch.dtype | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the operators of whole layers take such an x and others: float32 on the CPU, in eager code."""
    float32 = torch.float32
    if x.dtype != float32 or dtype != float32 or not (bias_dtype is None or bias_dtype == float32):
        return False
    return x.is_cpu and not _transformed()


def _layer_grad(
    ctx: Any,
    d: Tensor,
    needs_bias: bool,
    w_bits: Tensor | None = None,
    mask_bits: Tensor | None = None,
    x: Tensor | None = None,
    gate_bits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the sums (M, N), of the bias (N,), of x where it has a mask, of the weight where there is an x.

    ``x`` is packed, or float32 where all is.
    """
    if ctx.sums_dtype == torch.float32 and _in_one_call(d, ctx.bias_dtype, ctx.weight_dtype):
        own, db, dx, dw = operators._layer_grad(d, ctx.scale, needs_bias, ctx.k, w_bits, mask_bits, x, gate_bits)
        return d if own is None else own, db, dx, dw
    db = sum_over_samples(d).squeeze(1).to(ctx.bias_dtype) if needs_bias else None
    own = d if d.dtype == ctx.sums_dtype else d.to(ctx.sums_dtype)
    own = own if ctx.scale == 1.0 else own * ctx.scale
    dx = None if mask_bits is None else ops.masked_input_grad(own, w_bits, ctx.k, mask_bits)  # type: ignore[arg-type]
    if x is None:
        return own, db, dx, None
    if x.dtype == torch.int64:
        return own, db, dx, ops.gated_weight_grad(own.to(ctx.weight_dtype), x, ctx.k, gate_bits)
    return own, db, dx, ops.real_weight_grad(own, x).to(ctx.weight_dtype)


def _undifferentiated(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """An operator that is differentiable by itself, called past that, which takes it longer than a small product."""
    if _transformed():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def gated_sign_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_bits: Tensor,
    gate_bits: Tensor | None,
    window: float,
    scale: float,
    consumed: bool,
) -> Tensor:
    """:class:`GatedSignProduct` of the signs of x."""
    one_call = _in_one_call(x, None if bias is None else bias.dtype)
    x_bits: Tensor | list[Tensor] = [] if one_call else ops.pack_signs(x.detach())
    return GatedSignProduct.apply(x, weight, bias, x_bits, w_bits, gate_bits, window, scale, consumed)


class GatedSignProduct(_Function):
    """Gated product of signs, ``y[m, n] = scale sum_k g[m, k] s(x[m, k]) s(W[n, k]) + bias[n]``; keeps bits only.

    ``apply(x, weight, bias, x_bits, w_bits, gate_bits, window, scale, consumed)``: floats (M, K) and hidden weights
    (N, K), of which only the gradients count, bias (N,) or None, and their bits -> (M, N) in the dtype of x. An empty
    list in place of ``x_bits`` takes those that the call which makes the product makes too. The gradient of x reaches
    recruited units with ``|x| <= window``. ``consumed``: the weight has a consumer of its gradient. Scale and bias are
    part of the function, since each function of its own costs as much as a small product.
    """

    @staticmethod
    def forward(x, weight, bias, x_bits, w_bits, gate_bits, window, scale, consumed):
        """The product."""
        if isinstance(x_bits, Tensor):
            sums = ops.binary_matmul(x_bits, w_bits, x.shape[1], gate_bits)
            return _scaled_and_shifted(sums.to(x.dtype), scale, bias)
        masked = x.requires_grad and not _gate_is_mask(gate_bits, window)
        y, *made = operators._layer(x, w_bits, gate_bits, bias, scale, True, window if masked else None)
        x_bits += made
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the bits, and the window as one more of them."""
        x, weight, bias, x_bits, w_bits, gate_bits, window, scale, consumed = inputs
        mask_bits = None
        if not isinstance(x_bits, Tensor):
            x_bits, mask_bits = x_bits
        if ctx.needs_input_grad[0] and mask_bits is None:
            unbounded = _gate_is_mask(gate_bits, window)
            mask_bits = gate_bits if unbounded else ops.pack_window(x.detach(), window, gate_bits)
        ctx.save_for_backward(x_bits, w_bits, gate_bits, mask_bits)
        _remember(ctx, x.shape[1], weight, consumed)
        _remember_scale(ctx, x, scale, bias)

    @staticmethod
    def backward(ctx, d):
        """Gradients of x, of the hidden weights, straight-through, and of the bias."""
        _refuse_second_gradient(ctx.weight)
        x_bits, w_bits, gate_bits, mask_bits = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        may_be_consumed = needs_weight and ctx.weight is not None
        own, db, dx, dw = _layer_grad(
            ctx,
            d.detach(),
            needs_bias,
            w_bits,
            mask_bits if needs_x else None,
            x_bits if needs_weight and not may_be_consumed else None,
            gate_bits,
        )
        # after dx: the update changes w_bits
        if may_be_consumed and not _consume(ctx, LayerGradient(own, x_bits, gate_bits)):
            dw = ops.gated_weight_grad(own.to(ctx.weight_dtype), x_bits, ctx.k, gate_bits)
        return (*_first_derivatives(d, dx, dw, db), None, None, None, None, None, None)


def _gate_is_mask(gate_bits: Tensor | None, window: float) -> bool:
    """Whether the gradient of x passes the gate alone."""
    return gate_bits is not None and window == math.inf


class SignProduct(_Function):
    """Product of a real-valued input with signs, ``scale x s(W)^T + bias``; keeps the input for the weight's gradient.

    ``apply(x, weight, bias, w_bits, scale, consumed, backward_dtype)``: floats or uint8 (M, K), hidden weights (N, K),
    of which only the gradient counts, bias (N,) or None, and the weight's bits -> (M, N). ``backward_dtype`` is that of
    :class:`~engram_kernels.BinaryEngramLinear`.
    """

    @staticmethod
    def forward(x, weight, bias, w_bits, scale, consumed, backward_dtype):
        """The product."""
        if _in_one_call(x, None if bias is None else bias.dtype):
            return operators._layer(x, w_bits, None, bias, scale, False, None)[0]
        sums = _undifferentiated(ops.sign_matmul_t, x, w_bits, x.shape[1])
        return _scaled_and_shifted(sums.float() if x.dtype == torch.uint8 else sums, scale, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the input where the weight learns."""
        x, weight, bias, w_bits, scale, consumed, ctx.backward_dtype = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w_bits)
        _remember(ctx, x.shape[1], weight, consumed)
        _remember_scale(ctx, x, scale, bias)

    @staticmethod
    def backward(ctx, d):
        """Gradients of x, of the hidden weights and of the bias."""
        _refuse_second_gradient(ctx.weight)
        x, w_bits = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if needs_weight:
            dtype = ctx.backward_dtype
            x = x.detach().to(ctx.sums_dtype if dtype is None else dtype)
        in_float32 = needs_weight and ctx.sums_dtype == x.dtype == torch.float32
        may_be_consumed = needs_weight and ctx.weight is not None
        own, db, _, dw = _layer_grad(ctx, d.detach(), needs_bias, x=x if in_float32 and not may_be_consumed else None)
        dx = None
        if needs_x:
            dx = _undifferentiated(ops.sign_matmul, own, w_bits, ctx.k)
        if in_float32:
            if may_be_consumed and not _consume(ctx, LayerGradient(own, x)):
                dw = ops.real_weight_grad(own, x).to(ctx.weight_dtype)
        elif needs_weight:

            def gradient_of_rows(rows: slice) -> Tensor:
                return _product_over_samples(own[:, rows], x)

            if not _consume(ctx, functools.partial(_update_by_blocks, gradient_of_rows)):
                dw = gradient_of_rows(slice(None)).to(ctx.weight_dtype)
        return (*_first_derivatives(d, dx, dw, db), None, None, None, None)


def image_sign_bits(x: Tensor) -> Tensor:
    """Signs of images (B, C, height, width), packed pixel by pixel: bits (B, words of units)."""
    if _channels_first(x):
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        return ops.interleave_bits(ops.pack_signs(x.reshape(-1, pixels)), channels, pixels)
    return ops.pack_signs(x.permute(0, 2, 3, 1).flatten(1))


def _image_window_bits(x: Tensor, window: float, gate_bits: Tensor | None) -> Tensor:
    """:func:`ops.pack_window` of images, as :func:`image_sign_bits` packs them."""
    if _channels_first(x):
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        bits = ops.interleave_bits(ops.pack_window(x.reshape(-1, pixels), window), channels, pixels)
        return bits if gate_bits is None else bits & gate_bits
    return ops.pack_window(x.permute(0, 2, 3, 1).flatten(1), window, gate_bits)


def _channels_first(x: Tensor) -> bool:
    """Whether to transpose bits, where transposing numbers would write them once more."""
    return x.is_contiguous() and not x.is_cuda


class GatedSignConvolution(_Function):
    """Gated convolution of signs, padded by 0; keeps bits only.

    ``apply(x, weight, x_bits, w_bits, gate_bits, window, scale, ste_window, consumed)``: images (B, C, height, width)
    and filters (O, C / groups, kernel_h, kernel_w), of which only the gradients count, and their bits -> ``scale``
    times the sums (B, O, out_height, out_width) in the dtype of x, channels last. ``window`` is a
    :class:`~engram_kernels.reference.Window`; the gradient of x reaches recruited units with ``|x| <= ste_window``.
    """

    @staticmethod
    def forward(x, weight, x_bits, w_bits, gate_bits, window, scale, ste_window, consumed):
        """The convolution."""
        return ops.binary_conv2d(x_bits, w_bits, window, gate_bits, scale).permute(0, 3, 1, 2).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the bits, and the window of the gradient as one more of them."""
        x, weight, x_bits, w_bits, gate_bits, ctx.window, ctx.scale, ste_window, consumed = inputs
        mask_bits = _image_window_bits(x.detach(), ste_window, gate_bits) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x_bits, w_bits, gate_bits, mask_bits)
        _remember(ctx, weight.shape[1], weight, consumed)
        ctx.weight_shape = weight.shape

    @staticmethod
    def backward(ctx, d):
        """Gradients of x and of the filters, straight-through."""
        _refuse_second_gradient(ctx.weight)
        x_bits, w_bits, gate_bits, mask_bits = ctx.saved_tensors
        own = d.detach().permute(0, 2, 3, 1)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ops.masked_conv2d_input_grad(own, w_bits, ctx.window, mask_bits, ctx.scale).permute(0, 3, 1, 2)
        # after dx: the update changes w_bits
        if ctx.needs_input_grad[1]:
            rows = ops.gated_conv2d_weight_grad(own.to(ctx.weight_dtype), x_bits, ctx.window, gate_bits, ctx.scale)
            dw = _give_filters(ctx, rows)
        return (*_first_derivatives(d, dx, dw), *[None] * 7)


def _give_filters(ctx: Any, rows: Tensor) -> Tensor | None:
    """The gradient (O, K) of filters for ``weight.grad``; None where the weight's consumer took it."""
    if _consume(ctx, functools.partial(_update_whole, rows)):
        return None
    return from_rows(rows, ctx.weight_shape)


def _update_whole(grad, weight, *state, **settings):
    ops.metaplastic_adam_(weight, grad, *state, **settings)


class SignConvolution(_Function):
    """Convolution of real-valued images with signs; keeps the images, which the gradient of the filters needs.

    ``apply(x, weight, w_bits, window, scale, consumed)``: as in :class:`GatedSignConvolution`. By torch's convolutions,
    for a first layer has few channels and costs little.
    """

    @staticmethod
    def forward(x, weight, w_bits, window, scale, consumed):
        """The convolution, scaled after its sums, which are exact where the images hold integers."""
        y = sign_convolution(x, w_bits, window)
        return y if scale == 1.0 else y.mul_(scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the images where the filters learn."""
        x, weight, w_bits, ctx.window, ctx.scale, consumed = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w_bits)
        _remember(ctx, weight.shape[1], weight, consumed)
        ctx.weight_shape = weight.shape

    @staticmethod
    def backward(ctx, d):
        """Gradients of x and of the filters."""
        _refuse_second_gradient(ctx.weight)
        x, w_bits = ctx.saved_tensors
        own, w = d.detach(), ctx.window
        dx = dw = None
        if ctx.needs_input_grad[0]:
            shape = (d.shape[0], w.channels, w.height + w.top + w.bottom, w.width + w.left + w.right)
            signs = _signs(w_bits, ctx.weight_shape, d.dtype) * ctx.scale
            padded = conv2d_input(shape, signs, own, **_steps(w))
            dx = padded[:, :, w.top : w.top + w.height, w.left : w.left + w.width]
        if ctx.needs_input_grad[1]:
            grad = conv2d_weight(_padded(x.detach(), w), ctx.weight_shape, own, **_steps(w)) * ctx.scale
            dw = _give_filters(ctx, rows_of(grad.to(ctx.weight_dtype)).contiguous())
        return (*_first_derivatives(d, dx, dw), None, None, None, None)


def sign_convolution(x: Tensor, w_bits: Tensor, window: Window) -> Tensor:
    """Images (B, C, height, width) with filters, packed signs (O, words of K): torch's convolution."""
    w = window
    signs = _signs(w_bits, torch.Size((w_bits.shape[0], w.channels // w.groups, w.kernel_h, w.kernel_w)), x.dtype)
    return nn.functional.conv2d(_padded(x, w), signs, **_steps(w))


def _padded(x: Tensor, window: Window) -> Tensor:
    return nn.functional.pad(x, (window.left, window.right, window.top, window.bottom))


def _signs(w_bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return from_rows(ops.unpack_signs(w_bits, math.prod(shape[1:]), dtype), shape)


def _steps(window: Window) -> dict[str, Any]:
    return {
        "stride": (window.stride_h, window.stride_w),
        "dilation": (window.dilation_h, window.dilation_w),
        "groups": window.groups,
    }


class Standardisation(_Function):
    """``apply(y, eps)``: :func:`engram_kernels.ops.standardise`, floats (M, N) -> (M, N) and the moments (M, 2)."""

    @staticmethod
    def forward(y, eps):
        """The result, and what its gradient needs."""
        return ops.standardise(y, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the input and the moments."""
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, d, _):
        """The gradient of y."""
        dy = ops.standardise_grad(d.detach(), *ctx.saved_tensors)
        return (*_first_derivatives(d, dy), None)


class CodeProduct(_Function):
    """Product of centred engram codes with signs, ``y[m, n] = sum_k (g[m, k] - rate) s(W[n, k])``; keeps bits only.

    ``apply(x, weight, w_bits, gate_bits, mask_bits, rate, consumed)``: of the excitabilities x (M, K) and the hidden
    weights (N, K) only the gradients count; that of x reaches the units of ``mask_bits``, or of the gate where that is
    None. Bits (N, words), (M, words), (M, words) -> (M, N) in the dtype of x.
    """

    @staticmethod
    def forward(x, weight, w_bits, gate_bits, mask_bits, rate, consumed):
        """The product."""
        k = x.shape[1]
        # a recruited unit counts +1: its gate's bit is its sign too
        recruited = ops.binary_matmul(gate_bits, w_bits, k, gate_bits)
        ones = ops.pack_signs(torch.ones(1, k, dtype=torch.float32, device=w_bits.device))
        every = ops.binary_matmul(ones, w_bits, k)
        return recruited.to(x.dtype) - rate * every.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the bits."""
        x, weight, w_bits, gate_bits, mask_bits, ctx.rate, consumed = inputs
        ctx.save_for_backward(w_bits, gate_bits, mask_bits)
        ctx.dtype = x.dtype
        _remember(ctx, x.shape[1], weight, consumed)

    @staticmethod
    def backward(ctx, d):
        """Gradients of x, by the mask, and of the hidden weights."""
        _refuse_second_gradient(ctx.weight)
        w_bits, gate_bits, mask_bits = ctx.saved_tensors
        mask_bits = gate_bits if mask_bits is None else mask_bits
        own = d.detach()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ops.masked_input_grad(own, w_bits, ctx.k, mask_bits).to(ctx.dtype)
        if ctx.needs_input_grad[1]:

            def gradient_of_rows(rows: slice) -> Tensor:
                block = own[:, rows].float().contiguous()
                return ops.gated_weight_grad(block, gate_bits, ctx.k, gate_bits) - ctx.rate * sum_over_samples(block)

            if not _consume(ctx, functools.partial(_update_by_blocks, gradient_of_rows)):
                dw = gradient_of_rows(slice(None)).to(ctx.weight_dtype)
        return (*_first_derivatives(d, dx, dw), None, None, None, None, None)


# ---- the operators that are differentiable by themselves


def _save_bits(ctx, inputs, output):
    _, w_bits, ctx.k, *_ = inputs
    ctx.save_for_backward(w_bits)


def _sign_matmul_backward(ctx, grad):
    return ops.sign_matmul_t(grad, ctx.saved_tensors[0], ctx.k), None, None


def _sign_matmul_t_backward(ctx, grad):
    return ops.sign_matmul(grad, ctx.saved_tensors[0], ctx.k), None, None, None


torch.library.register_autograd("engram_kernels::sign_matmul", _sign_matmul_backward, setup_context=_save_bits)
torch.library.register_autograd("engram_kernels::sign_matmul_t", _sign_matmul_t_backward, setup_context=_save_bits)
