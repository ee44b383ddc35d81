"""Bit-packed kernels for binarized networks that keep learning."""

from . import ops, reference
from .encoding import InputEncoding
from .engrams import BernoulliEngram, ContextEngram, Engram, Recruitment, StochasticEngram
from .hidden_weight import HiddenWeight
from .layers import BinaryEngramLinear
from .networks import EngramMLP
from .optim import MetaplasticAdam
from .readouts import DendriticReadout, PrototypeReadout, RidgeReadout

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
    "__version__",
    "ops",
    "reference",
]
