"""The parameter of a binary layer: real-valued hidden weights that carry their packed signs."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .fused_backward import FusedBackward
from .library import fragment, operators
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
_READ_ONLY |= {operators.kept_sign_bits, operators.kept_sign_bits.default}


def _references(tensor: Tensor) -> tuple[tuple[int, int], torch.UntypedStorage]:
    """How many tensors and how many Python names refer to a tensor's storage, and the storage."""
    storage = tensor.untyped_storage()
    return (torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)), storage


_GET_GRAD = getattr(Tensor, "grad").__get__  # noqa: B009
_DETACH = Tensor.detach
_PARAMETER_CODE = nn.Parameter.__new__.__code__

# What they count where only one tensor and the handle made for asking refer to it.
_SOLE_OWNER, _ = _references(torch.empty(1))


def _note_exposure(value: Any) -> None:
    """Notes for every hidden weight in the arguments of a function that the function may pass its memory on."""
    if isinstance(value, HiddenWeight):
        value._exposed = True
    elif isinstance(value, (list, tuple)):
        for item in value:
            _note_exposure(item)
    elif isinstance(value, dict):
        _note_exposure(tuple(value.values()))


def rows_of(weight: Tensor) -> Tensor:
    """Hidden weights as the rows (N, K) that kernels know: filters (O, C, kernel_h, kernel_w) tap by tap.

    A view where filters lie channels last, as a layer makes them. Takes batches of filters, too.
    """
    return weight if weight.dim() == 2 else weight.movedim(-3, -1).flatten(-3)


