"""Packed models: networks for evaluation of bits and integers, in one file.

layers.py    what each layer holds and does
model.py     the model
packing.py   makes it of a trained network
file.py      the file, docs/packed-format.md
"""

from .file import load_packed
from .model import PackedModel
from .onnx import export_onnx
from .packing import pack

__all__ = ["PackedModel", "export_onnx", "load_packed", "pack"]
