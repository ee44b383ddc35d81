"""The file of a packed model, ``docs/packed-format.md``."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors
from .layers import KINDS, PackedLayer
from .model import PackedModel

FORMAT = "engram_kernels.packed"
VERSION = 2


def save(model: PackedModel, path: str | os.PathLike[str]) -> None:
    """Writes a model in one step: a reader finds the file before or the file after."""
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, PackedLayer)
        layers.append(layer.described())
        tensors |= {f"{i}.{name}": tensor for name, tensor in layer.tensors().items()}
    network = {"features": model.features, "labels": model.labels, "layers": layers, "settings": model.settings}
    version = max(layer.version for layer in model.layers if isinstance(layer, PackedLayer))  # that older readers know
    metadata = {"format": FORMAT, "version": str(version), "network": json.dumps(network)}
    write_tensors(path, tensors, metadata)


def load_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Reads what :meth:`PackedModel.save` wrote. Its tensors are mapped: read when they are used, shared by processes.

    Raises: OSError if there is no such file, or it can't be read; ValueError for one that is damaged, of another kind
    or newer, or whose layers do not make a network. The message names the file.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> packed = ek.pack(ek.EngramMLP((64, 256, 10), readout="linear"), labels=list("0123456789"))
    >>> packed.save(path)
    >>> x = torch.randn(2, 64)
    >>> ek.load_packed(path).predict(x) == packed.predict(x)
    True
    """
    with open(path, "rb"):  # an error of the system for a file that can't be read
        pass
    try:
        with safe_open(path, "pt") as file:
            network = _network(file.metadata() or {}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole packed model, got a damaged or foreign file ({error})") from None
    try:
        return _model(network, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _network(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        got = metadata.get("format", "a safetensors file without a format")
        raise ValueError(f"{path}: expected a packed model, format {FORMAT}, got {got}")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) < 1:
        raise ValueError(f"{path}: expected a version of the format from 1 on, got {version!r}")
    if int(version) > VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION} of the format at most, got {version}; a newer engram_kernels wrote it"
        )
    try:
        network = json.loads(metadata["network"])
    except (KeyError, ValueError):
        raise ValueError(f"{path}: expected a description of the network as JSON, got none") from None
    if not isinstance(network, dict):
        raise ValueError(f"{path}: expected a description of the network as an object, got {network!r}")
    return network


def _model(network: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PackedModel:
    described, features, labels, settings = (network.get(name) for name in ("layers", "features", "labels", "settings"))
    if not isinstance(described, list) or not described:
        raise ValueError(f"layers: expected a list of layers, got {described!r}")
    if not isinstance(features, int) or isinstance(features, bool) or features < 1:
        raise ValueError(f"features: expected an integer of at least 1, got {features!r}")
    if labels is not None and not isinstance(labels, list):
        raise ValueError(f"labels: expected a list or null, got {labels!r}")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"settings: expected an object, got {settings!r}")
    of_layers: list[dict[str, torch.Tensor]] = [{} for _ in described]
    for name, tensor in tensors.items():
        number, _, own = name.partition(".")
        if not number.isdecimal() or int(number) >= len(described) or not own:
            raise ValueError(f"tensors: expected names of the {len(described)} layers, got {name}")
        of_layers[int(number)][own] = tensor
    layers = []
    for i, (fields, own_tensors) in enumerate(zip(described, of_layers, strict=True)):
        if not isinstance(fields, dict) or fields.get("kind") not in KINDS:
            raise ValueError(f"layer {i}: expected a kind of {', '.join(KINDS)}, got {fields!r}")
        own_fields = {name: value for name, value in fields.items() if name != "kind"}
        layers.append(KINDS[fields["kind"]](f"layer {i}", own_fields, own_tensors))
    return PackedModel(features, layers, labels=labels, settings=settings)
