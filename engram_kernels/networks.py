"""A network of binary layers that learns class after class, the paper's among its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .checks import check_flag, check_number, check_size
from .encoding import InputEncoding
from .engrams import Engram, StochasticEngram
from .layers import BinaryEngramLinear, balance_
from .losses import batch_cross_entropy
from .norms import standardise
from .readouts import DendriticReadout, PrototypeReadout, RidgeReadout

_READOUTS = {"dendritic": DendriticReadout, "prototype": PrototypeReadout, "ridge": RidgeReadout}


class EngramMLP(nn.Module):
    """Fully connected binary network: input encoding, binary hidden layers, an engram and a read-out.

    ``z_1 = norm(encode(x) s(W_1)^T)`` and ``z_i = norm((g_i * s(z_{i-1})) s(W_i)^T)`` in the hidden layers; ``norm``
    standardises each sample over its units (:class:`ExactLayerNorm`), so that no statistics of a batch are used or
    kept. The read-out makes scores of the last z; a linear one ``logit_scale (g * s(z)) s(W)^T / sqrt(recruited)``.

    As it comes, it learns new classes without forgetting the old ones: a fixed random hidden layer, an engram of the
    tenth of its units that are most excited, and a dendritic read-out. The paper's network (arXiv 2503.21436) is
    ``EngramMLP((784, 2048, 2048, 10), readout="linear")``, all of whose layers are trained.

    Args:
        sizes: units per layer, input features and classes included.
        engram: the rule of all layers after the first, or a share of their units in (0, 1], which means
            ``StochasticEngram(share, temperature=0)``; None: no gates, with ``readout="linear"`` only. A module given
            is shared, since rules keep no state per layer.
        readout: ``"dendritic"``, ``"prototype"`` or ``"ridge"``, see :mod:`engram_kernels.readouts`, ``"linear"`` for a
            binary output layer, or a module from the last hidden layer's z (M, sizes[-2]) to scores (M, sizes[-1]).
        train_hidden: False leaves the hidden layers as they are initialised: fixed random features. None: True with a
            linear read-out only.
        ste_window: see :class:`BinaryEngramLinear`; None: ``inf`` with an engram, since the units that it recruits by
            excitability lie far outside ``|z| <= 1``, and 1 without.
        logit_scale: softness of the softmax after a linear read-out, above 0; 1 gives untrained logits unit variance.
        backward_dtype: of the first layer, see :class:`BinaryEngramLinear`.
        balanced: see :func:`~engram_kernels.layers.balance_`; of the hidden layers. None: where they are not trained.
        encode: see :class:`InputEncoding`; False takes the features as they are.

    Shapes: floats or uint8 (M, sizes[0]) -> scores (M, sizes[-1]).
    Raises: TypeError for an argument of another type; ValueError for fewer than two sizes, a size below 1, a scale of
    0 or less, an unknown read-out, or one that needs an engram or fixed hidden layers and gets none.

    >>> model = ek.EngramMLP((784, 256, 10))
    >>> model(torch.randn(5, 784)).shape
    torch.Size([5, 10])
    >>> model.loss(torch.randn(5, 784), torch.tensor([0, 1, 0, 1, 0])).backward()
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 2048, 10),
        *,
        engram: Engram | float | None = 0.1,
        readout: str | nn.Module = "dendritic",
        train_hidden: bool | None = None,
        ste_window: float | None = None,
        logit_scale: float = 1.0,
        backward_dtype: torch.dtype | None = None,
        balanced: bool | None = None,
        encode: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(sizes, Sequence) or isinstance(sizes, str):
            raise TypeError(f"sizes: expected a sequence of integers, got {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least an input and an output size, got {tuple(sizes)}")
        for size in sizes:
            check_size("sizes", size)
        train_hidden = check_flag("train_hidden", readout == "linear" if train_hidden is None else train_hidden)
        balanced = check_flag("balanced", not train_hidden if balanced is None else balanced)
        check_flag("encode", encode)
        if engram is not None and not isinstance(engram, Engram):
            engram = StochasticEngram(engram, temperature=0.0)
        self.sizes, self.engram = tuple(sizes), engram
        self.logit_scale = check_number("logit_scale", logit_scale, "a finite number above 0", above=0.0)
        if ste_window is None:
            ste_window = 1.0 if engram is None else math.inf
        self.readout = _make_readout(readout, sizes, engram, train_hidden)
        self.encoding = InputEncoding(sizes[0]) if encode else None
        widths = [sizes[0] if self.encoding is None else self.encoding.inputs, *sizes[1:]]
        self.hidden_layers = len(sizes) - 2
        self.layers = nn.ModuleList(
            BinaryEngramLinear(
                k,
                n,
                bias=False,
                scaled=i == self.hidden_layers,  # the norm after the others undoes a scale
                binary_input=i > 0,
                engram=engram if i > 0 else None,
                ste_window=ste_window,
                backward_dtype=backward_dtype if i == 0 else None,
            )
            for i, (k, n) in enumerate(pairwise(widths if self.readout is None else widths[:-1]))
        )
        for layer in self.layers[: self.hidden_layers]:
            layer.requires_grad_(train_hidden)
            if balanced:
                balance_(layer.weight)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Floats or uint8 (M, sizes[0]) -> normalised pre-activations of the last hidden layer (M, sizes[-2])."""
        if self.encoding is not None:
            x = self.encoding(x)
        for layer in self.layers[: self.hidden_layers]:
            x = layer(x)
            x = standardise(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Floats or uint8 (M, features) -> scores (M, classes)."""
        z = self.features(x)
        return self.layers[-1](z) * self.logit_scale if self.readout is None else self.readout(z)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a minibatch that is right for the read-out, a scalar to call ``backward()`` on.

        A dendritic read-out on fixed hidden layers has its local loss; everything else the cross-entropy over the
        classes of the batch. Neither pushes down a class that the batch lacks.
        Floats or uint8 (M, features), labels int64 (M,).
        Raises: TypeError for a read-out that is counted: call :meth:`observe`.
        """
        if isinstance(self.readout, (PrototypeReadout, RidgeReadout)):
            raise TypeError(f"loss: expected a trained read-out, got {type(self.readout).__name__}: call observe(x, y)")
        if isinstance(self.readout, DendriticReadout) and not self._trains_hidden():
            return self.readout.local_loss(self.readout.activations(self.features(x).detach()), y)
        return batch_cross_entropy(self(x), y)

    @torch.no_grad()
    def observe(self, x: Tensor, y: Tensor) -> None:
        """Counts a minibatch together, in place of a step. Floats or uint8 (M, features), labels int64 (M,).

        Raises: TypeError for a read-out that is trained: call :meth:`loss`.
        """
        if not isinstance(self.readout, (PrototypeReadout, RidgeReadout)):
            raise TypeError("observe: expected a prototype or ridge read-out; train this one by loss(x, y)")
        self.readout.observe(self.features(x), y)

    def _trains_hidden(self) -> bool:
        return any(parameter.requires_grad for parameter in self.layers.parameters())


def _make_readout(
    readout: str | nn.Module, sizes: Sequence[int], engram: Engram | None, train_hidden: bool
) -> nn.Module | None:
    if isinstance(readout, nn.Module):
        return readout
    if readout == "linear":
        return None
    if not isinstance(readout, str):
        raise TypeError(f"readout: expected a name or a module, got {readout!r}")
    if readout not in _READOUTS:
        raise ValueError(f"readout: expected linear, {', '.join(_READOUTS)} or a module, got {readout!r}")
    if not isinstance(engram, StochasticEngram):
        raise ValueError(f"engram: expected a share of the units or a StochasticEngram with {readout}, got {engram!r}")
    if len(sizes) < 3:
        raise ValueError(f"sizes: expected a hidden layer before a {readout} read-out, got {tuple(sizes)}")
    if train_hidden and readout != "dendritic":
        raise ValueError(f"train_hidden: expected False with readout {readout}, whose units are counted")
    return _READOUTS[readout](sizes[-2], sizes[-1], engram=engram)
