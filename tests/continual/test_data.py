"""Loading: what comes in comes out unchanged, and what is wrong is said in one line."""

import gzip
import math
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual import data
from engram_kernels.encoding import standardize

REAL_DATA = Path(os.environ.get("ENGRAM_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))


def idx(array, type_code=8):
    """An IDX file's bytes."""
    shape = b"".join(struct.pack(">I", extent) for extent in array.shape)
    return bytes([0, 0, type_code, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def small_mnist(images=20, tests=10):
    """The content of the four files, 4 x 5 pixels, labels 0 and 1."""
    random = np.random.RandomState(0)
    return {
        "train-images-idx3-ubyte": random.randint(0, 256, (images, 4, 5)),
        "train-labels-idx1-ubyte": np.arange(images) % 2,
        "t10k-images-idx3-ubyte": random.randint(0, 256, (tests, 4, 5)),
        "t10k-labels-idx1-ubyte": np.arange(tests) % 2,
    }


def write_mnist(folder, files, gzipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in files.items():
        content = array if isinstance(array, bytes) else idx(array)
        if gzipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def arrays(**changes):
    """Four valid arrays of an .npz file, some replaced."""
    random = np.random.RandomState(1)
    valid = {
        "x_train": random.randint(0, 256, (12, 3, 4)).astype(np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": random.randint(0, 256, (6, 3, 4)).astype(np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {**valid, **changes}


@pytest.mark.parametrize("gzipped", [False, True], ids=["raw", "gzipped"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "."),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_in_every_layout(tmp_path, name, folder, gzipped):
    files = small_mnist()
    write_mnist(tmp_path / folder, files, gzipped)
    dataset = data.load(name, tmp_path)
    assert (dataset.name, dataset.features, dataset.classes) == (name, 20, (0, 1))
    assert dataset.sample_shape == (4, 5)
    assert dataset.x_train.dtype == torch.uint8
    assert dataset.y_train.dtype == torch.int64
    np.testing.assert_array_equal(dataset.x_train.numpy(), files["train-images-idx3-ubyte"].reshape(20, 20))
    np.testing.assert_array_equal(dataset.y_train.numpy(), files["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(dataset.x_test.numpy(), files["t10k-images-idx3-ubyte"].reshape(10, 20))
    np.testing.assert_array_equal(dataset.y_test.numpy(), files["t10k-labels-idx1-ubyte"])


def test_the_folder_named_after_the_dataset_comes_first(tmp_path):
    """With both in one data directory, each name gets its own files."""
    for folder, value in (("mnist", 1), ("fashion-mnist", 2)):
        files = small_mnist()
        files["train-images-idx3-ubyte"][:] = value
        write_mnist(tmp_path / folder, files)
    assert (data.load("mnist", tmp_path).x_train == 1).all()
    assert (data.load("fashion-mnist", tmp_path).x_train == 2).all()


def test_the_data_directory_defaults_to_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path, small_mnist())
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(tmp_path))
    assert data.load("mnist").features == 20


def test_missing_idx_files_are_named_with_where_they_were_looked_for(tmp_path):
    files = small_mnist()
    del files["t10k-labels-idx1-ubyte"]
    write_mnist(tmp_path / "mnist", files)
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist", tmp_path)
    message = str(caught.value)
    assert "t10k-labels-idx1-ubyte" in message
    assert "train-images" not in message, "only what is missing is named"
    for folder in ("mnist", "MNIST/raw"):
        assert str(tmp_path / folder) in message


GOOD = idx(np.zeros((20, 4, 5)))


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("train-images-idx3-ubyte", b"", "got an empty file"),
        ("train-images-idx3-ubyte", GOOD[:9], "header of 16 bytes, got a truncated file of 9"),
        ("train-images-idx3-ubyte", GOOD[:-1], r"expected 416 bytes .* got 415 \(a truncated file\)"),
        ("train-images-idx3-ubyte", GOOD + b"\0", r"expected 416 bytes .* got at least 417 \(trailing bytes\)"),
        ("train-images-idx3-ubyte", idx(np.zeros(20)), "magic number 0x00000803, got 0x00000801"),
        (
            "train-images-idx3-ubyte",
            idx(np.zeros((20, 4, 5)), 0x0D),
            "magic number 0x00000803, got 0x00000d03",
        ),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "a truncated file"),
        ("train-images-idx3-ubyte", idx(np.zeros((0, 4, 5))), "expected 0 labels, .* got 20"),
        ("train-labels-idx1-ubyte", idx(np.zeros(19)), "expected 20 labels, .* got 19"),
        ("train-labels-idx1-ubyte", idx(np.zeros((20, 1))), "magic number 0x00000801, got 0x00000802"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((10, 4, 4))), "x_test: expected 20 features .* got 16"),
        ("t10k-labels-idx1-ubyte", idx(np.arange(10)), "y_test: expected the same labels as y_train"),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True], ids=["raw", "gzipped"])
def test_damaged_idx_files(tmp_path, name, content, wanted, gzipped):
    write_mnist(tmp_path, {**small_mnist(), name: content}, gzipped)
    with pytest.raises(ValueError, match=wanted) as caught:
        data.load("mnist", tmp_path)
    assert "\n" not in str(caught.value)


@given(cut=st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_a_gzip_file_cut_anywhere_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "train-images-idx3-ubyte.gz"
    whole = gzip.compress(idx(np.random.RandomState(0).randint(0, 256, (20, 4, 5))), mtime=0)
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.read_idx(path, dimensions=3)


def test_npz(tmp_path):
    valid = arrays()
    np.savez(tmp_path / "own.npz", **valid)
    dataset = data.load(str(tmp_path / "own.npz"))
    assert (dataset.name, dataset.features, dataset.num_classes) == ("own", 12, 3)
    assert dataset.sample_shape == (3, 4)
    np.testing.assert_array_equal(dataset.x_train.numpy(), valid["x_train"].reshape(12, 12))
    np.testing.assert_array_equal(dataset.y_test.numpy(), valid["y_test"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int16, np.float16, np.float64, np.bool_, ">f4"])
def test_any_kind_of_number_is_taken_and_bytes_stay_bytes(dtype):
    valid = arrays()
    x_train = (valid["x_train"] > 100) if dtype is np.bool_ else valid["x_train"] % 128
    dataset = data.from_arrays("own", **{**valid, "x_train": x_train.astype(dtype)})
    assert dataset.x_train.dtype == (torch.uint8 if np.dtype(dtype).kind in "bui" else torch.float32)
    np.testing.assert_array_equal(dataset.x_train.numpy(), x_train.reshape(12, 12))


def test_integers_outside_a_byte_keep_their_values():
    x_train = arrays()["x_train"].astype(np.int32) - 1000
    dataset = data.from_arrays("own", **arrays(x_train=x_train))
    assert dataset.x_train.dtype == torch.float32
    np.testing.assert_array_equal(dataset.x_train.numpy(), x_train.reshape(12, 12))


def test_labels_with_holes_become_indices():
    labels = {"y_train": np.array([7, 3, 1000] * 4, np.uint16), "y_test": np.array([[1000], [7], [3]] * 2)}
    dataset = data.from_arrays("own", **arrays(**labels))
    assert dataset.classes == (3, 7, 1000)
    assert dataset.y_train.tolist() == [1, 0, 2] * 4
    assert dataset.y_test.tolist() == [2, 1, 0] * 2


def test_non_contiguous_and_read_only_arrays():
    wide = np.arange(12 * 24).reshape(12, 24).astype(np.float32)
    wide.setflags(write=False)
    dataset = data.from_arrays("own", **arrays(x_train=wide[:, ::2]))
    np.testing.assert_array_equal(dataset.x_train.numpy(), wide[:, ::2])


def with_value(value, dtype=np.float32):
    x = np.zeros((12, 3, 4), dtype)
    x[5, 1, 2] = value
    return x


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"x_train": with_value(np.nan)}, "x_train: expected finite float32 values, got 1 that are not"),
        ({"x_train": with_value(np.inf)}, "x_train: expected finite float32 values, got 1"),
        ({"x_train": with_value(1e300, np.float64)}, "x_train: expected finite float32 values, got 1"),
        ({"x_train": np.zeros(12)}, r"x_train: expected .* shape \(samples, ...\), got shape \(12,\)"),
        ({"x_train": np.zeros((0, 12))}, r"x_train: expected a non-empty array .* got shape \(0, 12\)"),
        ({"x_train": np.zeros((12, 0))}, "x_train: expected a non-empty array"),
        (
            {"x_train": np.zeros((12, 12), complex)},
            "x_train: expected an array of real numbers, got dtype complex128",
        ),
        ({"x_train": np.full((12, 12), "a")}, "x_train: expected an array of real numbers, got dtype <U1"),
        ({"x_test": np.zeros((6, 13))}, "x_test: expected 12 features per sample like x_train, got 13"),
        ({"y_train": np.arange(11) % 3}, r"y_train: expected one label per sample of x_train \(12\), got 11"),
        ({"y_train": np.arange(12) % 3 / 1.0}, "y_train: expected integer labels, got dtype float64"),
        ({"y_train": np.arange(12) % 3 - 1}, "y_train: expected labels >= 0 .* got -1"),
        (
            {"y_train": np.eye(3, dtype=int)[np.arange(12) % 3]},
            r"y_train: .* \(samples,\), got shape \(12, 3\)",
        ),
        (
            {"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)},
            "y_train: expected at least 2 different labels",
        ),
        (
            {"y_test": np.arange(6)},
            "y_test: expected the same labels as y_train .* label 3, which y_train lacks",
        ),
        ({"y_test": np.arange(6) % 2}, "y_test: expected the same labels as y_train .* no sample of label 2"),
        ({"x_test": np.array([{}] * 6, object)}, "x_test: expected an array of (real )?numbers, got"),
    ],
)
def test_bad_arrays(tmp_path, changes, wanted):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=wanted) as caught:
        data.load(str(tmp_path / "own.npz"))
    assert "\n" not in str(caught.value)


def test_objects_in_an_archive_are_never_unpickled(tmp_path):
    touched = tmp_path / "touched"

    class Malicious:
        def __reduce__(self):
            return (open, (str(touched), "w"))

    assert pickle.dumps(Malicious())
    np.savez(tmp_path / "own.npz", **arrays(x_train=np.array([Malicious()] * 12, object)))
    with pytest.raises(ValueError, match="x_train: expected an array of numbers, got Python objects"):
        data.load(str(tmp_path / "own.npz"))
    assert not touched.exists()


def test_npz_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.npz does not exist"):
        data.load(str(tmp_path / "missing.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz to be an \.npz archive"):
        data.load(str(tmp_path / "text.npz"))
    valid = arrays()
    del valid["y_test"]
    np.savez(tmp_path / "three.npz", **valid)
    with pytest.raises(ValueError, match=r"got x_train, y_train, x_test \(missing: y_test\)"):
        data.load(str(tmp_path / "three.npz"))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_npz_is_refused(tmp_path, compressed):
    """Cut anywhere, or with a byte of an array changed (the archive's checksum tells)."""
    (np.savez_compressed if compressed else np.savez)(tmp_path / "own.npz", **arrays())
    whole = (tmp_path / "own.npz").read_bytes()
    changed = bytearray(whole)
    changed[200] ^= 0xFF
    for content in (*(whole[:cut] for cut in range(0, len(whole), 97)), bytes(changed)):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.npz") as caught:
            data.load(str(tmp_path / "cut.npz"))
        assert "\n" not in str(caught.value)


def whole_or_one_line(load, path):
    """What reading a damaged file ends in: data, or a line that names the file."""
    try:
        return load()
    except (ValueError, OSError) as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return None


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in data._NPZ_ARRAYS)


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
def test_a_bit_flipped_anywhere_in_an_npz_gives_its_data_or_a_line_that_names_it(tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "own.npz", **arrays())
    path, content = tmp_path / "flipped.npz", (tmp_path / "own.npz").read_bytes()
    right, refused = data.load(str(tmp_path / "own.npz")), 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        dataset = whole_or_one_line(lambda: data.load(str(path)), path)
        assert dataset is None or same(dataset, right)
        refused += dataset is None
    assert refused > len(content) / 2


def test_a_bit_flipped_anywhere_in_gzipped_idx_gives_its_data_or_a_line_that_names_it(tmp_path):
    path, images = tmp_path / "train-images-idx3-ubyte.gz", small_mnist(images=6)["train-images-idx3-ubyte"]
    content, refused = gzip.compress(idx(images), mtime=0), 0
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        read = whole_or_one_line(lambda: data.read_idx(path, dimensions=3), path)
        assert read is None or np.array_equal(read, images)
        refused += read is None
    assert refused > 4 * len(content)


def npz_of(path, **members):
    """An archive whose members hold the bytes given; a valid one beside."""
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in (content | {f"{name}.npy": value for name, value in members.items()}).items():
            archive.writestr(name, value)


def npy(header, body=b""):
    """A file of NumPy's format whose header is any text."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "damaged"),
        (b"text", "damaged"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 38)}"), "announces 76 bytes .* holds 0"),
        (npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**76},)}}"), f"announces {2**76} bytes"),
        (npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**38}, {2**38})}}"), "announces"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -12)}", b"x" * 12), r"shape \(-1, -12\)"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': ('a',)}"), "damaged"),
        (npy("{'descr': [], 'fortran_order': False, 'shape': (12,)}"), "array of real numbers"),
        (npy(f"{{'descr': [], 'fortran_order': False, 'shape': ({2**76},)}}"), "damaged"),
        (npy("[" * 3000), "damaged"),
        (npy("{'descr': '|V1', 'fortran_order': False, 'shape': (12, 1)}", b"x" * 12), "array of real numbers"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': ()}", b"x"), r"expected a non-empty array .* \(\)"),
        (b"\x93NUMPY\x09\x00" + b"x" * 100, "damaged"),
    ],
)
def test_members_of_an_npz_that_are_no_arrays(tmp_path, content, wanted):
    path = tmp_path / "own.npz"
    npz_of(path, x_train=content)
    with pytest.raises(ValueError, match=f"^x_train: .*{wanted}") as caught:
        data.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("flags", 1), ("method", 99)], ids=["encrypted", "compression"])
def test_members_of_an_npz_that_python_cannot_unpack(tmp_path, field, value):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = content.index(signature) + offset + 2 * (field == "method")
        content[place : place + 2] = struct.pack("<H", value)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x_train: damaged in .*own\.npz"):
        data.load(str(path))


def test_an_array_larger_than_memory_is_not_begun(tmp_path, monkeypatch):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, **arrays(x_train=np.zeros((12, 10**6), np.uint8)))
    monkeypatch.setattr(data, "available_bytes", lambda: 10**6)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(ValueError, match=r"x_train: expected an array that fits .* 12000000 in .*own\.npz"):
        data.load(str(path))


@pytest.mark.parametrize("announced", [(3, 28, 28), (8, 2**15, 2**15), (2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_no_more_of_a_gzip_file_is_unpacked_than_its_header_announces(tmp_path, announced):
    """64 MiB of zeros in 64 KiB; what a header announces beyond any data set of the kind is not begun."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = bytes([0, 0, 8, 3]) + b"".join(struct.pack(">I", extent) for extent in announced)
    path.write_bytes(gzip.compress(header + bytes(2**26), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.read_idx(path, dimensions=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    write_mnist(tmp_path, small_mnist())
    np.savez(tmp_path / "own.npz", **arrays())
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    for name, file in (("mnist", "train-images-idx3-ubyte"), (str(tmp_path / "own.npz"), "own.npz")):
        with pytest.raises(OSError, match=rf"{file}.* can't be read \(Permission denied\)"):
            data.load(name, tmp_path)


@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
    st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_a_data_set_keeps_the_shape_of_its_samples(train, test):
    x_train, x_test = np.zeros((12, *train), np.uint8), np.ones((6, *test), np.uint8)
    axes = [[extent for extent in shape if extent > 1] for shape in (train, test)]
    if math.prod(train) != math.prod(test):
        with pytest.raises(ValueError, match=f"x_test: expected {math.prod(train)} features"):
            data.from_arrays("own", **arrays(x_train=x_train, x_test=x_test))
    elif axes[0] != axes[1] and min(map(len, axes)) > 1:
        with pytest.raises(ValueError, match=re.escape(f"expected samples of shape {tuple(train)} like x_train")):
            data.from_arrays("own", **arrays(x_train=x_train, x_test=x_test))
    else:
        dataset = data.from_arrays("own", **arrays(x_train=x_train, x_test=x_test))
        assert dataset.sample_shape == (tuple(train) if axes[0] == axes[1] else (math.prod(train),))
        assert data.hold_out(dataset, 6).sample_shape == dataset.sample_shape


def test_the_shape_of_a_sample_must_fit_its_values():
    x, y = torch.zeros(4, 6), torch.arange(4) % 2
    assert data.Dataset("own", x, y, x, y, (0, 1)).sample_shape == (6,)
    with pytest.raises(ValueError, match=r"sample_shape: expected a shape of 6 values, got \(2, 4\)"):
        data.Dataset("own", x, y, x, y, (0, 1), sample_shape=(2, 4))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"dataset: expected digits, mnist, .*, got 'cifar'"):
        data.load("cifar")


def test_digits_has_a_fixed_stratified_split():
    pytest.importorskip("sklearn")
    first, torch_seed = data.load("digits"), torch.random.initial_seed()
    np.random.seed(5)
    second = data.load("digits")
    assert torch.random.initial_seed() == torch_seed
    assert (len(first.y_train), len(first.y_test), first.sample_shape) == (1438, 359, (8, 8))
    assert first.x_train.dtype == torch.uint8
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, part), getattr(second, part))
    share = first.y_test.bincount() / (first.y_test.bincount() + first.y_train.bincount())
    assert ((share - 0.2).abs() < 0.003).all()


@given(st.integers(1, 39))
def test_held_out_are_the_last_training_samples(samples):
    """The test set is out of reach: neither part of what is returned is from it."""
    x = np.arange(40 * 12).reshape(40, 12)
    whole = data.from_arrays("own", **arrays(x_train=x, y_train=np.arange(40) % 3))
    if samples < 3 or samples > 37:
        side = "among" if samples < 3 else "before"
        with pytest.raises(ValueError, match=f"got none of label [0-2] {side} them"):
            data.hold_out(whole, samples)
        return
    part = data.hold_out(whole, samples)
    assert (part.name, part.classes) == (whole.name, whole.classes)
    for kind in ("x", "y"):
        train, test, every = (
            getattr(part, f"{kind}_train"),
            getattr(part, f"{kind}_test"),
            getattr(whole, f"{kind}_train"),
        )
        assert len(test) == samples
        assert torch.equal(torch.cat([train, test]), every)
        assert train.untyped_storage().data_ptr() == test.untyped_storage().data_ptr() == every.data_ptr(), "no copy"


@pytest.mark.parametrize("samples", [-1, 0, 12, 13])
def test_nothing_is_held_out_of_nothing(samples):
    whole = data.from_arrays("own", **arrays())
    with pytest.raises(ValueError, match=f"validation: expected from 1 to 11 of the 12 training .* own, got {samples}"):
        data.hold_out(whole, samples)


def test_a_label_that_is_not_held_out_is_named_as_the_file_has_it():
    labels = {"y_train": np.array([7, 3, 1000] * 4), "y_test": np.array([1000, 7, 3] * 2)}
    whole = data.from_arrays("own", **arrays(**labels))
    with pytest.raises(ValueError, match="the last 2 training samples of own, got none of label 7 among them"):
        data.hold_out(whole, 2)


def test_one_name_for_several_data_sets():
    datasets = [data.from_arrays(name, **arrays()) for name in "abcd"]
    assert [data.joined_name(datasets[:n]) for n in (1, 2, 3, 4)] == ["a", "a+b", "a+b+c", "a+3-more"]


@given(
    st.integers(1, 6),
    st.integers(2, 50),
    st.floats(-5, 5),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    st.integers(0, 2**31),
)
@settings(deadline=None)
def test_standardize_is_per_sample_whatever_the_scale(samples, features, offset, scale, seed):
    x = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    expected = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    actual = standardize((scale * x).float())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(standardize((scale * x[:1]).float()), actual[:1])


def test_standardize_of_bytes_and_of_constant_samples():
    x = torch.tensor([[0, 255, 0, 255], [7, 7, 7, 7], [0, 0, 0, 0]], dtype=torch.uint8)
    assert standardize(x).tolist() == [[-1, 1, -1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert (standardize(torch.full((3, 784), 0.1)) == 0).all()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_real_files(name):
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"no {name} in {REAL_DATA}: set ENGRAM_DATA_DIR to the directory that holds it")
    dataset = data.load(name, REAL_DATA)
    assert (dataset.x_train.shape, dataset.x_test.shape) == ((60000, 784), (10000, 784))
    assert dataset.y_test.bincount().shape == (10,)
    if name == "fashion-mnist":
        assert dataset.y_train.bincount().tolist() == [6000] * 10
