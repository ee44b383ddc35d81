"""The parameter of a binary layer: real-valued hidden weights that carry their packed signs."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .reference import words_for

# Attributes and methods through which the values cannot change and no other tensor comes to share them.
_READ_ONLY_ATTRIBUTES = (
    "_version", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_sparse", "layout",
    "ndim", "requires_grad", "shape",
)  # fmt: skip
_READ_ONLY_METHODS = (
    "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
    "ndimension", "nelement", "numel", "size", "stride",
)  # fmt: skip
_READ_ONLY = {getattr(Tensor, name).__get__ for name in _READ_ONLY_ATTRIBUTES}
_READ_ONLY |= {getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")}
_READ_ONLY |= {getattr(Tensor, name) for name in _READ_ONLY_METHODS}


def _references(tensor: Tensor) -> tuple[int, int]:
    """How many tensors and how many Python names refer to a tensor's storage."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


_GET_GRAD = getattr(Tensor, "grad").__get__  # noqa: B009
# Receives a hidden weight and what applies its gradient: a function of ops.metaplastic_adam_'s arguments less grad.
GradientConsumer = Callable[["HiddenWeight", Callable[..., None]], None]

# What they count where only one tensor and the handle made for asking refer to it.
_SOLE_OWNER = _references(torch.empty(1))


def _hand_out(value: Any) -> None:
    """Notes for every hidden weight in the arguments of a function that the function may pass its memory on."""
    if isinstance(value, HiddenWeight):
        value._handed_out = True
    elif isinstance(value, (list, tuple)):
        for item in value:
            _hand_out(item)
    elif isinstance(value, dict):
        _hand_out(tuple(value.values()))


