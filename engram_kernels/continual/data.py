"""Data sets for continual learning: loaded, checked, and kept as small as they came.

Images stay uint8 in memory (MNIST: 55 MB, a quarter of its float copy); `standardize` turns one minibatch at
a time into the float input of the network.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .extras import require

IDX_DATASETS = {
    # name: folders looked in below the data directory, first match wins; the second one is torchvision's
    # layout
    "mnist": ("mnist", "MNIST/raw", "."),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "."),
}
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")

_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Dataset:
    """A classification data set with a fixed train/test split.

    Shapes: ``x_train`` (n, features), ``y_train`` (n,), ``x_test`` (m, features), ``y_test`` (m,).
    Types: ``x_*`` uint8 or float32, ``y_*`` int64 indices into ``classes``. ``classes`` holds the labels as
    the files give them, sorted, so that labels with holes (3, 5, 9) cost no unused network outputs.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[int, ...]

    @property
    def features(self) -> int:
        """Input units of a network for this data: values per sample."""
        return self.x_train.shape[1]

    @property
    def num_classes(self) -> int:
        """Output units of a network for this data."""
        return len(self.classes)


def from_arrays(
    name: str,
    x_train: npt.NDArray[np.generic],
    y_train: npt.NDArray[np.generic],
    x_test: npt.NDArray[np.generic],
    y_test: npt.NDArray[np.generic],
) -> Dataset:
    """Check four arrays and make a `Dataset` of them.

    Shapes: ``x_*`` (n, ...), flattened to (n, features); ``y_*`` (n,) or (n, 1), integers >= 0.
    ``x_*`` may hold any real numbers; integers from 0 to 255 are kept as uint8, all else becomes float32.

    Raises:
        ValueError: one line that names the array, what it got and what it needs.
    """
    inputs = {"x_train": _check_inputs("x_train", x_train), "x_test": _check_inputs("x_test", x_test)}
    labels = {"y_train": _check_labels("y_train", y_train), "y_test": _check_labels("y_test", y_test)}
    for part in ("train", "test"):
        x, y = inputs[f"x_{part}"], labels[f"y_{part}"]
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"y_{part}: expected one label per sample of x_{part} ({x.shape[0]}), got {y.shape[0]}")
    if inputs["x_train"].shape[1] != inputs["x_test"].shape[1]:
        raise ValueError(
            f"x_test: expected {inputs['x_train'].shape[1]} features per sample like x_train, "
            f"got {inputs['x_test'].shape[1]}"
        )
    classes = torch.unique(labels["y_train"])
    tested = torch.unique(labels["y_test"])
    if not torch.equal(classes, tested):
        unknown = sorted(set(tested.tolist()) - set(classes.tolist()))
        untested = sorted(set(classes.tolist()) - set(tested.tolist()))
        difference = f"label {unknown[0]}, which y_train lacks" if unknown else f"no sample of label {untested[0]}"
        raise ValueError(f"y_test: expected the same labels as y_train ({len(classes)} of them), got {difference}")
    if len(classes) < 2:
        raise ValueError(f"y_train: expected at least 2 different labels, got only {classes[0].item()}")
    return Dataset(
        name=name,
        x_train=inputs["x_train"],
        y_train=torch.searchsorted(classes, labels["y_train"]),
        x_test=inputs["x_test"],
        y_test=torch.searchsorted(classes, labels["y_test"]),
        classes=tuple(classes.tolist()),
    )


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by its name on the command line.

    Args:
        name: ``digits`` (comes with scikit-learn, 8 x 8 pixels, no file needed), ``mnist``, ``fashion-mnist``
            (IDX files below ``data_dir``), or the path of an ``.npz`` file.
        data_dir: where the IDX files are; by default the environment variable ENGRAM_DATA_DIR, else ``data``.

    Raises:
        ValueError: unknown name, or a file that is not what it should be.
        FileNotFoundError: a file is missing; the message says which names were looked for, and where.
        MissingExtraError: ``digits`` without scikit-learn.
    """
    if name == "digits":
        return load_digits()
    if name in IDX_DATASETS:
        return load_idx(name, data_dir if data_dir is not None else os.environ.get("ENGRAM_DATA_DIR", "data"))
    if name.endswith(".npz"):
        return load_npz(name)
    raise ValueError(f"dataset: expected digits, {', '.join(IDX_DATASETS)} or the path of an .npz file, got {name!r}")


def load_digits() -> Dataset:
    """Scikit-learn's 1797 handwritten digits, 8 x 8 pixels with values 0 to 16.

    A fifth of each class is the test set. Scikit-learn defines no split, so ours is fixed here: stratified,
    drawn once with its own seed, independent of the seed of a run.
    """
    digits = require("sklearn.datasets", "scikit-learn", "dataset digits").load_digits()
    x, y = digits.data.astype(np.uint8), digits.target.astype(np.int64)
    random = np.random.RandomState(_DIGITS_SPLIT_SEED)  # its stream is frozen across NumPy versions
    is_test = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = random.permutation(np.flatnonzero(y == label))
        is_test[members[: round(_DIGITS_TEST_FRACTION * len(members))]] = True
    return from_arrays("digits", x[~is_test], y[~is_test], x[is_test], y[is_test])


def load_idx(name: str, data_dir: str | os.PathLike[str]) -> Dataset:
    """MNIST or Fashion-MNIST from their four IDX files, gzipped or not.

    Looked for in ``data_dir``/mnist, ``data_dir``/MNIST/raw (torchvision's layout) and ``data_dir`` itself,
    and alike for Fashion-MNIST.
    """
    root = Path(data_dir)
    folders = [root / folder for folder in IDX_DATASETS[name]]
    missing: list[str] = list(_IDX_FILES)
    for folder in folders:
        found = {file: path for file in _IDX_FILES if (path := _find_idx(folder, file)) is not None}
        if len(found) == len(_IDX_FILES):
            x_train, y_train, x_test, y_test = (
                read_idx(found[file], dimensions=3 if "images" in file else 1) for file in _IDX_FILES
            )
            for part, x, y in (("train", x_train, y_train), ("t10k", x_test, y_test)):
                if len(x) != len(y):
                    raise ValueError(
                        f"{found[f'{part}-labels-idx1-ubyte']}: expected {len(x)} labels, as many as "
                        f"there are images in {found[f'{part}-images-idx3-ubyte'].name}, got {len(y)}"
                    )
            return from_arrays(name, x_train, y_train, x_test, y_test)
        missing = min(missing, [file for file in _IDX_FILES if file not in found], key=len)
    raise FileNotFoundError(
        f"data_dir: {name} needs {', '.join(missing)} (each also with .gz); "
        f"looked in {', '.join(str(folder) for folder in folders)}"
    )


def _find_idx(folder: Path, file: str) -> Path | None:
    names = (file, f"{file}.gz", file.replace("-idx", ".idx"))  # some mirrors write train-images.idx3-ubyte
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: str | os.PathLike[str], dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, gzipped if its name ends in .gz.

    The format (LeCun's MNIST page): two zero bytes, a type code (8 = unsigned byte), the number of
    dimensions, each dimension as a big-endian 32-bit integer, then the values in row-major order.

    Args:
        path: the file.
        dimensions: how many the file must have: 3 for images, 1 for labels.

    Raises:
        ValueError: bad magic number, or fewer or more bytes than the header announces.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            raw = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a complete gzip file, got a truncated or damaged one ({error})") from None
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if raw[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimension(s), magic number "
            f"0x{magic.hex()}, got {'0x' + raw[:4].hex() if raw else 'an empty file'}"
        )
    if len(raw) < header:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes, got a truncated file of {len(raw)}")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    size = header + math.prod(shape)  # Python integers: a damaged header may announce 2**96 bytes
    if len(raw) != size:
        state = "a truncated file" if len(raw) < size else "trailing bytes"
        raise ValueError(
            f"{path}: expected {size} bytes for the shape {tuple(shape)} in its header, got {len(raw)} ({state})"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def load_npz(path: str | os.PathLike[str]) -> Dataset:
    """Read x_train, y_train, x_test, y_test from a NumPy archive; nothing in it is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a NumPy archive, damaged, an array is missing, or `from_arrays` refuses one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"dataset: expected an .npz file, but {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"dataset: expected {path} to be an .npz archive, got a truncated file or another format")
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [name for name in _NPZ_ARRAYS if name not in archive.files]:
                raise ValueError(
                    f"dataset: expected the arrays {', '.join(_NPZ_ARRAYS)} in {path}, "
                    f"got {', '.join(archive.files) or 'none'} (missing: {', '.join(missing)})"
                )
            for name in _NPZ_ARRAYS:
                try:
                    arrays[name] = archive[name]
                except ValueError as error:
                    if "pickle" in str(error):
                        raise ValueError(f"{name}: expected an array of numbers, got Python objects") from None
                    raise ValueError(f"{name}: damaged in {path} ({error})") from None
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"dataset: expected a complete .npz file, {path} is damaged ({error})") from None
    return from_arrays(path.stem, *(arrays[name] for name in _NPZ_ARRAYS))


