"""Small data, exact steps and strategies of hypothesis that the tests of several full-precision methods share."""

import math

import torch
from hypothesis import strategies as st

from engram_kernels.continual.data import Dataset

seeds = st.integers(0, 2**31)
widths = st.lists(st.integers(1, 9), min_size=0, max_size=3)


def random_dataset(samples=60, classes=6, shape=(7,)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, math.prod(shape), generator=generator)
    y = torch.arange(samples) % classes
    return Dataset("random", x, y, x, y, classes=tuple(range(classes)), sample_shape=shape)


def double(method, lr=1.0):
    """The method in float64 under plain gradient descent, where a step shows the gradient."""
    method.model.double()
    method.optimizer = torch.optim.SGD(method.model.parameters(), lr=lr)
    for name in ("anchors", "path"):
        if hasattr(method, name):
            setattr(method, name, [tensor.double() for tensor in getattr(method, name)])
    return method
