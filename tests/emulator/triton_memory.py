"""Watches the memory accesses of Triton kernels that Triton's interpreter runs (TRITON_INTERPRET=1)."""

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder


class MemoryCheck:
    """In ``with MemoryCheck(x, y): kernel[grid](x, y)``, every access of the kernel must lie within one of the tensors.

    No address may be written twice, be it by one program or by two, and none read by one program and written by
    another: their order is undefined on a GPU. ``flags`` are tensors that any program may write.

    Raises: IndexError for an access outside, RuntimeError for a race.
    """

    def __init__(self, *tensors: torch.Tensor | None, flags: Iterable[torch.Tensor] = ()):
        spans = sorted(_span(t) for t in (*tensors, *flags) if t is not None)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        self._begins, self._ends = (np.array(ends, dtype=np.uint64) for ends in zip(*spans, strict=True))
        self._flags = [_span(t) for t in flags]
        self._accesses: dict[str, list[tuple[int, np.ndarray]]] = {"load": [], "store": []}
        self._programs: dict[tuple, int] = {}

    def __enter__(self):
        self._originals = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        original_load, original_store = self._originals

        def load(builder, pointers, mask, *rest, **named):
            self._note("load", builder, pointers, mask)
            return original_load(builder, pointers, mask, *rest, **named)

        def store(builder, pointers, value, mask, *rest, **named):
            self._note("store", builder, pointers, mask)
            return original_store(builder, pointers, value, mask, *rest, **named)

        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        return self

    def __exit__(self, error_type, error, traceback):
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = self._originals
        if error_type is None:
            self._find_races()

    def _note(self, kind, builder, pointers, mask):
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[active].astype(np.uint64).ravel()
        span = np.searchsorted(self._begins, addresses, side="right") - 1
        outside = (span < 0) | (addresses + size > self._ends[np.maximum(span, 0)])
        if outside.any():
            raise IndexError(
                f"{kind} of program {builder.grid_idx} outside every tensor, {int(outside.sum())} elements"
            )
        for begin, end in self._flags:
            addresses = addresses[(addresses < begin) | (addresses >= end)]
        touched = (addresses[:, None] + np.arange(size, dtype=np.uint64)).ravel()
        program = self._programs.setdefault(builder.grid_idx, len(self._programs))
        self._accesses[kind].append((program, touched))

    def _find_races(self):
        writers, written = self._flattened("store")
        order = np.argsort(written, kind="stable")
        writers, written = writers[order], written[order]
        if (written[1:] == written[:-1]).any():
            raise RuntimeError(f"race: {int((written[1:] == written[:-1]).sum())} bytes written more than once")
        readers, read = self._flattened("load")
        at = np.minimum(np.searchsorted(written, read), len(written) - 1)
        crossed = (written[at] == read) & (writers[at] != readers) if len(written) else np.zeros(0, bool)
        if crossed.any():
            raise RuntimeError(f"race: {int(crossed.sum())} bytes read by one program and written by another")

    def _flattened(self, kind):
        accesses = self._accesses[kind]
        programs = [np.full(len(touched), program) for program, touched in accesses]
        empty = np.zeros(0, np.uint64)
        return np.concatenate([empty.astype(int), *programs]), np.concatenate([empty, *(t for _, t in accesses)])


def _span(tensor):
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
