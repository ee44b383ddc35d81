"""The runtime without torch predicts and learns as packed models do in Python, and refuses the same files."""

import ctypes
import json
import math
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.encoding import SampleStandardisation

RUNTIME = Path(__file__).parents[1] / "csrc" / "runtime"
FLOAT32, UINT8 = 0, 1
INT64_P = ctypes.POINTER(ctypes.c_int64)

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
    pytest.mark.xdist_group("runtime"),
]


def cmake(*arguments):
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime")
    cmake("-S", RUNTIME, "-B", folder, "-DENGRAM_FUZZ=ON")
    cmake("--build", folder, "-j2")
    return folder


class Runtime:
    """The C interface, with exceptions."""

    def __init__(self, folder):
        self.library = ctypes.CDLL(folder / "libengram.so")
        self.library.engram_load.restype = ctypes.c_void_p
        self.library.engram_load_memory.restype = ctypes.c_void_p
        self.library.engram_error.restype = ctypes.c_char_p
        self.library.engram_label.restype = ctypes.c_char_p
        for name in ("engram_predict", "engram_learn", "engram_save"):
            getattr(self.library, name).restype = ctypes.c_bool

    def error(self):
        return self.library.engram_error().decode()

    def load(self, path, threads=1):
        return Model(self, self.library.engram_load(str(path).encode(), threads))

    def load_memory(self, data, threads=1):
        return Model(self, self.library.engram_load_memory(data, ctypes.c_size_t(len(data)), threads))


class Model:
    def __init__(self, runtime, pointer):
        if pointer is None:
            raise ValueError(runtime.error())
        self.runtime, self.pointer = runtime, ctypes.c_void_p(pointer)
        features, classes = ctypes.c_int64(), ctypes.c_int64()
        runtime.library.engram_sizes(self.pointer, ctypes.byref(features), ctypes.byref(classes))
        self.features, self.classes = features.value, classes.value

    def __del__(self):
        if hasattr(self, "pointer"):
            self.runtime.library.engram_free(self.pointer)

    def labels(self):
        return [
            self.runtime.library.engram_label(self.pointer, ctypes.c_int64(i)).decode() for i in range(self.classes)
        ]

    def predict(self, x):
        """Class numbers and scores."""
        x = x.contiguous()
        numbers = torch.empty(len(x), dtype=torch.int64)
        scores = torch.empty(len(x), self.classes)
        kind = UINT8 if x.dtype == torch.uint8 else FLOAT32
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, numbers, scores)]
        if not self.runtime.library.engram_predict(
            self.pointer, pointers[0], kind, ctypes.c_int64(len(x)), pointers[1], pointers[2]
        ):
            raise ValueError(self.runtime.error())
        return numbers, scores

    def learn(self, x, y):
        kind = UINT8 if x.dtype == torch.uint8 else FLOAT32
        pointers = [ctypes.c_void_p(t.contiguous().data_ptr()) for t in (x, y)]
        if not self.runtime.library.engram_learn(self.pointer, pointers[0], kind, ctypes.c_int64(len(x)), pointers[1]):
            raise ValueError(self.runtime.error())

    def save(self, path):
        if not self.runtime.library.engram_save(self.pointer, str(path).encode()):
            raise ValueError(self.runtime.error())


@pytest.fixture(scope="module")
def runtime(build):
    return Runtime(build)


def images(samples, features):
    return (torch.randint(256, (samples, features)) * (torch.rand(samples, features) < 0.4)).to(torch.uint8)


def batch_norm(units):
    norm = nn.BatchNorm1d(units)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_(0, 3)
    norm.running_var.uniform_(0.5, 60)
    return norm


def counted(readout, sizes=(64, 300, 10), samples=500, **settings):
    model = ek.EngramMLP(sizes, readout=readout, **settings)
    if model.encoding is not None:
        model.encoding(images(100, sizes[0]).float())
    model.observe(images(samples, sizes[0]), torch.randint(sizes[-1] - 1, (samples,)))  # one class is never seen
    return model.eval()


