"""The paper's network, made of binary layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .checks import check_flag, check_number, check_size
from .engrams import Engram
from .layers import BinaryEngramLinear, balance_


class EngramMLP(nn.Module):
    """The paper's network: fully connected, binary, with an engram in every layer after the first.

    ``z_1 = norm(x s(W_1)^T)``, ``z_i = norm((g_i * s(z_{i-1})) s(W_i)^T)``, and in the last layer
    ``logits = logit_scale (g * s(z)) s(W)^T / sqrt(recruited units)``. ``norm`` standardises each sample over its units
    (LayerNorm without parameters): no statistics of a batch are used or kept, in training or at test.

    Args:
        sizes: units per layer, input and output included.
        engram: one rule for all layers after the first, or None for no gates. A module; it is shared, since rules keep
            no state per layer.
        train_hidden: False leaves all but the last layer as initialised: fixed random features.
        ste_window: see :class:`BinaryEngramLinear`. The units that a sparse engram recruits by excitability lie far
            outside ``|z| <= 1``: use ``inf`` there.
        logit_scale: softness of the softmax that follows, above 0; 1 gives untrained logits unit variance.
        backward_dtype: of the first layer, see :class:`BinaryEngramLinear`.
        balanced: see :func:`~engram_kernels.layers.balance_`; of the hidden layers.
        readout: takes the place of the last layer: a module from normalised pre-activations (M, sizes[-2]) to logits
            (M, sizes[-1]), such as :class:`~engram_kernels.DendriticReadout`; ``logit_scale`` is not applied to it.

    Shapes: floats (M, sizes[0]) -> logits (M, sizes[-1]).
    Raises: TypeError for an argument of another type; ValueError for fewer than two sizes, a size below 1 or a scale of
    0 or less.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 2048, 2048, 10),
        *,
        engram: Engram | None = None,
        train_hidden: bool = True,
        ste_window: float = 1.0,
        logit_scale: float = 1.0,
        backward_dtype: torch.dtype | None = None,
        balanced: bool = False,
        readout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_flag("train_hidden", train_hidden)
        check_flag("balanced", balanced)
        if not isinstance(sizes, Sequence) or isinstance(sizes, str):
            raise TypeError(f"sizes: expected a sequence of integers, got {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least an input and an output size, got {tuple(sizes)}")
        for size in sizes:
            check_size("sizes", size)
        if readout is not None and not isinstance(readout, nn.Module):
            raise TypeError(f"readout: expected a module such as DendriticReadout, or None, got {readout!r}")
        self.engram = engram
        self.logit_scale = check_number("logit_scale", logit_scale, "a finite number above 0", above=0.0)
        self.layers = nn.ModuleList(
            BinaryEngramLinear(
                k,
                n,
                binary_input=i > 0,
                engram=engram if i > 0 else None,
                ste_window=ste_window,
                backward_dtype=backward_dtype if i == 0 else None,
            )
            for i, (k, n) in enumerate(pairwise(sizes if readout is None else sizes[:-1]))
        )
        self.readout = readout
        self.hidden_layers = len(sizes) - 2
        for layer in self.layers[: self.hidden_layers]:
            layer.requires_grad_(train_hidden)
            if balanced:
                balance_(layer.weight)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Floats (M, sizes[0]) -> normalised pre-activations of the last hidden layer (M, sizes[-2])."""
        for layer in self.layers[: self.hidden_layers]:
            x = layer(x)
            x = nn.functional.layer_norm(x, x.shape[-1:])
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Floats (M, features) -> logits (M, classes)."""
        x = self.features(x)
        if self.readout is not None:
            return self.readout(x)
        k = x.shape[-1]
        recruited = k if self.engram is None else self.engram.recruited(k)
        return self.layers[-1](x) * (self.logit_scale / math.sqrt(recruited))
