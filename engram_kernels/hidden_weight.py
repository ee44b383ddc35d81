"""The parameter of a binary layer: real-valued hidden weights that carry their packed signs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import ops

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

# A storage that only its tensor and the handle made for asking refer to.
_SOLE_OWNER = 2


class HiddenWeight(nn.Parameter):
    """Hidden weights (N, K) of a binary layer; the network uses their signs (Courbariaux et al. 2016).

    :meth:`sign_bits` gives the signs packed, (N, words), and keeps them as long as nothing can have changed the
    weights. Changes are noticed by torch's version counter and, since ``weight.data`` and NumPy views go past that
    counter, by watching every function that is handed the weight and every other tensor that shares its memory; in
    doubt the signs are packed anew.
    """

    _bits: Tensor | None = None
    _bits_version = -1
    _handed_out = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Runs ``func`` as on a plain tensor; notes whether it may have given the values away."""
        if func not in _READ_ONLY:
            for argument in (*args, *(kwargs or {}).values()):
                if isinstance(argument, HiddenWeight):
                    argument._handed_out = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _is_fresh(self) -> bool:
        if self._bits is None or self._handed_out or self._bits_version != self._version:
            return False
        return torch._C._storage_Use_Count(self.untyped_storage()._cdata) == _SOLE_OWNER

    def sign_bits(self) -> Tensor:
        """Packed signs of the current values, int64 (N, words). Not to be written to."""
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling() or self.device.type == "meta":
                return ops.pack_signs(self.detach())
            if not self._is_fresh():
                with torch.inference_mode(False), torch.no_grad():
                    self._bits = ops.pack_signs(self)
                self._vouch()
            assert self._bits is not None
            return self._bits

    def updated_in_place(self, update: Callable[[Tensor], None]) -> None:
        """Calls ``update(bits)``, which changes the weights in place and writes their fresh signs to ``bits``."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._bits is None or self._bits.shape[0] != self.shape[0] or self._bits.device != self.device:
                self._bits = ops.pack_signs(self.detach())
            self._bits_version = -1  # until the update has come to its end
            update(self._bits)
            self._vouch()

    def _vouch(self) -> None:
        self._bits_version = self._version
        self._handed_out = False

    def __reduce_ex__(self, proto):
        """Pickles values only; the signs are packed again when needed."""
        with torch._C.DisableTorchFunctionSubclass():
            return _rebuild, (self.detach(), self.requires_grad)


def _rebuild(values: Tensor, requires_grad: bool) -> HiddenWeight:
    return HiddenWeight(values, requires_grad)


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
