"""Binary layers in place of a model's linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .convolution import BinaryEngramConv2d
from .hidden_weight import as_hidden_weight
from .layers import BinaryEngramLinear

_Layer = nn.Linear | nn.Conv2d


def convert(model: nn.Module, where: Callable[[str, _Layer], bool] | None = None, **settings: Any) -> nn.Module:
    """Puts a binary layer in the place of every ``nn.Linear`` and ``nn.Conv2d`` of a model.

    They become :class:`~engram_kernels.BinaryEngramLinear` and :class:`~engram_kernels.BinaryEngramConv2d`. Weights and
    biases stay the parameters that they were, so that optimizers which hold them still do; the memory of filters is
    put into channels last. A layer that stands in two places stays one.

    Args:
        model: changed in place, but for a layer itself, which becomes the one that is returned.
        where: which layers, by their name in the model (as in ``named_modules``) and the layer; None: all of them.
        settings: keyword arguments of the layers: ``engram``, ``binary_input``, ``scaled``, ``ste_window``, ...

    Returns: the model.
    Raises: ValueError if no layer was replaced; what the layers raise for a setting, a dtype or a padding mode. Then
    nothing has been replaced.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> convert(model, lambda name, layer: name != "0")[2]
    BinaryEngramLinear(in_features=4, out_features=2, bias=True)
    """
    # a class derived from nn.Linear may compute something else
    places = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) in (nn.Linear, nn.Conv2d)}
    chosen = {name: layer for name, layer in places.items() if where is None or where(name, layer)}
    if not chosen:
        raise ValueError(
            "model: expected an nn.Linear or nn.Conv2d to replace, got none for which where(name, layer) is true"
        )
    binary = {layer: _on_meta(layer, settings) for layer in dict.fromkeys(chosen.values())}
    for layer, own in binary.items():
        own.weight, own.bias = as_hidden_weight(layer.weight, layer.weight.dim()), layer.bias
        own.train(layer.training)
    for name, layer in chosen.items():
        if not name:
            return binary[layer]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, binary[layer])
    return model


def _on_meta(layer: _Layer, settings: dict[str, Any]) -> BinaryEngramLinear | BinaryEngramConv2d:
    """The binary layer of the same sizes, without memory."""
    common: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return BinaryEngramLinear(layer.in_features, layer.out_features, **common, **settings)
    return BinaryEngramConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        padding_mode=layer.padding_mode,
        **common,
        **settings,
    )