class HiddenWeight(nn.Parameter):
    """Hidden weights (N, K) of a binary layer; the network uses their signs (Courbariaux et al. 2016).

    :meth:`sign_bits` gives the signs packed, (N, words), and keeps them as long as nothing can have changed the
    weights. Changes are noticed by torch's version counter and, since ``weight.data`` and NumPy views go past that
    counter, by watching every function that is handed the weight and whoever else refers to its memory; in doubt the
    signs are packed anew. While that memory is shared with another process, or belongs to NumPy or another library,
    they are packed at every call. Out of sight, and so out of contract: TorchScript, ``to_dlpack``, and code that
    switches torch's overrides off, where they write through ``.data``.
    """

    _bits: Tensor | None = None
    _bits_version = -1
    _handed_out = False
    _consumer: Callable[[], GradientConsumer | None] | None = None
    _consumed = False  # the gradient of the backward pass in progress went to the consumer

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> HiddenWeight:
        """Makes a hidden weight of ``data`` (N, K), a plain tensor or a parameter, without a copy."""
        if data is not None:
            with torch._C.DisableTorchFunctionSubclass():
                data = data.detach()
        return super().__new__(cls, data, requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Runs ``func`` as on a plain tensor; notes whether it may have given the values away."""
        if func == _GET_GRAD and args[0]._consumed:
            raise RuntimeError(
                "grad: the gradient of this hidden weight was consumed in backward(), as fuse_backward=True asks, and "
                "is not kept; clipping or scaling gradients, accumulating them and zero_grad() before step() need "
                "fuse_backward=False; after a backward() that failed, MetaplasticAdam.abandon_step() begins anew"
            )
        if func not in _READ_ONLY:
            _hand_out((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _within_reach_of_others(self) -> bool:
        """Whether another tensor, handle, process or library can write to the weights."""
        if _references(self) != _SOLE_OWNER:
            return True
        storage = self.untyped_storage()
        shared = storage.is_shared() and not self.is_cuda  # of memory on CUDA, torch always says so
        return shared or not storage.resizable()

    def _is_fresh(self) -> bool:
        unchanged = self._bits is not None and not self._handed_out and self._bits_version == self._version
        return unchanged and not self._within_reach_of_others()

    def sign_bits(self) -> Tensor:
        """Packed signs of the current values, int64 (N, words). Not to be written to."""
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling() or self.device.type == "meta" or self.is_inference():
                return ops.pack_signs(self.detach())
            if not self._is_fresh():
                self._handed_out, version = False, self._version  # before packing: another thread may write meanwhile
                with torch.inference_mode(False), torch.no_grad():
                    self._bits = ops.pack_signs(self)
                self._vouch(version)
            assert self._bits is not None
            return self._bits

    def updated_in_place(self, update: Callable[[Tensor], None]) -> None:
        """Calls ``update(bits)``, which changes the weights in place and writes their fresh signs to ``bits``."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = (self.shape[0], words_for(self.shape[1]))
            if self._bits is None or self._bits.shape != shape or self._bits.device != self.device:
                with torch.inference_mode(False):
                    self._bits = self.new_empty(shape, dtype=torch.int64)
            self._bits_version = -1  # until the update has come to its end
            self._handed_out = False
            update(self._bits)
            self._vouch(self._version)

    def send_gradient_to(self, consumer: GradientConsumer | None) -> None:
        """Has the backward pass of a layer give its gradient to ``consumer``, a bound method, in place of ``grad``.

        A gradient comes as a function that applies it: :meth:`MetaplasticAdam.consume` says how. The consumer's object
        is referred to weakly. None: gradients go to ``grad``.
        """
        self._consumer = None if consumer is None else weakref.WeakMethod(consumer)
        self._consumed = False

    def gradient_consumer(self) -> GradientConsumer | None:
        """Where gradients go in place of ``grad``, if anywhere."""
        if self._consumer is None:
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError("fuse_backward: expected False under torch.compile, got True")
        return self._consumer()

    def refuse_second_gradient(self) -> None:
        """Raises: RuntimeError if a gradient has been consumed since the last step."""
        if self._consumed:
            raise RuntimeError(
                "backward: a second gradient of a hidden weight before step(): fuse_backward=True consumes each at "
                "once and cannot accumulate them, nor serve a weight that two layers share; use fuse_backward=False "
                "(after a backward() that failed: MetaplasticAdam.abandon_step())"
            )

    def begin_consuming(self) -> None:
        """Notes that a gradient goes to the consumer now.

        Raises: RuntimeError if that cannot do what the same gradient in ``grad`` would.
        """
        self.refuse_second_gradient()
        if self.grad is not None:
            raise RuntimeError("grad: expected None with fuse_backward=True, got a gradient from before: zero_grad()")
        if self._backward_hooks or getattr(self, "_post_accumulate_grad_hooks", None):
            raise RuntimeError("hooks: a hidden weight's hooks would see no gradient with fuse_backward=True")
        if torch.is_grad_enabled():
            raise RuntimeError("backward: expected create_graph=False with fuse_backward=True")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError("fuse_backward: expected False where processes average their gradients, got True")
        self._consumed = True

    def end_consuming(self) -> bool:
        """Notes that the step is over. True if a gradient was consumed in it."""
        consumed, self._consumed = self._consumed, False
        return consumed

    def _vouch(self, version: int) -> None:
        self._bits_version = version
        # an alias may write and be gone before the next look
        self._handed_out |= self._within_reach_of_others()

    def __reduce_ex__(self, proto):
        """Pickles values only; the signs are packed again when needed."""
        with torch._C.DisableTorchFunctionSubclass():
            return _rebuild, (self.detach(), self.requires_grad)


def _rebuild(values: Tensor, requires_grad: bool) -> HiddenWeight:
    return HiddenWeight(values, requires_grad)


torch.serialization.add_safe_globals([_rebuild])


def as_hidden_weight(parameter: nn.Parameter) -> HiddenWeight:
    """Turns a plain parameter (N, K) into a hidden weight, in place, so that optimizers that hold it still do.

    Raises: TypeError if it is not a parameter; ValueError if it is not two-dimensional.
    """
    if isinstance(parameter, HiddenWeight):
        return parameter
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"weight: expected an nn.Parameter, got {type(parameter).__name__}")
    if parameter.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions, got shape {tuple(parameter.shape)}")
    if type(parameter) is nn.Parameter:
        parameter.__class__ = HiddenWeight
        return parameter  # type: ignore[return-value]
    return HiddenWeight(parameter.detach(), parameter.requires_grad)
