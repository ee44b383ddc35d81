"""Data sets for continual learning: loaded, checked, and kept as small as they came.

Images stay uint8 in memory (MNIST: 55 MB, a quarter of its float copy); `standardize` turns one minibatch at
a time into the float input of the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..files import DamagedFileError, reason
from .extras import require
from .memory import available_bytes

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_LARGEST_IDX_BYTES = 2**30  # twenty times MNIST: a gzip file of 8 MB can hold 8 GiB
_NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_SAMPLE_ARRAYS = ("x", "x_test")

_DIGITS_SPLIT_SEED = 0
_DIGITS_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Dataset:
    """A classification data set with a fixed train/test split.

    Shapes: ``x_train`` (n, features), ``y_train`` (n,), ``x_test`` (m, features), ``y_test`` (m,).
    Types: ``x_*`` uint8 or float32, ``y_*`` int64 indices into ``classes``. ``classes`` holds the labels as
    the files give them, sorted, so that labels with holes (3, 5, 9) cost no unused network outputs.
    ``sample_shape`` is that of one sample where it came from: (28, 28) for an image, (features,) for the row of a
    table, which is also what () becomes. A row of ``x_*`` is a sample flattened, its last axis fastest.

    Raises:
        ValueError: ``sample_shape`` does not have ``features`` values.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[int, ...]
    sample_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError."""
        shape = tuple(self.sample_shape) or (self.features,)
        if math.prod(shape) != self.features:
            raise ValueError(f"sample_shape: expected a shape of {self.features} values, got {shape}")
        object.__setattr__(self, "sample_shape", shape)  # the dataclass is frozen

    @property
    def features(self) -> int:
        """Input units of a network for this data: values per sample."""
        return self.x_train.shape[1]

    @property
    def is_table(self) -> bool:
        """Whether its features may have different units: rows of numbers, but bytes of at least 64, as of an image."""
        return len(self.sample_shape) == 1 and (self.x_train.dtype != torch.uint8 or self.features < 64)

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

    Shapes: ``x_*`` (n, ...), flattened to (n, features), their shape kept as ``sample_shape``; ``y_*`` (n,) or (n, 1),
    integers >= 0.
    ``x_*`` may hold any real numbers; integers from 0 to 255 are kept as uint8, all else becomes float32.

    Raises:
        ValueError: one line that names the array, what was expected and what was got.
    """
    inputs = {"x_train": as_samples("x_train", x_train), "x_test": as_samples("x_test", x_test)}
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
    shape = common_shape(x_train.shape[1:], x_test.shape[1:])
    if shape is None:
        raise ValueError(f"x_test: expected samples of shape {x_train.shape[1:]} like x_train, got {x_test.shape[1:]}")
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
        sample_shape=shape,
    )