def assert_same(packed, model, x, exact=True):
    expected = packed(x)
    numbers, scores = model.predict(x)
    if exact:
        assert torch.equal(scores, expected)
        assert torch.equal(numbers, expected.argmax(1))
    else:  # sums of real numbers in another order
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        clear = expected.topk(2, dim=1).values
        clear = clear[:, 0] - clear[:, 1] > 1e-3
        assert torch.equal(numbers[clear], expected.argmax(1)[clear])


# ---- predictions


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
@pytest.mark.parametrize("sizes", [(64, 300, 10), (5, 100, 130, 3)])
def test_networks(runtime, tmp_path, readout, sizes, threads):
    torch.manual_seed(0)
    model = (
        counted(readout, sizes) if readout in ("prototype", "ridge") else ek.EngramMLP(sizes, readout=readout).eval()
    )
    packed = ek.pack(model)
    packed.save(tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors", threads)
    assert (loaded.features, loaded.classes) == (sizes[0], sizes[-1])
    for samples in (0, 1, 7, 600):
        x = images(samples, sizes[0])
        few = sizes[0] < 64  # coded by a tangent, which libraries round in ways of their own
        assert_same(packed, loaded, x, exact=readout != "ridge" and not few)
        assert_same(packed, loaded, torch.randn(samples, sizes[0]), exact=False)


@pytest.mark.parametrize("norm", [None, batch_norm, ek.ExactLayerNorm])
@pytest.mark.parametrize("engram", [None, ek.StochasticEngram(0.3), ek.StochasticEngram(0.3, score="magnitude")])
def test_own_networks(runtime, tmp_path, norm, engram):
    torch.manual_seed(1)
    layers = [ek.BinaryEngramLinear(70, 129, False, binary_input=False, scaled=False)]
    for k, n in ((129, 65), (65, 3)):
        layers += [] if norm is None else [norm(k)]
        layers.append(ek.BinaryEngramLinear(k, n, False, engram=engram, scaled=norm is batch_norm))
    packed = ek.pack(nn.Sequential(*layers).eval())
    packed.save(tmp_path / "model.safetensors")
    x = images(300, 70)
    # a recruited unit is one of several after a norm that is another number in its last bit
    assert_same(packed, runtime.load(tmp_path / "model.safetensors"), x, exact=norm is not batch_norm)


def test_standardised_samples(runtime, tmp_path):
    torch.manual_seed(5)
    packed = ek.pack(nn.Sequential(SampleStandardisation(70), ek.EngramMLP((70, 129, 3), encode=False)).eval())
    packed.save(tmp_path / "model.safetensors")
    x = images(300, 70)
    x[0] = 9  # a constant sample
    numbers, _ = runtime.load(tmp_path / "model.safetensors").predict(x)
    agree = numbers == packed(x).argmax(1)  # their mean and deviation are summed in another order
    assert agree.float().mean() > 0.95


def test_wide_inputs_whose_sums_float32_does_not_hold(runtime, tmp_path):
    torch.manual_seed(2)
    first = ek.BinaryEngramLinear(70_000, 20, False, binary_input=False, scaled=False)
    second = ek.BinaryEngramLinear(20, 4, False, engram=ek.StochasticEngram(0.3), scaled=False)
    packed = ek.pack(nn.Sequential(first, second).eval())
    packed.save(tmp_path / "model.safetensors")
    assert_same(packed, runtime.load(tmp_path / "model.safetensors"), torch.full((3, 70_000), 255, dtype=torch.uint8))


def test_a_first_layer_that_takes_signs_wants_floats(runtime, tmp_path):
    torch.manual_seed(4)
    packed = ek.pack(nn.Sequential(ek.BinaryEngramLinear(70, 3, False)).eval())
    packed.save(tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors")
    assert_same(packed, loaded, torch.randn(9, 70))
    with pytest.raises(ValueError, match="type: expected float32, of which the first layer takes the signs, got uint8"):
        loaded.predict(images(2, 70))


def image_norm(channels):
    norm = nn.BatchNorm2d(channels)
    norm.load_state_dict(batch_norm(channels).state_dict())
    return norm


def image_network(channels=64, shape=(3, 9, 8), groups=1):
    """Bytes, two convolutions, a pool that changes signs, a flattening."""
    first = ek.BinaryEngramConv2d(shape[0], channels, 3, padding=1, binary_input=False, scaled=False)
    second = ek.BinaryEngramConv2d(channels, 20, (2, 3), padding=(1, 2), dilation=(1, 2), groups=groups)
    layers = [first, image_norm(channels), second, nn.MaxPool2d(2, padding=1), image_norm(20), nn.Flatten()]
    units = nn.Sequential(*layers).eval()(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]
    return nn.Sequential(*layers, ek.BinaryEngramLinear(units, 10)).eval()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (30, 2)])
