"""Models as folders, in the manner of Hugging Face: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .convolution import BinaryEngramConv2d
from .encoding import InputEncoding
from .engrams import BernoulliEngram, ContextEngram, StochasticEngram
from .files import write_atomically, write_tensors
from .layers import BinaryEngramLinear
from .networks import EngramMLP
from .readouts import DendriticReadout, PrototypeReadout, RidgeReadout

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_MODEL_TYPE, _VERSION = "engram_kernels", 1
_CLASSIFIER = "EngramClassifier"

# What a model may be made of. The settings of a part are its constructor's arguments, found as attributes of their
# names. A folder can name nothing else, so that one from anywhere runs no code of its own.
_PARTS = {
    kind.__name__: kind
    for kind in (
        BernoulliEngram, BinaryEngramConv2d, BinaryEngramLinear, ContextEngram, DendriticReadout, EngramMLP,
        InputEncoding, PrototypeReadout, RidgeReadout, StochasticEngram,
        nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.GELU,
        nn.GroupNorm, nn.Hardtanh, nn.Identity, nn.LayerNorm, nn.Linear, nn.MaxPool2d, nn.ReLU, nn.Sequential, nn.Tanh,
        nn.Unflatten,
    )
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a model with its engrams and read-outs to a folder: ``config.json`` and ``model.safetensors``.

    The folder is what Hugging Face's libraries call a pretrained model: ``huggingface_hub.upload_folder`` shares it,
    ``snapshot_download`` fetches it. Other files in it stay. What is set for a process or a task alone is not kept: an
    engram's ``first_row`` and ``context``, optimizers, and hooks.

    Args:
        model: an :class:`~engram_kernels.EngramMLP`, an :class:`~engram_kernels.EngramClassifier`, a read-out, a layer,
            or an ``nn.Sequential`` of these and of torch's usual layers.
        folder: made if it is not there.

    Raises: TypeError for a module of another class, which the message names, since its code is not kept; ValueError for
    a weight that something computes or that two layers share.

    >>> import tempfile
    >>> model = ek.EngramMLP((784, 256, 10)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ek.save_pretrained(model, folder)
    ...     again = ek.from_pretrained(folder)
    >>> x = torch.randn(5, 784)
    >>> torch.equal(again(x), model(x))
    True
    """
    folder = Path(folder)
    config: dict[str, Any] = {"model_type": _MODEL_TYPE, "architectures": [type(model).__name__], "version": _VERSION}
    if type(model).__name__ == _CLASSIFIER and not isinstance(model, nn.Module):
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / WEIGHTS_FILE)
    else:
        modules: list[dict[str, Any]] = []
        _describe(model, "model", modules, {})
        names = _tensor_names(model)
        state = model.state_dict()
        tensors = {name: state[name].cpu() for name in names}
        config["frozen"] = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        config["modules"] = modules
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


