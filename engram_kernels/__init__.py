"""Bit-packed kernels for binarized networks that keep learning."""

from . import ops, reference
from .convert import convert
from .encoding import InputEncoding
from .engrams import BernoulliEngram, ContextEngram, Engram, Recruitment, StochasticEngram
from .hidden_weight import HiddenWeight
from .layers import BinaryEngramLinear
from .networks import EngramMLP
from .optim import MetaplasticAdam
from .readouts import DendriticReadout, PrototypeReadout, RidgeReadout
from .summary import Summary, summary

__version__ = "0.1.0"

__all__ = [
    "BernoulliEngram",
    "BinaryEngramLinear",
    "ContextEngram",
    "DendriticReadout",
    "Engram",
    "EngramMLP",
    "HiddenWeight",
    "InputEncoding",
    "MetaplasticAdam",
    "PrototypeReadout",
    "Recruitment",
    "RidgeReadout",
    "StochasticEngram",
    "Summary",
    "__version__",
    "convert",
    "ops",
    "reference",
    "summary",
]
