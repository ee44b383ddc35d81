"""The protocol of ``MetaplasticAdam(fuse_backward=True)``: an optimizer applies gradients as backward() makes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .hidden_weight import HiddenWeight

# Receives a hidden weight and what applies its gradient: a function of ops.metaplastic_adam_'s arguments less grad.
GradientConsumer = Callable[["HiddenWeight", Callable[..., None]], None]


class LayerGradient:
    """The gradient of a linear layer's hidden weight, not made yet, as what :data:`GradientConsumer` is given.

    ``d`` (M, N) is the gradient of the layer's sums, ``x`` its input, floats (M, K) or packed signs (M, words), of
    which ``gate_bits`` recruits some.
    """

    __slots__ = ("d", "gate_bits", "x")

    def __init__(self, d: Tensor, x: Tensor, gate_bits: Tensor | None = None) -> None:
        self.d, self.x, self.gate_bits = d, x, gate_bits

    def __call__(self, *state: Any, **settings: Any) -> None:
        """An update by any kind of state."""
        if self.x.dtype == torch.int64:
            ops.gated_metaplastic_adam_(self.d, self.x, self.gate_bits, *state, **settings)
        else:
            ops.real_metaplastic_adam_(self.d, self.x, *state, **settings)


class FusedBackward:
    """Where the gradient of one hidden weight goes in place of ``weight.grad``, and whether it has gone there.

    ``consumer`` is a bound method of an optimizer, to which this refers weakly.
    """

    def __init__(self, consumer: GradientConsumer) -> None:
        self._consumer = weakref.WeakMethod(consumer)
        self._consumed = False

    def consumer(self) -> GradientConsumer | None:
        """The optimizer's method; None where the optimizer is gone.

        Raises: RuntimeError under torch.compile.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("fuse_backward: expected False under torch.compile, got True")
        return self._consumer()

    def refuse_access_to_gradient(self) -> None:
        """Raises: RuntimeError if a gradient has been consumed since the last step."""
        if self._consumed:
            raise RuntimeError(
                "grad: the gradient of this hidden weight was consumed in backward(), as fuse_backward=True asks, and "
                "is not kept; clipping or scaling gradients, accumulating them and zero_grad() before step() need "
                "fuse_backward=False; after a backward() that failed, MetaplasticAdam.abandon_step() begins anew"
            )

    def refuse_second_gradient(self) -> None:
        """Raises: RuntimeError if a gradient has been consumed since the last step."""
        if self._consumed:
            raise RuntimeError(
                "backward: a second gradient of a hidden weight before step(): fuse_backward=True consumes each at "
                "once and cannot accumulate them, nor serve a weight that two layers share; use fuse_backward=False "
                "(after a backward() that failed: MetaplasticAdam.abandon_step())"
            )

    def begin(self, weight: HiddenWeight) -> None:
        """Notes that a gradient of ``weight`` goes to the consumer now.

        Raises: RuntimeError if that cannot do what the same gradient in ``grad`` would.
        """
        self.refuse_second_gradient()
        if weight.grad is not None:
            raise RuntimeError("grad: expected None with fuse_backward=True, got a gradient from before: zero_grad()")
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            raise RuntimeError("hooks: a hidden weight's hooks would see no gradient with fuse_backward=True")
        if torch.is_grad_enabled():
            raise RuntimeError("backward: expected create_graph=False with fuse_backward=True")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError("fuse_backward: expected False where processes average their gradients, got True")
        self._consumed = True

    def end(self) -> bool:
        """Notes that the step is over. True if a gradient was consumed in it."""
        consumed, self._consumed = self._consumed, False
        return consumed


def gradient_consumer(weight: Tensor) -> GradientConsumer | None:
    """Where the gradient of ``weight`` goes in place of ``weight.grad``, if anywhere."""
    fused = getattr(weight, "fused_backward", None)
    return None if fused is None else fused.consumer()