def hold_out(dataset: Dataset, samples: int) -> Dataset:
    """A data set to choose hyper-parameters with: they must not be chosen on the test set.

    Its test set is the last ``samples`` training samples of ``dataset``, its training set the rest. Neither is a copy;
    the test set of ``dataset`` is not in it.

    Raises:
        ValueError: no sample left on one side, or none of some label.
    """
    total = len(dataset.y_train)
    if not 1 <= samples < total:
        raise ValueError(
            f"validation: expected from 1 to {total - 1} of the {total} training samples of {dataset.name}, "
            f"got {samples}"
        )
    y_train, y_test = dataset.y_train[:-samples], dataset.y_train[-samples:]
    for y, part in ((y_test, "among"), (y_train, "before")):
        absent = (y.bincount(minlength=dataset.num_classes) == 0).nonzero().flatten().tolist()
        if absent:
            raise ValueError(
                f"validation: expected samples of every label both among and before the last {samples} training "
                f"samples of {dataset.name}, got none of label {dataset.classes[absent[0]]} {part} them"
            )
    return dataclasses.replace(
        dataset,
        x_train=dataset.x_train[:-samples],
        y_train=y_train,
        x_test=dataset.x_train[-samples:],
        y_test=y_test,
    )


def joined_name(datasets: Sequence[Dataset]) -> str:
    """One name for a stream of data sets, short enough for a file's."""
    names = [dataset.name for dataset in datasets]
    return "+".join(names if len(names) <= 3 else [names[0], f"{len(names) - 1}-more"])


