"""Results that depend on nothing but their arguments and seeds: no threads, modes, variables, folders or languages."""

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.continual import data
from engram_kernels.continual.training import run

THREADS = (1, 2, 3, 16)


def digest(tensors):
    """Of every bit."""
    parts = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def floats(kind, shape, seed):
    """Numbers made of their bits, which no mode can change: ordinary ones, or denormals too small to be squared."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(1, 1 << 23, shape, generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int32) << 31
    exponents = torch.randint(120, 128, shape, generator=generator, dtype=torch.int32) << 23
    return (bits | signs | (exponents if kind == "ordinary" else 0)).view(torch.float32)


def operators(kind):
    """Everything that kernels compute of floats, in shapes that several threads share."""
    m, n, k = 200, 150, 700
    x, w, d = floats(kind, (m, k), 0), floats(kind, (n, k), 1), floats(kind, (m, n), 2)
    x_bits, w_bits = ek.ops.pack_signs(x), ek.ops.pack_signs(w)
    window = 1e-39 if kind == "denormal" else 0.1
    gates = ek.ops.sample_engram(x, torch.tensor([3, 0]), 0.2, temperature=0.0)
    yield from (x_bits, w_bits, gates, ek.ops.pack_window(x, window, gates))
    yield ek.ops.sample_engram(x, torch.tensor([3, 0]), 0.2, temperature=0.5)
    yield ek.ops.binary_matmul(x_bits, w_bits, k, gates)
    yield ek.ops.sign_matmul(d, w_bits, k)
    yield ek.ops.sign_matmul_t(x, w_bits, k)
    yield ek.ops.gated_input_grad(d, w_bits, x, gates)
    yield ek.ops.masked_input_grad(d, w_bits, k, gates)
    yield ek.ops.gated_weight_grad(d, x_bits, k, gates)
    yield ek.ops.real_weight_grad(d, x)
    for state_dtype in (torch.float32, torch.bfloat16, torch.int8):
        layer = ek.BinaryEngramLinear(k, n, dtype=torch.float32)
        with torch.no_grad():
            layer.weight.copy_(floats("ordinary", (n, k), 4))
        optimizer = ek.MetaplasticAdam(layer.parameters(), state_dtype=state_dtype, eps=1e-30)
        for seed in (5, 6):
            layer.weight.grad = floats(kind, (n, k), seed)
            optimizer.step()
        yield from (layer.weight, layer.weight.sign_bits(), *optimizer.state_dict()["state"][0].values())


def training():
    """A network of all kinds of layers, on batches that BLAS would share out by samples."""
    torch.manual_seed(1)
    model = nn.Sequential(
        ek.BinaryEngramLinear(64, 300, binary_input=False, dtype=torch.float32),
        nn.LayerNorm(300, elementwise_affine=False),
        ek.BinaryEngramLinear(300, 200, engram=ek.StochasticEngram(0.2, 0.5), dtype=torch.float32),
        nn.LayerNorm(200, elementwise_affine=False),
        ek.BinaryEngramLinear(200, 100, bias=True, dtype=torch.float32),
    )
    readout = ek.DendriticReadout(100, 10, 20, engram=ek.StochasticEngram(0.2, 0.5), dtype=torch.float32)
    optimizer = ek.MetaplasticAdam([*model.parameters(), *readout.parameters()], lr=0.01, state_dtype=torch.int8)
    for seed in range(3):
        y = torch.arange(1000) % 10
        activations = readout.activations(model(floats("ordinary", (1000, 64), seed)))
        loss = readout.local_loss(activations, y) + nn.functional.cross_entropy(readout.scores(activations), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    yield from (*model.parameters(), *readout.parameters())


def counting():
    x, y = floats("ordinary", (400, 600), 7), torch.arange(400) % 10
    for kind in (ek.RidgeReadout, ek.PrototypeReadout):
        readout = kind(600, 10, engram=ek.StochasticEngram(0.1, temperature=0.0))
        readout.observe(x, y)
        yield from (*(readout.solve() if kind is ek.RidgeReadout else readout.prototypes()), readout(x))


def digits():
    """A run as ``engram-kernels train`` makes it."""
    for readout in ("dendritic", "ridge"):
        method, result = run(
            data.load("digits"), hidden=[96], tasks=2, epochs=1, readout=readout, seed=3, evaluation="seen"
        )
        yield from method.model.state_dict().values()
        yield torch.tensor([x for row in result.accuracy_matrix for x in row if x is not None], dtype=torch.float64)


def everything():
    return {
        "ordinary numbers": digest(operators("ordinary")),
        "denormal numbers": digest(operators("denormal")),
        "training": digest(training()),
        "counting": digest(counting()),
        "digits": digest(digits()),
    }


@contextlib.contextmanager
def changed(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


MODES = {
    "none": contextlib.nullcontext,
    "flush denormals": lambda: changed(lambda: False, torch.set_flush_denormal, True),
    "high precision": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "medium precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "double by default": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "half by default": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "anomalies detected": lambda: torch.autograd.set_detect_anomaly(True),
}
# torch's own product of real numbers, of which the first layer's gradient is one, rounds its factors where the
# processor has units for bfloat16
ROUNDED = ("training", "medium precision")


@pytest.fixture(scope="module")
def plain():
    return everything()


@pytest.mark.parametrize("mode", MODES)
def test_no_result_depends_on_the_number_of_threads_or_on_a_mode(plain, mode):
    before, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(max(THREADS))
        torch.rand(1000, 1000).mul_(2)  # so that there are threads from before the mode
        with MODES[mode]():
            for threads in THREADS:
                torch.set_num_threads(threads)
                found.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert other == found[0]
    same = [name for name in plain if (name, mode) != ROUNDED]
    assert {name: found[0][name] for name in same} == {name: plain[name] for name in same}


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "3", "LC_ALL": "C", "PYTHONHASHSEED": "1", "ENGRAM_DATA_DIR": "nowhere"},
        {"MKL_NUM_THREADS": "1", "LC_ALL": "de_DE.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONHASHSEED": "2",
         "TZ": "Asia/Tokyo", "ENGRAM_SOMETHING": "1"},
    ],
    ids=["C", "other"],
)  # fmt: skip
def test_no_result_depends_on_variables_the_current_folder_or_a_language(plain, tmp_path, variables):
    root = Path(ek.__file__).parents[1]
    folders = [str(root), str(root / "tests")]
    code = f"import sys; sys.path[:1] = {folders}; import test_surroundings; print(test_surroundings.everything())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("ENGRAM_", "LC_"))} | variables,
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == str(plain), told.stderr