def common_shape(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of samples of as many values that come in two shapes; None if they differ.

    Axes of extent 1 do not count, and a row of values has no arrangement: beside it every shape is a row.
    """
    shapes = [tuple(extent for extent in shape if extent != 1) for shape in (one, other)]
    if shapes[0] == shapes[1]:
        return tuple(one)
    return (math.prod(one),) if min(map(len, shapes)) < 2 else None


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by its name on the command line.

    Args:
        name: ``digits`` (comes with scikit-learn, 8 x 8 pixels, no file needed), ``mnist``, ``fashion-mnist``
            (IDX files below ``data_dir``), or the path of an ``.npz`` file.
        data_dir: where the IDX files are; by default the environment variable ENGRAM_DATA_DIR, else ``data``.

    Raises:
        ValueError: unknown name, or a damaged file; the message names it.
        FileNotFoundError: a file is missing; the message has the names that were looked for, and the folders.
        MissingExtraError: ``digits`` without scikit-learn.
    """
    if name in DATASETS:
        return DATASETS[name](data_dir if data_dir is not None else os.environ.get("ENGRAM_DATA_DIR", "data"))
    if name.endswith(".npz"):
        return load_npz(name)
    raise ValueError(f"dataset: expected {', '.join(DATASETS)} or the path of an .npz file, got {name!r}")


def load_digits(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Scikit-learn's 1797 handwritten digits, 8 x 8 pixels with values 0 to 16.

    A fifth of each class is the test set. Scikit-learn defines no split, so ours is fixed here: stratified,
    drawn once with its own seed, independent of the seed of a run. They need no ``data_dir``.
    """
    digits = require("sklearn.datasets", "scikit-learn", "dataset digits").load_digits()
    x, y = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    random = np.random.RandomState(_DIGITS_SPLIT_SEED)  # its stream is frozen across NumPy versions
    is_test = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = random.permutation(np.flatnonzero(y == label))
        is_test[members[: round(_DIGITS_TEST_FRACTION * len(members))]] = True
    return from_arrays("digits", x[~is_test], y[~is_test], x[is_test], y[is_test])


def load_idx(data_dir: str | os.PathLike[str], name: str, torchvision_name: str) -> Dataset:
    """A data set of images from its four IDX files, gzipped or not.

    The files of MNIST are looked for in ``data_dir``/mnist, ``data_dir``/MNIST/raw (torchvision's layout) and
    ``data_dir`` itself, and alike for others.
    """
    root = Path(data_dir)
    folders = [root / name, root / torchvision_name / "raw", root]
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
            try:
                return from_arrays(name, x_train, y_train, x_test, y_test)
            except ValueError as error:
                raise ValueError(f"{error} (in {folder})") from None
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
        DamagedFileError: bad magic number, fewer or more bytes than the header announces, or more than any data set
            of this kind has. No more is read than is needed to tell.
        OSError: it can't be read.
    """
    path = Path(path)
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            start = stream.read(header)
            shape = tuple(int.from_bytes(start[at : at + 4], "big") for at in range(4, header, 4))
            size = math.prod(shape)  # Python integers: a damaged header may announce 2**96 bytes
            raw = stream.read(size + 1) if start[:4] == magic and size <= _LARGEST_IDX_BYTES else b""
    except PermissionError as error:
        raise OSError(f"{path}: can't be read ({reason(error)})") from None
    except Exception as error:  # gzip and zlib have several kinds for bytes that they can't make out
        raise DamagedFileError(f"{path}: truncated or damaged ({reason(error)}); fetch it again") from None
    if start[:4] != magic:
        raise DamagedFileError(
            f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimension(s), magic number "
            f"0x{magic.hex()}, got {'0x' + start[:4].hex() if start else 'an empty file'}; fetch it again"
        )
    if len(start) < header:
        raise DamagedFileError(
            f"{path}: expected an IDX header of {header} bytes, got a truncated file of {len(start)}; fetch it again"
        )
    if len(raw) != size:
        got = f"{header + len(raw)} (a truncated file)"
        if len(raw) > size:
            got = f"at least {header + len(raw)} (trailing bytes)"
        elif size > _LARGEST_IDX_BYTES:
            got = f"a truncated file or a damaged header (at most {_LARGEST_IDX_BYTES} bytes are read)"
        raise DamagedFileError(
            f"{path}: expected {header + size} bytes for the shape {shape} in its header, got {got}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8).reshape(shape)


def load_npz(path: str | os.PathLike[str]) -> Dataset:
    """Read x_train, y_train, x_test, y_test from a NumPy archive; nothing in it is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: not a NumPy archive, or damaged.
        ValueError: an array is missing, does not fit memory, or `from_arrays` refuses one.
        OSError: it can't be read.
    """
    path = Path(path)
    with _npz(path, "dataset") as archive:
        members = _members(archive)
        if missing := [name for name in _NPZ_ARRAYS if name not in members]:
            raise ValueError(
                f"dataset: expected the arrays {', '.join(_NPZ_ARRAYS)} in {path}, "
                f"got {', '.join(members) or 'none'} (missing: {', '.join(missing)})"
            )
        arrays = [_read_member(archive, members[name], name) for name in _NPZ_ARRAYS]
    try:
        return from_arrays(path.stem, *arrays)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from None


def read_samples(path: str | os.PathLike[str]) -> npt.NDArray[np.generic]:
    """Samples without labels from a file, an array (n, ...) of numbers.

    ``.npz``: the array ``x``, or ``x_test``, or the only one. ``.npy``: one array. ``.csv``: a sample a line, numbers
    between commas, with or without a line of names above. IDX files of unsigned bytes, gzipped if the name ends in .gz.

    Raises:
        ValueError: another kind of file, or an array that is not there.
        DamagedFileError: a damaged file.
        OSError: it can't be read.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with _npz(path, "samples") as archive:
            members = _members(archive)
            name = next((name for name in (*_SAMPLE_ARRAYS, *members) if name in members), "none")
            if name not in _SAMPLE_ARRAYS and len(members) != 1:
                raise ValueError(
                    f"samples: expected one array in {path}, or one of the name {' or '.join(_SAMPLE_ARRAYS)}, "
                    f"got {', '.join(members) or 'none'}"
                )
            return _read_member(archive, members[name], name)
    if path.suffix == ".npy":
        return _read_array(lambda: open(path, "rb"), path.stat().st_size, "samples", f"in {path}")
    if path.suffix == ".csv":
        return _read_csv(path)
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
        try:
            start = stream.read(4)
        except Exception as error:  # gzip and zlib have several kinds for bytes that they can't make out
            raise DamagedFileError(f"{path}: truncated or damaged ({reason(error)}); fetch it again") from None
    if start[:3] != bytes([0, 0, 8]) or len(start) < 4:
        raise ValueError(f"samples: expected a .npz, .npy, .csv or IDX file, got {path}")
    return read_idx(path, dimensions=start[3])


def _read_csv(path: Path) -> npt.NDArray[np.generic]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            first = stream.readline()
            names = 0 if all(map(_is_number, first.split(","))) else 1
            stream.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a file without samples, which is refused below
                table = np.loadtxt(stream, delimiter=",", skiprows=names, ndmin=2, comments=None)
    except OSError:
        raise
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"samples: expected lines of numbers between commas in {path}, got {reason(error)}") from None
    if table.size == 0:
        raise ValueError(f"samples: expected at least one line of numbers in {path}, got none")
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _npz(path: Path, argument: str) -> Iterator[zipfile.ZipFile]:
    """A NumPy archive that is there and is one; errors begin with ``argument``."""
    if not path.exists():
        raise FileNotFoundError(f"{argument}: expected an .npz file, but {path} does not exist")
    try:
        archive = zipfile.ZipFile(path)
    except (PermissionError, IsADirectoryError) as error:
        raise OSError(f"{argument}: {path} can't be read ({reason(error)})") from None
    except Exception as error:  # zipfile has many kinds for bytes that it can't make out
        raise DamagedFileError(
            f"{argument}: expected {path} to be an .npz archive, got a truncated file or another format "
            f"({reason(error)}); save it again"
        ) from None
    with archive:
        yield archive


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> npt.NDArray[np.generic]:
    return _read_array(lambda: archive.open(member), member.file_size, name, f"in {archive.filename}")


def _read_array(open_stream: Callable[[], IO[bytes]], size: int, name: str, where: str) -> npt.NDArray[np.generic]:
    """An array of a .npy file, once its header has shown that it is one of numbers and as large as its file."""
    try:
        with open_stream() as stream:
            shape, dtype = _read_header(stream)
            held = size - stream.tell()
    except Exception as error:  # zipfile, zlib and NumPy have many kinds of errors for bytes they can't read
        raise DamagedFileError(f"{name}: damaged {where} ({reason(error)}); save it again") from None
    if dtype.hasobject:
        raise ValueError(f"{name}: expected an array of numbers, got Python objects {where}")
    announced = math.prod(shape) * dtype.itemsize
    if announced != held:
        raise DamagedFileError(
            f"{name}: damaged {where} (its header announces {announced} bytes of shape {shape}, it holds {held}); "
            "save it again"
        )
    if (free := available_bytes()) is not None and announced > free:
        raise ValueError(
            f"{name}: expected an array that fits the {free} bytes of free memory, got {announced} {where}"
        )
    try:
        with open_stream() as stream:
            array: npt.NDArray[np.generic] = np.lib.format.read_array(stream, allow_pickle=False)
            stream.read()  # to the end, where the checksum is looked at
    except MemoryError:
        raise ValueError(f"{name}: expected an array that fits memory, got {announced} bytes {where}") from None
    except Exception as error:
        raise DamagedFileError(f"{name}: damaged {where} ({reason(error)}); save it again") from None
    return array


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type in a .npy file's header, which may hold anything."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # there is another one, for the names of fields
        raise ValueError(f"version {version} of the format, expected (1, 0) or (2, 0)")
    if any(extent < 0 for extent in shape):
        raise ValueError(f"shape {shape}")
    return shape, dtype


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


def as_samples(name: str, array: npt.NDArray[np.generic]) -> Tensor:
    """An array (n, ...) of real numbers as rows of features (n, features): uint8 if all are from 0 to 255, or float32.

    Raises: ValueError, which begins with ``name``.
    """
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
    """A contiguous, writable array of ``dtype``, as torch.from_numpy can share it safely."""
    result: npt.NDArray[np.generic] = np.ascontiguousarray(array, dtype=dtype)
    return result if result.flags.writeable else result.copy()


# A data set by its name on the command line, from the folder of data. Any .npz file is one too.
DATASETS: dict[str, Callable[[str | os.PathLike[str]], Dataset]] = {
    "digits": load_digits,
    "mnist": functools.partial(load_idx, name="mnist", torchvision_name="MNIST"),
    "fashion-mnist": functools.partial(load_idx, name="fashion-mnist", torchvision_name="FashionMNIST"),
}