@pytest.mark.parametrize("shape", [(1, 9, 8), (3, 9, 8)])
def test_convolutions(runtime, tmp_path, shape, channels, groups, threads):
    torch.manual_seed(6)
    model = image_network(channels, shape, groups)
    packed = ek.pack(model, sample_shape=shape)
    packed.save(tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors", threads)
    assert (loaded.features, loaded.classes) == (math.prod(shape), 10)
    for samples in (0, 1, 5, 100):
        x = torch.randint(256, (samples, *shape), dtype=torch.uint8)
        assert_same(packed, loaded, x)
        with torch.no_grad():
            assert torch.equal(loaded.predict(x)[1], model(x))
        assert_same(packed, loaded, x.float())  # whole numbers, which sum without rounding in any order


def test_convolutions_of_signs_with_engrams_and_a_counted_read_out(runtime, tmp_path):
    torch.manual_seed(7)
    engram = ek.StochasticEngram(0.3, score="magnitude")
    features = nn.Sequential(
        nn.Unflatten(1, (2, 7, 6)), ek.BinaryEngramConv2d(2, 9, 3, padding=1, scaled=False, bias=False),
        ek.BinaryEngramConv2d(9, 5, 2, engram=engram, gates="units", scaled=False, bias=False), nn.Flatten(),
    ).eval()  # fmt: skip
    head = ek.PrototypeReadout(5 * 30, 4, engram=ek.StochasticEngram(0.2)).eval()
    x, y = torch.randn(300, 84), torch.randint(4, (300,))
    with torch.no_grad():
        head.observe(features(x[:150]), y[:150])
    packed = ek.pack(nn.Sequential(features, head), learning=True)
    packed.save(tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors", 2)
    assert_same(packed, loaded, x)
    packed.partial_fit(x[150:], y[150:])
    loaded.learn(x[150:], y[150:])
    assert_same(packed, loaded, x)


def test_labels(runtime, tmp_path):
    packed = ek.pack(ek.EngramMLP((64, 100, 3)), labels=["owl", "Ühu", "\N{OWL}"])
    packed.save(tmp_path / "model.safetensors")
    assert runtime.load(tmp_path / "model.safetensors").labels() == ["owl", "Ühu", "\N{OWL}"]


# ---- learning


@pytest.mark.parametrize("readout", ["prototype", "ridge"])
def test_learning_goes_on_as_in_python(runtime, tmp_path, readout):
    torch.manual_seed(3)
    packed = ek.pack(counted(readout), learning=True)
    packed.save(tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors", 2)
    x, y = images(5000, 64), torch.randint(10, (5000,))
    packed.partial_fit(x, y)
    for begin in range(0, 5000, 1999):
        loaded.learn(x[begin : begin + 1999], y[begin : begin + 1999])
    assert_same(packed, loaded, images(400, 64), exact=readout == "prototype")
    loaded.save(tmp_path / "learned.safetensors")
    again = ek.load_packed(tmp_path / "learned.safetensors")
    assert torch.equal(again.layers[-1].counts, packed.layers[-1].counts)
    assert torch.equal(again.layers[-1].samples, packed.layers[-1].samples)
    assert_same(again, loaded, images(400, 64), exact=readout == "prototype")
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_learn_says_so(runtime, tmp_path):
    x, y = images(3, 64), torch.tensor([0, 1, 2])
    for model, message in (
        (ek.EngramMLP((64, 100, 3)).eval(), "expected a model with a counted read-out"),
        (counted("ridge", (64, 100, 4)), "expected a model that was saved with"),
    ):
        ek.pack(model).save(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            runtime.load(tmp_path / "model.safetensors").learn(x, y)


def test_failed_calls_leave_the_model_as_it_was(runtime, tmp_path):
    packed = ek.pack(counted("prototype"))
    packed.save(tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors")
    x = torch.randn(3, 64)
    x[1, 5] = math.nan
    with pytest.raises(ValueError, match="x: expected numbers, got NaN in sample 1, feature 5"):
        loaded.learn(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="x: expected numbers, got NaN in sample 1, feature 5"):
        loaded.predict(x)
    with pytest.raises(ValueError, match="class_numbers: expected 0 to 9, got 10"):
        loaded.learn(images(2, 64), torch.tensor([0, 10]))
    assert_same(packed, loaded, images(100, 64))
    with pytest.raises(ValueError, match="cannot write there"):
        loaded.save(tmp_path / "nowhere" / "model.safetensors")


# ---- files


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    ek.pack(counted("ridge", (64, 70, 3), 30)).save(path)
    return path


def rewritten(path, change):
    """The file with another header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def metadata(key, value):
    def change(header):
        header["__metadata__"][key] = value

    return change


def network(change):
    def change_header(header):
        described = json.loads(header["__metadata__"]["network"])
        change(described)
        header["__metadata__"]["network"] = json.dumps(described)

    return change_header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata("format", "other"), "expected a packed model of engram_kernels, got a file of format other"),
        (metadata("version", "99"), "expected a packed model of version 1 to 2, got one of version 99"),
        (lambda header: header.pop("__metadata__"), "__metadata__: expected the key format, got none"),
        (metadata("network", "[1,"), "JSON: expected"),
        (metadata("network", "[" * 100_000), "JSON: expected less nesting"),
        (network(lambda d: d.update(features=63)), "expected 63 units"),
        (network(lambda d: d["layers"].clear()), "layers: expected at least one"),
        (network(lambda d: d["layers"][0].update(kind="psychic")), "0: expected a kind of layer of this version"),
        (network(lambda d: d["layers"][-1].update(kind="learning dendritic")), "got one of kind learning dendritic"),
        (network(lambda d: d["layers"][-1].update(classes=4)), "expected I64 .4., got I64 .3."),
        (network(lambda d: d["layers"].append(d["layers"][-1])), "expected a tensor, got none"),
        (network(lambda d: d.update(labels=["a"])), "labels: expected 3"),
        (lambda header: header.update({"9.weight": header.pop("0.weight", header.get("1.weight"))}), "expected"),
    ],
)
def test_wrong_files_are_refused_by_name(runtime, file, change, message):
    data = rewritten(file, change)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        runtime.load_memory(data)
    with pytest.raises(ValueError, match=f"{file}: "):
        runtime.load(file)


def change_window(name, number):
    return network(lambda d: d["layers"][0]["window"].update({name: number}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_window("stride_h", 0), "0.window: expected 1 to 2.31 - 1 as stride_h, got 0"),
        (change_window("kernel_h", 99), "0.window: expected a kernel that fits into the padded height"),
        (change_window("groups", 2), "0.window: expected a number of groups that divides"),
        (network(lambda d: d["layers"][0]["window"].pop("top")), "0.window: expected the key top, got none"),
        (network(lambda d: d["layers"][0].update(outputs=63)), "expected I64"),
        (network(lambda d: d["layers"][1].update(units=4609)), "1.flip: expected a size that divides 4609"),
        (network(lambda d: d["layers"][4]["window"].update(channels=10)), "expected U8 .10., got U8 .20."),
    ],
)
def test_wrong_convolutions_are_refused_by_name(runtime, tmp_path, change, message):
    torch.manual_seed(8)
    packed = ek.pack(image_network(shape=(1, 9, 8)), sample_shape=(1, 9, 8))
    packed.save(tmp_path / "model.safetensors")
    data = rewritten(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        runtime.load_memory(data)


@pytest.mark.parametrize("images", [False, True])
def test_cut_and_changed_files_never_crash(runtime, file, images):
    if images:
        ek.pack(image_network(shape=(1, 8, 8)), sample_shape=(1, 8, 8)).save(file)
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for length in [*range(0, 64), *rng.integers(64, len(data), 200)]:
        with pytest.raises(ValueError, match="expected"):
            runtime.load_memory(data[:length])
    loaded = 0
    for _ in range(2000):
        changed = bytearray(data)
        for at in rng.integers(0, 3000, rng.integers(1, 4)):
            changed[at % len(changed)] = rng.integers(256)
        try:
            model = runtime.load_memory(bytes(changed))
        except ValueError:
            continue
        loaded += 1
        if model.features == 64:
            model.predict(torch.randint(256, (2, 64), dtype=torch.uint8))
    assert loaded  # bits and numbers may be any


def test_missing_files_and_folders(runtime, tmp_path):
    for path, message in (("none", "cannot open it"), (".", "expected a file, got something else")):
        with pytest.raises(ValueError, match=message):
            runtime.load(tmp_path / path)
    with pytest.raises(ValueError, match="threads: expected 1 to 1024, got 0"):
        model = tmp_path / "model.safetensors"
        ek.pack(ek.EngramMLP((64, 100, 3))).save(model)
        runtime.load(model, 0)


# ---- programs


def test_a_program(build, tmp_path):
    packed = ek.pack(ek.EngramMLP((64, 100, 3)).eval(), labels=["a", "b", "c"])
    packed.save(tmp_path / "model.safetensors")
    program = build / "engram_predict"
    x = images(20, 64)
    done = subprocess.run(
        [program, tmp_path / "model.safetensors"], input=x.numpy().tobytes(), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == packed.predict(x)
    short = subprocess.run([program, tmp_path / "model.safetensors"], input=b"abc", capture_output=True, check=False)
    assert short.returncode == 1 and b"expected 64 bytes each, got 3" in short.stderr


AARCH64 = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.fixture(scope="module")
def aarch64_program(tmp_path_factory):
    for tool in AARCH64:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt-get install g++-aarch64-linux-gnu qemu-user")
    folder = tmp_path_factory.mktemp("aarch64")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DENGRAM_STATIC=ON"]
    compilers = [f"-DCMAKE_C_COMPILER={AARCH64[0]}", f"-DCMAKE_CXX_COMPILER={AARCH64[1]}"]
    cmake("-S", RUNTIME, "-B", folder, *target, *compilers)
    cmake("--build", folder, "-j2", "--target", "engram_predict")
    return folder / "engram_predict"


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["linear", "dendritic", "prototype", "ridge"])
def test_a_program_for_aarch64(aarch64_program, tmp_path, readout):
    model = ek.EngramMLP((64, 300, 200, 10), readout=readout)
    x = images(40, 64)
    if readout in ("prototype", "ridge"):
        model.observe(x, torch.randint(9, (40,)))
    packed = ek.pack(model)
    packed.save(tmp_path / "model.safetensors")
    for options, samples in (([], x), (["--float"], x.float())):
        done = subprocess.run(
            ["qemu-aarch64", aarch64_program, *options, tmp_path / "model.safetensors"],
            input=samples.numpy().tobytes(), capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.decode().split() == [str(label) for label in packed.predict(samples)]


def test_the_library_adds_less_than_a_megabyte(build, tmp_path):
    """What is linked of it into a program, without the C library, of which glibc's takes 0.7 MB."""
    program = tmp_path / "program"
    shutil.copy(build / "engram_predict", program)
    subprocess.run(["strip", program], check=True)
    assert program.stat().st_size < 1 << 20


def test_the_fuzzer_takes_models(build, file):
    subprocess.run([build / "engram_fuzz", file], check=True)
