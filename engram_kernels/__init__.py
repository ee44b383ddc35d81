"""Bit-packed kernels for binarized networks that keep learning."""

from typing import Any

from . import ops, reference
from .convert import convert
from .convolution import BinaryEngramConv2d
from .distributed import merged_counts
from .encoding import InputEncoding
from .engrams import BernoulliEngram, ContextEngram, Engram, Recruitment, StochasticEngram
from .hidden_weight import HiddenWeight
from .layers import BinaryEngramLinear
from .networks import EngramMLP
from .norms import ExactLayerNorm
from .optim import MetaplasticAdam
from .packed import PackedModel, export_onnx, load_packed, pack
from .pretrained import from_pretrained, save_pretrained
from .readouts import DendriticReadout, PrototypeReadout, RidgeReadout
from .summary import Summary, summary

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`EngramClassifier`, which alone needs scikit-learn, is imported when it is asked for."""
    if name == "EngramClassifier":
        from .estimators import EngramClassifier

        return EngramClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BernoulliEngram",
    "BinaryEngramConv2d",
    "BinaryEngramLinear",
    "ContextEngram",
    "DendriticReadout",
    "Engram",
    "EngramClassifier",
    "EngramMLP",
    "ExactLayerNorm",
    "HiddenWeight",
    "InputEncoding",
    "MetaplasticAdam",
    "PackedModel",
    "PrototypeReadout",
    "Recruitment",
    "RidgeReadout",
    "StochasticEngram",
    "Summary",
    "__version__",
    "convert",
    "export_onnx",
    "from_pretrained",
    "load_packed",
    "merged_counts",
    "ops",
    "pack",
    "reference",
    "save_pretrained",
    "summary",
]
