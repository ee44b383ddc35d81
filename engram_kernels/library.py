"""Loads the compiled library, which registers the operators ``torch.ops.engram_kernels``."""

from pathlib import Path

import torch
from torch._library.effects import EffectType

FILE = Path(__file__).parent / "_C.abi3.so"
if not FILE.exists():
    raise ImportError(
        "engram_kernels: the compiled library engram_kernels/_C.abi3.so is missing; "
        "install the package (pip install .) or build it in place (python setup.py build_ext --inplace)"
    )
torch.ops.load_library(str(FILE))
operators = torch.ops.engram_kernels

# Operators that are defined in Python.
fragment = torch.library.Library("engram_kernels", "FRAGMENT")
fragment.define("draw_seed() -> Tensor", tags=torch.Tag.nondeterministic_seeded)
fragment.define("kept_sign_bits(Tensor weight, bool filters=False) -> Tensor")  # filters (..., O, C, h, w)


def _draw_seed() -> torch.Tensor:
    key = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    return torch.cat([key, torch.zeros_like(key)])


# An operator of its own, since inductor replaces torch.randint by a generator with other numbers.
fragment.impl("draw_seed", _draw_seed, "CompositeExplicitAutograd")
fragment.impl("draw_seed", _draw_seed, "FuncTorchVmapMode")  # torch.randint does what vmap's ``randomness`` says
# Ordered: compiled graphs neither make one draw of two nor swap them.
fragment._register_effectful_op("engram_kernels::draw_seed", EffectType.ORDERED)