def from_pretrained(folder: str | os.PathLike[str]) -> Any:
    """The model that :func:`save_pretrained` wrote to a folder, on the CPU and in evaluation mode.

    Parameters that were frozen are; modules that were shared are. Reading runs no code of the folder's.

    Raises: FileNotFoundError for a folder without the two files; ValueError for files that are damaged, of another
    kind, newer, or not of the same model.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ek.save_pretrained(ek.BinaryEngramLinear(8, 4), folder)
    ...     ek.from_pretrained(folder)
    BinaryEngramLinear(in_features=8, out_features=4, bias=True)
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    if config.get("architectures") == [_CLASSIFIER]:
        from .estimators import EngramClassifier

        return EngramClassifier.load(folder / WEIGHTS_FILE)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"folder: expected {WEIGHTS_FILE} in {folder}, found none")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got a damaged or foreign one ({error})") from None
    try:
        made: list[nn.Module] = []
        for entry in config["modules"]:
            made.append(_make(entry, made))
        model = made[-1]
        for name in config["frozen"]:
            model.get_parameter(name).requires_grad_(False)
        names, state = _tensor_names(model), model.state_dict(keep_vars=True)
        for name in sorted(names ^ tensors.keys()):
            raise ValueError(f"{name}: expected in both files or in none")
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name}: expected {tuple(state[name].shape)}, got {tuple(tensor.shape)}")
            state[name].data = state[name].data.to(tensor.dtype)
        model.load_state_dict(tensors, strict=False)  # shared modules have names more than one
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE} of one model ({error})") from None
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"folder: expected {CONFIG_FILE} in {path.parent}, found none") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got another text ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != _MODEL_TYPE:
        raise ValueError(f"{path}: expected model_type {_MODEL_TYPE}, got a model of another library")
    if not isinstance(config.get("version"), int) or config["version"] > _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION} at most, got {config.get('version')!r}")
    return config


# ---- a module as settings


def _describe(module: nn.Module, place: str, modules: list[dict[str, Any]], known: dict[int, int]) -> dict[str, int]:
    """Appends a module to the list, those it is made of before it; returns how settings refer to it."""
    if id(module) in known:
        return {"module": known[id(module)]}
    name = type(module).__name__
    if _PARTS.get(name) is not type(module):
        raise TypeError(f"{place}: expected one of {', '.join(sorted(_PARTS))}, got {name}, whose code is not kept")
    if isinstance(module, nn.Sequential):
        children = {key: _describe(child, f"{place}.{key}", modules, known) for key, child in module._modules.items()}
        entry: dict[str, Any] = {"class": name, "children": children}
    else:
        settings = {key: _encode(value, f"{place}.{key}", modules, known) for key, value in _settings(module).items()}
        entry = {"class": name, "settings": settings}
    modules.append(entry)
    known[id(module)] = len(modules) - 1
    return {"module": known[id(module)]}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The arguments of a module's constructor that make another of its kind."""
    settings: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "bias":
            settings[name] = module.bias is not None
        elif hasattr(module, name):
            settings[name] = getattr(module, name)
    if isinstance(module, EngramMLP):
        first = module.layers[0]
        settings |= {
            "readout": "linear" if module.readout is None else module.readout,
            "train_hidden": any(parameter.requires_grad for parameter in module.layers.parameters()),
            "ste_window": first.ste_window,
            "backward_dtype": first.backward_dtype,
            "balanced": False,  # the weights are read
            "encode": module.encoding is not None,
        }
    return settings


def _encode(value: Any, place: str, modules: list[dict[str, Any]], known: dict[int, int]) -> Any:
    if isinstance(value, nn.Module):
        return _describe(value, place, modules, known)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, (tuple, list)):
        return [_encode(item, place, modules, known) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place}: expected a number, a text, a dtype or a module, got {value!r}")


def _make(entry: dict[str, Any], made: list[nn.Module]) -> nn.Module:
    kind = _PARTS.get(entry["class"])
    if kind is None:
        raise ValueError(f"class: expected one of {', '.join(sorted(_PARTS))}, got {entry['class']!r}")
    if kind is nn.Sequential:
        model = nn.Sequential()
        for key, child in entry["children"].items():
            model.add_module(key, _decode(child, made))
        return model
    return kind(**{name: _decode(value, made) for name, value in entry["settings"].items()})


def _decode(value: Any, made: list[nn.Module]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, made) for item in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "module":
        return made[content]
    return {"dtype": lambda: _DTYPES[content], "number": lambda: float(content)}[kind]()


def _tensor_names(model: nn.Module) -> set[str]:
    """Names in ``state_dict`` of every tensor, once each.

    Raises: ValueError for a parameter of two modules, which would come back as two, and for a weight that is computed.
    """
    owners: dict[int, str] = {}
    names: set[str] = set()
    state = model.state_dict()
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters:
            raise ValueError(f"{prefix}.weight: expected a parameter, got a weight that something computes")
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{own}" if prefix else own
            if tensor is None or name not in state:
                continue
            if owners.setdefault(id(tensor), name) != name:
                raise ValueError(f"{name}: expected a tensor of one module alone, got that of {owners[id(tensor)]}")
            names.add(name)
    return names
