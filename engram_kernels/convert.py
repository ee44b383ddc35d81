"""Binary layers in place of a model's linear ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .hidden_weight import as_hidden_weight
from .layers import BinaryEngramLinear


def convert(model: nn.Module, where: Callable[[str, nn.Linear], bool] | None = None, **settings: Any) -> nn.Module:
    """Puts a :class:`~engram_kernels.BinaryEngramLinear` in the place of every ``nn.Linear`` of a model.

    Weights and biases stay the parameters that they were, so that optimizers which hold them still do; a layer that
    stands in two places stays one. An ``nn.Linear`` itself becomes the layer that is returned.

    Args:
        model: changed in place, but for an ``nn.Linear`` itself.
        where: which layers, by their name in the model (as in ``named_modules``) and the layer; None: all of them.
        settings: keyword arguments of the layers: ``engram``, ``binary_input``, ``scaled``, ``ste_window``, ...

    Returns: the model.
    Raises: ValueError if no layer was replaced; what the layers raise for a setting or a dtype.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> convert(model, lambda name, layer: name != "0")[2]
    BinaryEngramLinear(in_features=4, out_features=2, bias=True)
    """
    # a class derived from nn.Linear may compute something else
    places = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    chosen = {name: layer for name, layer in places.items() if where is None or where(name, layer)}
    if not chosen:
        raise ValueError("model: expected an nn.Linear to replace, got none for which where(name, layer) is true")
    binary = {layer: _binary_layer(layer, settings) for layer in dict.fromkeys(chosen.values())}
    for name, layer in chosen.items():
        if not name:
            return binary[layer]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, binary[layer])
    return model


def _binary_layer(linear: nn.Linear, settings: dict[str, Any]) -> BinaryEngramLinear:
    dtype = linear.weight.dtype
    layer = BinaryEngramLinear(
        linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=dtype, **settings
    )
    layer.weight, layer.bias = as_hidden_weight(linear.weight), linear.bias  # type: ignore[arg-type]
    return layer.train(linear.training)