def from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows (N, K) as a weight of a shape, a view."""
    return rows if len(shape) == 2 else rows.unflatten(1, (*shape[2:], shape[1])).permute(0, 3, 1, 2)


def lies_in_rows(weight: Tensor) -> bool:
    """Whether :func:`rows_of` is a view of contiguous memory."""
    layout = torch.contiguous_format if weight.dim() == 2 else torch.channels_last
    return weight.is_contiguous(memory_format=layout)


def row_shape(weight: Tensor) -> tuple[int, int]:
    """N and K."""
    return weight.shape[0], math.prod(weight.shape[1:])


class HiddenWeight(nn.Parameter):
    """Hidden weights (N, K), or filters (O, C, kernel_h, kernel_w), of a binary layer that uses their signs.

    (Courbariaux et al. 2016.)

    :meth:`sign_bits` gives the signs packed, (N, words), and keeps them as long as nothing can have changed the
    weights. Changes are noticed by torch's version counter and, since ``weight.data`` and NumPy views go past that
    counter, by watching every function that is handed the weight and whoever else refers to its memory; in doubt the
    signs are packed anew. While that memory is shared with another process, or belongs to NumPy or another library,
    they are packed at every call. Out of sight, and so out of contract: TorchScript, ``to_dlpack``, and code that
    switches torch's overrides off, where they write through ``.data``.

    >>> weight = ek.HiddenWeight(torch.tensor([[0.3, -0.1, 0.2]]))
    >>> weight.sign_bits().tolist()  # 1 + 4, and a word of padding
    [[5, 0]]
    """

    _bits: Tensor | None = None
    _bits_version = -1
    _exposed = False
    fused_backward: FusedBackward | None = None
    _memory_has_other_owners = True  # where the storage says that torch has not allocated it

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> HiddenWeight:
        """Makes a hidden weight of ``data``, a plain tensor or a parameter, without a copy."""
        if data is not None:
            with torch._C.DisableTorchFunctionSubclass():
                data = data.detach()
        return super().__new__(cls, data, requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Runs ``func`` as on a plain tensor; notes whether it may have given the values away."""
        if func == _GET_GRAD and args[0].fused_backward is not None:
            args[0].fused_backward.refuse_access_to_gradient()
        if func not in _READ_ONLY:
            _note_exposure((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func is _DETACH and sys._getframe(1).f_code is _PARAMETER_CODE:
                return result.as_subclass(cls)  # nn.Parameter(weight), as weight_norm does, wants the type it gave
            return result

    def _within_reach_of_others(self) -> bool:
        """Whether another tensor, handle, process or library can write to the weights."""
        owners, storage = _references(self)
        if owners != _SOLE_OWNER:
            return True
        shared = storage.is_shared() and not self.is_cuda  # of memory on CUDA, torch always says so
        return shared or (self._memory_has_other_owners and not storage.resizable())

    def _writes(self) -> int:
        """Torch's count of writes; tensors made in inference mode have none, where every write passes by here."""
        return 0 if self.is_inference() else self._version

    def _is_fresh(self) -> bool:
        unchanged = self._bits is not None and not self._exposed and self._bits_version == self._writes()
        return unchanged and not self._within_reach_of_others()

    def sign_bits(self) -> Tensor:
        """Packed signs of the current values, int64 (N, words). Not to be written to."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.device.type == "meta":
                return _pack(rows_of(self.detach()))
            if not self._is_fresh():
                self._exposed, version = False, self._writes()  # before packing: another thread may write meanwhile
                with torch.inference_mode(False), torch.no_grad():
                    self._bits = _pack(rows_of(self.detach()))
                self._mark_fresh(version)
            assert self._bits is not None
            return self._bits

    def updated_in_place(self, update: Callable[[Tensor], None]) -> None:
        """Calls ``update(bits)``, which changes the weights in place and writes their fresh signs to ``bits``."""
        with torch._C.DisableTorchFunctionSubclass():
            update(self.begin_update())
            self.end_update()

    def begin_update(self) -> Tensor:
        """Where an update in place writes the fresh signs; until :meth:`end_update` there are none.

        Both within ``DisableTorchFunctionSubclass``.
        """
        shape = (self.shape[0], words_for(row_shape(self)[1]))
        if self._bits is None or self._bits.shape != shape or self._bits.device != self.device:
            with torch.inference_mode(False):
                self._bits = self.new_empty(shape, dtype=torch.int64)
        self._bits_version = -1
        self._exposed = False
        return self._bits

    def end_update(self) -> None:
        """Notes that the signs are those of the weights."""
        self._mark_fresh(self._writes())

    def _mark_fresh(self, version: int) -> None:
        self._bits_version = version
        # an alias may write and be gone before the next look
        self._exposed |= self._within_reach_of_others()

    def __reduce_ex__(self, proto):
        """Pickles values only; the signs are packed again when needed."""
        with torch._C.DisableTorchFunctionSubclass():
            return _rebuild, (self.detach(), self.requires_grad)


def _pack(weight: Tensor) -> Tensor:
    """Signs of a weight (N, K), or of a batch of them. Raises: RuntimeError that names the weight."""
    try:
        return ops.pack_signs(weight)
    except RuntimeError as error:
        raise RuntimeError(str(error).replace("x:", "weight:", 1)) from None


def _rebuild(values: Tensor, requires_grad: bool) -> HiddenWeight:
    return HiddenWeight(values, requires_grad)


torch.serialization.add_safe_globals([_rebuild])


def as_hidden_weight(parameter: nn.Parameter, dims: int = 2) -> HiddenWeight:
    """Turns a plain parameter into a hidden weight, in place, so that optimizers that hold it still do.

    A DTensor stays one: :func:`is_hidden_weight` knows it by its layer.
    Raises: TypeError if it is not a parameter; ValueError if it has not so many dimensions, 2 or, of filters, 4.
    """
    if isinstance(parameter, HiddenWeight) or is_sharded(parameter):
        return parameter  # type: ignore[return-value]
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"weight: expected an nn.Parameter, got {type(parameter).__name__}")
    if parameter.dim() != dims:
        raise ValueError(f"weight: expected {dims} dimensions, got shape {tuple(parameter.shape)}")
    if not lies_in_rows(parameter) and dims == 4:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = HiddenWeight
        return parameter  # type: ignore[return-value]
    return HiddenWeight(parameter.detach(), parameter.requires_grad)


# The layers alive. torch's fully_shard puts DTensors in the place of hidden weights, which keep nothing of their class.
layers_with_hidden_weights: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, as fully_shard (FSDP2) and tensor parallelism make it."""
    if type(parameter) is HiddenWeight or type(parameter) is nn.Parameter:
        return False
    tensor = sys.modules.get("torch.distributed.tensor")  # imported, since that is slow, by whoever makes DTensors
    return tensor is not None and isinstance(parameter, tensor.DTensor)


def is_hidden_weight(parameter: Tensor) -> bool:
    """Whether a parameter is a hidden weight, or a DTensor that stands in the place of one."""
    kind = type(parameter)
    if kind is HiddenWeight or kind is nn.Parameter:  # isinstance takes ten times as long
        return kind is HiddenWeight
    if isinstance(parameter, HiddenWeight):
        return True
    if not is_sharded(parameter):
        return False
    known = parameter.__dict__.get("_stands_for_hidden_weight")
    if known is None:  # asked once: there may be many layers
        known = any(
            layer.__dict__.get("_parameters", {}).get("weight") is parameter for layer in layers_with_hidden_weights
        )
        parameter._stands_for_hidden_weight = known  # type: ignore[attr-defined]
    return known


def sign_bits_of(weight: Tensor) -> Tensor:
    """Packed signs (N, words) of a layer's weight, in whose place torch.func puts plain tensors."""
    if torch.compiler.is_compiling():
        return operators.kept_sign_bits(weight, weight.dim() == 4)
    return weight.sign_bits() if isinstance(weight, HiddenWeight) else _pack(rows_of(weight.detach()))


def _kept_sign_bits(weight: Tensor, filters: bool = False) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        if not isinstance(weight, nn.Parameter):
            return _pack(rows_of(weight) if filters else weight)
        loaded = type(weight) is nn.Parameter
        weight = as_hidden_weight(weight, weight.dim())
        if loaded:  # by torch.export, into the buffer of the file, to which nobody else refers
            weight._memory_has_other_owners = False
        return weight.sign_bits().clone()  # compiled graphs may write to what their operators return


# Under torch.compile and torch.export, which see no attributes, the weight itself is asked when the graph runs.
for _key in ("CPU", "CUDA"):
    fragment.impl("kept_sign_bits", _kept_sign_bits, _key)
