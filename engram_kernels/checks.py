"""Checks of the arguments that users give: errors name the argument, what it needs and what it got."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_size(name: str, value: Any) -> int:
    """The value as an int. Raises: TypeError unless it is an integer (a bool is none); ValueError if it is below 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    size = operator.index(value)
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
    return size


def check_flag(name: str, value: Any) -> bool:
    """The value. Raises: TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_number(name: str, value: Any, wanted: str, *, above: float, infinite: bool = False) -> float:
    """The value as a float; ``wanted`` says in words what is allowed.

    Raises: TypeError unless it is a real number; ValueError if it is NaN, not above ``above``, or infinite where that
    is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {wanted}, got {value!r}")
    if not (value > above and (infinite or value < math.inf)):
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return float(value)


def check_hidden_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of hidden weights, torch's default for None. Raises: TypeError; ValueError for one without kernels."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    chosen = torch.get_default_dtype() if dtype is None else dtype
    if chosen not in HIDDEN_DTYPES:
        default = " as torch's default dtype" if dtype is None else ""
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {chosen}{default}")
    return chosen
