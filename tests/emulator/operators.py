"""The operators of ``engram_kernels.ops`` on the emulated CUDA kernels: the same names and arguments.

Work that ``csrc/bindings`` does for CUDA tensors, allocating and choosing arguments, is done here for emulated
ones.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engram_kernels.reference import Window, words_for

from .build import EmulatorError, Flag, Library, Read, Write, load

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
PATTERNS = {  # bytes of a number, +1 and -1
    torch.float32: (4, 0x3F800000, 0xBF800000),
    torch.bfloat16: (2, 0x3F80, 0xBF80),
    torch.float16: (2, 0x3C00, 0xBC00),
    torch.float64: (8, 0x3FF0000000000000, 0xBFF0000000000000 - 2**64),
    torch.int8: (1, 1, 0xFF),
    torch.int32: (4, 1, 0xFFFFFFFF),
}
TILES, DOTS = 1, 2
HOST = Path(__file__).parent / "kernels.cpp"


def _gate(gate_bits: Tensor | None, words: int) -> tuple[Read | None, int]:
    if gate_bits is None:
        return None, 0
    return Read(gate_bits), 0 if gate_bits.dim() == 1 else words


@dataclass
class EmulatedOps:
    """The kernels for one architecture (750, 800, 1000) in one mode of the emulator, under one order of threads."""

    architecture: int = 800
    mode: str = "fast"
    schedule: int = 0
    multiprocessors: int = 4
    host: Path = HOST
    overlay: Path | None = None  # of build()

    @property
    def library(self) -> Library:
        return load(self.host, self.architecture, self.mode, self.overlay)

    def _call(self, function: str, **arguments) -> None:
        self.library.call(function, schedule=self.schedule, multiprocessors=self.multiprocessors, **arguments)

    def pack_signs(self, x: Tensor) -> Tensor:
        k = x.shape[-1]
        bits = torch.full((*x.shape[:-1], words_for(k)), -1)
        nan = torch.zeros(1, dtype=torch.int32)
        self._call(
            "run_pack_signs",
            x=Read(x),
            element=ELEMENTS[x.dtype],
            rows=x.numel() // k,
            k=k,
            bits=Write(bits),
            nan=Flag(nan),
        )
        if nan:
            raise RuntimeError("x: expected numbers, got NaN")
        return bits

    def pack_window(self, x: Tensor, width: float = 1.0, gate_bits: Tensor | None = None) -> Tensor:
        rows, k = x.shape
        gate, stride = _gate(gate_bits, words_for(k))
        bits = torch.full((rows, words_for(k)), -1)
        self._call(
            "run_pack_window", x=Read(x), width=width, gate=gate, gate_stride=stride, rows=rows, k=k, bits=Write(bits)
        )
        return bits

    def unpack_signs(self, bits: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size, plus, minus = PATTERNS[dtype]
        out = torch.zeros(*bits.shape[:-1], k, dtype=dtype)
        self._call(
            "run_unpack_signs",
            bits=Read(bits),
            rows=bits.numel() // bits.shape[-1],
            k=k,
            size=size,
            plus=plus,
            minus=minus,
            out=Write(out),
        )
        return out

    def unfold_bits(self, bits: Tensor, window: Window, group: int = 0) -> Tensor:
        rows = torch.full((bits.shape[0] * window.out_height * window.out_width, words_for(window.group_units)), -1)
        numbers = torch.tensor(window)  # in the order of csrc/core/window.h
        self._call(
            "run_unfold_bits",
            bits=Read(bits),
            samples=bits.shape[0],
            window=Read(numbers),
            group=group,
            rows=Write(rows),
        )
        return rows

    def valid_gate(self, gate_bits: Tensor | None, k: int) -> Tensor:
        """The gate without its padding, (words,) or (rows, words); without a gate, that of every unit."""
        out = torch.full((words_for(k),) if gate_bits is None else gate_bits.shape, -1)
        gate = None if gate_bits is None else Read(gate_bits)
        self._call("run_valid_gate", gate=gate, rows=out.numel() // words_for(k), k=k, out=Write(out))
        return out

    def _binary_matmul(self, form, x_bits, w_bits, k, gate_bits, y, threshold, flip, y_bits) -> None:
        gate, stride = _gate(gate_bits, words_for(k))
        self._call(
            "run_binary_matmul",
            form=form,
            x=Read(x_bits),
            w=Read(w_bits),
            gate=gate,
            gate_stride=stride,
            m=x_bits.shape[0],
            n=w_bits.shape[0],
            k=k,
            y=y,
            threshold=threshold,
            flip=flip,
            y_bits=y_bits,
        )

    def binary_matmul(self, x_bits, w_bits, k, gate_bits=None, form: int = 0) -> Tensor:
        y = torch.full((x_bits.shape[0], w_bits.shape[0]), -(2**31), dtype=torch.int32)
        self._binary_matmul(form, x_bits, w_bits, k, gate_bits, Write(y), None, None, None)
        return y

    def binary_threshold(self, x_bits, w_bits, k, threshold, flip, gate_bits=None, form: int = 0) -> Tensor:
        bits = torch.full((x_bits.shape[0], words_for(w_bits.shape[0])), -1)
        self._binary_matmul(form, x_bits, w_bits, k, gate_bits, None, Read(threshold), Read(flip), Write(bits))
        return bits

    def _sign_product(self, a, shape, signs, contraction, *, transposed=False, by_row=True, gate_bits=None, mask=None):
        (rows, columns), words = shape, words_for(shape[1])
        gate, gate_stride = _gate(gate_bits, words)
        mask_bits, mask_stride = _gate(mask, words)
        y = torch.full(shape, 77, dtype=torch.int32 if a.dtype == torch.uint8 else a.dtype)
        self._call(
            "run_sign_product",
            a=Read(a),
            element=ELEMENTS[a.dtype],
            a_transposed=transposed,
            signs=Read(signs),
            signs_by_row=by_row,
            gate=gate,
            gate_stride=gate_stride,
            mask=mask_bits,
            mask_stride=mask_stride,
            y=Write(y),
            r=rows,
            i=contraction,
            v=columns,
        )
        return y

    def sign_matmul(self, a: Tensor, w_bits: Tensor, k: int) -> Tensor:
        return self._sign_product(a, (a.shape[0], k), w_bits, a.shape[1])

    def sign_matmul_t(self, x: Tensor, w_bits: Tensor, k: int) -> Tensor:
        return self._sign_product(x, (x.shape[0], w_bits.shape[0]), w_bits, k, by_row=False)

    def masked_input_grad(self, d: Tensor, w_bits: Tensor, k: int, mask_bits: Tensor) -> Tensor:
        return self._sign_product(d, (d.shape[0], k), w_bits, d.shape[1], mask=mask_bits)

    def gated_weight_grad(self, d: Tensor, x_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
        return self._sign_product(d, (d.shape[1], k), x_bits, d.shape[0], transposed=True, gate_bits=gate_bits)

    def standardise(self, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        m, n = y.shape
        z, moments = torch.full((m, n), 77.0), torch.full((m, 2), 77.0, dtype=torch.float64)
        self._call("run_standardise", y=Read(y), eps=eps, m=m, n=n, z=Write(z), moments=Write(moments))
        return z, moments

    def standardise_grad(self, d: Tensor, y: Tensor, moments: Tensor) -> Tensor:
        m, n = y.shape
        dy = torch.full((m, n), 77.0)
        self._call("run_standardise_grad", d=Read(d), y=Read(y), moments=Read(moments), m=m, n=n, dy=Write(dy))
        return dy

    def sample_engram(self, score, seed, rate, rule="gumbel_top_k", temperature=1.0, first_row=0, row_step=1) -> Tensor:
        rows, k = score.shape
        bernoulli, stride = rule == "bernoulli", -(-k // 4) * 4
        gate, nan = torch.full((rows, words_for(k)), -1), torch.zeros(1, dtype=torch.int32)
        inverse = -1.0 if temperature == 0 else float(torch.tensor(1.0) / torch.tensor(temperature))
        self._call(
            "run_sample_engram",
            score=Read(score),
            gate=Write(gate),
            m=rows,
            k=k,
            bernoulli=bernoulli,
            count=max(1, round(rate * k)),
            threshold=round(rate * 2**32),
            inverse_temperature=inverse,
            seed=int(seed[0]),
            offset=int(seed[1]),
            first_row=first_row,
            row_step=row_step,
            keys=None if bernoulli else Write(torch.full((rows, stride), -1, dtype=torch.int32)),
            key_stride=stride,
            nan=Flag(nan),
        )
        if nan:
            raise RuntimeError("score: expected numbers, got NaN")
        return gate


__all__ = ["DOTS", "HOST", "TILES", "EmulatedOps", "EmulatorError"]
