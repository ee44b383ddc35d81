"""Bit-packed kernels for binarized networks that keep learning."""

from . import ops, reference

__all__ = ["ops", "reference"]