def standardize(x: Tensor) -> Tensor:
    """Per-sample standardisation, ``(x - mean) / std``, of one minibatch.

    Shapes: (B, features) uint8 or float32 -> (B, features) float32. The mean and the (population) deviation
    are over the features of each sample; a constant sample becomes zeros. Nothing is learned from other
    samples, so a test sample is treated alike whatever came before or beside it.
    """
    x = x.to(torch.float32)
    # Scaling to [-1, 1] first keeps the variance inside float32 for data of any magnitude.
    peak = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(peak > 0, peak, 1.0)
    x -= x.mean(dim=1, keepdim=True)
    deviation = x.square().mean(dim=1, keepdim=True).sqrt()
    # Below this the deviation of a constant sample is rounding noise, which must not be amplified.
    x /= torch.where(deviation > 1e-5, deviation, torch.inf)
    return x


def _check_inputs(name: str, array: npt.NDArray[np.generic]) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name}: expected an array of real numbers, got dtype {array.dtype}")
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"{name}: expected a non-empty array of shape (samples, ...), got shape {array.shape}")
    flat = array.reshape(len(array), -1)
    if flat.dtype.kind == "b" or (flat.dtype.kind in "ui" and flat.min() >= 0 and flat.max() <= 255):
        return torch.from_numpy(_owned(flat, np.uint8))
    with np.errstate(over="ignore"):  # an overflow becomes inf, which is reported below
        x = torch.from_numpy(_owned(flat, np.float32))
    finite = torch.isfinite(x)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"{name}: expected finite float32 values, got {bad} that are not (nan, inf or too large)")
    return x


def _check_labels(name: str, array: npt.NDArray[np.generic]) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "ui":
        raise ValueError(f"{name}: expected integer labels, got dtype {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a non-empty array of shape (samples,), got shape {array.shape}")
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0 or largest > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected labels >= 0 that fit int64, got {smallest if smallest < 0 else largest}")
    return torch.from_numpy(_owned(array, np.int64))


def _owned(array: npt.NDArray[np.generic], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """A contiguous, writable array of ``dtype``: what torch.from_numpy can share safely."""
    result: npt.NDArray[np.generic] = np.ascontiguousarray(array, dtype=dtype)
    return result if result.flags.writeable else result.copy()


def names() -> Sequence[str]:
    """The data sets that have a name; any .npz file is one too."""
    return ("digits", *IDX_DATASETS)
