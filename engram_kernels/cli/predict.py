"""`engram-kernels predict`: the labels of new samples by a saved model."""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..continual.data import read_samples
from ..continual.extras import require
from ..continual.trained import TrainedModel, model_file
from ..continual.training import EVALUATION_BATCH
from ..files import reason, write_atomically
from ..packed import PackedModel, load_packed
from ..packed.file import FORMAT
from ..pretrained import CONFIG_FILE, from_pretrained
from .console import Parser

_MOST_HEADER_BYTES = 100_000_000  # which the format of safetensors sets


class Predictor(Protocol):
    """A model that was read from a file."""

    def predict(self, samples: npt.NDArray[np.generic], /) -> npt.NDArray[Any]:
        """Samples (n, ...) -> labels (n,). Raises: ValueError for samples that it can't take."""
        ...


class Kind(NamedTuple):
    """A kind of files that hold a model.

    Attributes:
        name: for people.
        recognises: whether a file is of this kind, by its beginning; it may be damaged.
        load: reads one. Raises ValueError or OSError with the name of the file.
    """

    name: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path], Predictor]


def _load_classifier(path: Path) -> Predictor:
    require("sklearn", "scikit-learn", f"{path}, an EngramClassifier,")
    from ..estimators import EngramClassifier

    return EngramClassifier.load(path)


class _Packed:
    """A packed model, as `Predictor` has it."""

    def __init__(self, model: PackedModel) -> None:
        self._model = model

    def predict(self, samples: npt.NDArray[np.generic]) -> npt.NDArray[Any]:
        """Samples (n, features) -> labels (n,). Raises: ValueError for another number of features."""
        x = torch.from_numpy(samples if samples.dtype == np.uint8 else samples.astype(np.float32))
        if x.shape[1] != self._model.features:
            raise ValueError(f"samples: expected {self._model.features} features per sample, got {x.shape[1]}")
        return np.asarray([label for part in x.split(EVALUATION_BATCH) for label in self._model.predict(part)])


class _Pretrained:
    """A module that gives a score for every class; its labels are their numbers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def predict(self, samples: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
        """Samples (n, features) -> labels (n,). Raises: ValueError for samples that the model refuses."""
        x = torch.from_numpy(samples.astype(np.float32))
        try:
            scores = torch.cat([self._model(part) for part in x.split(EVALUATION_BATCH)])
        except RuntimeError as error:
            raise ValueError(
                f"samples: expected samples that the model takes, got {x.shape[1]} features per sample ({reason(error)})"
            ) from None
        if scores.dim() != 2 or not scores.is_floating_point():
            raise ValueError(
                f"model: expected one that gives scores of shape (samples, classes), got {scores.dtype} "
                f"{tuple(scores.shape)}"
            )
        return scores.argmax(dim=1).numpy()


def _load_folder(path: Path) -> Predictor:
    if (path / CONFIG_FILE).is_file():
        model = from_pretrained(path)
        return _Pretrained(model) if isinstance(model, nn.Module) else model
    return load(model_file(path))


KINDS = (
    Kind("a folder of save_pretrained or of a run", Path.is_dir, _load_folder),
    Kind(
        "a file of EngramClassifier.save",
        lambda path: safetensors_format(path) == "engram_kernels.EngramClassifier",
        _load_classifier,
    ),
    Kind(
        "a packed model",
        lambda path: safetensors_format(path) == FORMAT,
        lambda path: _Packed(load_packed(path)),
    ),
    Kind("model.pt or checkpoint.pt of a training run", zipfile.is_zipfile, TrainedModel.load),
)


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="labels of new samples by a saved model",
        description="Print the label of each sample of FILE, one a line, by the model in MODEL.",
    )
    parser.add_argument(
        "model", metavar="MODEL",
        help="a file of EngramClassifier.save or of pack, the model that train --save-model writes, a run's "
        "checkpoint.pt, or the folder of a run or of save_pretrained",
    )  # fmt: skip
    parser.add_argument(
        "file", metavar="FILE",
        help=".npz (its array x, or x_test, or the only one), .npy, .csv (a sample a line, no label), or an IDX file; "
        "samples like those of training, neither permuted nor rotated",
    )  # fmt: skip
    parser.add_argument("--out", metavar="PATH", default=argparse.SUPPRESS, help="write the labels there instead")
    parser.add_argument(
        "--threads", type=int, metavar="N", default=argparse.SUPPRESS, help="CPU threads (default: torch's)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Predicts; returns the exit code."""
    chosen = vars(options)
    if (threads := chosen.get("threads")) is not None:
        if threads < 1:
            raise ValueError(f"threads: expected an integer >= 1, got {threads}")
        torch.set_num_threads(threads)
    model = load(options.model)
    samples = read_samples(options.file)
    if samples.dtype.kind not in "buif" or samples.ndim < 2 or samples.size == 0:
        raise ValueError(
            f"samples: expected real numbers of shape (samples, ...) in {options.file}, "
            f"got {samples.dtype} of shape {samples.shape}"
        )
    try:
        labels = model.predict(samples.reshape(len(samples), -1))
    except ValueError as error:
        raise ValueError(f"{error} (in {options.file})") from None
    lines = "".join(f"{label}\n" for label in labels.tolist())
    if "out" in chosen:
        write_atomically(options.out, lines.encode())
    else:
        print(lines, end="")
    return 0


def load(path: str | os.PathLike[str]) -> Predictor:
    """The model in a file, or in the folder of a run or of `save_pretrained`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file of another kind, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"model: expected a file or a folder, but {path} does not exist")
    for kind in KINDS:
        if kind.recognises(path):
            return kind.load(path)
    raise ValueError(f"model: expected {', '.join(kind.name for kind in KINDS)}, got {path}")


def safetensors_format(path: Path) -> str | None:
    """The ``format`` in a safetensors file's metadata, by its beginning alone; None for another file.

    Raises: OSError if it can't be read.
    """
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size <= _MOST_HEADER_BYTES else {}
        return str(header["__metadata__"]["format"])
    except OSError as error:
        raise OSError(f"model: {path} can't be read ({reason(error)})") from None
    except (ValueError, KeyError, TypeError):
        return None
