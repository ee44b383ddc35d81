"""The Triton update: interpreted on the CPU, compiled for every architecture without a driver, and run on a GPU."""

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import ADAM, bits_of, cloned, compact_arguments, gate_of

import engram_kernels as ek
from engram_kernels import ops, reference, triton_kernels

TESTS = Path(__file__).parent
WEIGHTS_AND_GRADS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
STATES = [torch.float32, torch.bfloat16, torch.int8]
FORMATS = [(weight, grad, state) for weight, grad in WEIGHTS_AND_GRADS for state in STATES]


def in_a_process(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, cwd=TESTS.parent
    )


# ---- what is imported when


def test_triton_is_imported_only_when_an_update_needs_it():
    loaded = "import sys, engram_kernels; print('triton' in sys.modules)"
    assert in_a_process("-c", loaded).stdout.strip() == "False"


def test_without_triton_everything_else_works_and_the_update_says_what_to_install():
    program = """
import sys
sys.modules["triton"] = None
import torch, engram_kernels as ek
from engram_kernels import triton_kernels
layer = ek.BinaryEngramLinear(5, 3)
layer(torch.randn(2, 5)).sum().backward()
ek.MetaplasticAdam(layer.parameters()).step()
w = torch.zeros(3, 5)
settings = dict(lr=1.0, beta1=0.9, beta2=0.9, eps=1.0, weight_decay=0.0, metaplasticity=0.0, step=1)
for update in (triton_kernels.metaplastic_adam_, triton_kernels.gated_metaplastic_adam_):
    try:
        update(*[w] * 7, **settings)
    except RuntimeError as error:
        print(error)
"""
    # the fused update takes two tensors more, which neither gets to look at
    program = program.replace("update(*[w] * 7,", "update(*[w] * (5 + 2 * (update.__name__[0] == 'g')),")
    result = in_a_process("-c", program)
    assert result.returncode == 0, result.stderr
    message = r"metaplastic_adam_: expected Triton.*pip install 'engram-kernels\[triton\]'"
    assert len(re.findall(message, result.stdout)) == 2, result.stdout


def test_cuda_tensors_reach_the_triton_update():
    for name in ("metaplastic_adam_", "gated_metaplastic_adam_", "real_metaplastic_adam_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"engram_kernels::{name}", "CUDA")


# ---- checks, which all backends share


def test_the_numbers_are_those_of_the_reference_in_float32_and_gradients_are_optional():
    (weight, *state), settings = compact_arguments(3, 70, torch.float32, torch.int8)
    for grad in (None, torch.zeros(3, 70)):
        numbers = torch.ops.engram_kernels._check_update(weight, grad, *state, **settings | {"metaplasticity": 1e39})
        beta1, beta2 = settings["beta1"], settings["beta2"]
        step_size = settings["lr"] * (1 - beta2**3) ** 0.5 / (1 - beta1**3)
        expected = [beta1, 1 - beta1, beta2, 1 - beta2, settings["eps"], settings["weight_decay"], 1e38, step_size]
        # metaplasticity: infinity times a weight of 0 would be a NaN
        assert numbers[:9] == torch.tensor([*expected, math.inf]).tolist()
        assert numbers[9:] == reference.philox(settings["seed"], 1, 4)[0].tolist()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(weight=torch.zeros(5, 3).T), "weight: expected contiguous memory"),
        (dict(grad=torch.zeros(5, 3)), r"grad: expected float32 or the weight's dtype, .*got float32 \(5, 3\)"),
        (dict(exp_avg=torch.zeros(3, 5).half()), "exp_avg: expected float32, bfloat16 or int8, got float16"),
        (dict(exp_avg_sq=torch.zeros(3, 6)), r"exp_avg_sq: expected float32 \(3, 5\), got float32 \(3, 6\)"),
        (
            dict(exp_avg=torch.zeros(3, 5, device="meta")),
            "exp_avg: expected a tensor on cpu like the other arguments, got one on another",
        ),
        (
            dict(grad=torch.zeros(3, 5, device="meta")),
            "grad: expected a tensor on cpu like the other arguments, got one on another",
        ),
        (dict(sign_bits=torch.zeros(3, 1, dtype=torch.int64)), r"sign_bits: .*int64 \(3, 2\), got int64 \(3, 1\)"),
        (dict(exp_avg_scale=torch.zeros(3, 1)), "exp_avg_scale: expected None for float32 moments"),
        (dict(seed=torch.zeros(2, dtype=torch.int64, device="meta")), "seed: expected a CPU tensor"),
        (dict(first_row=-1), "first_row: expected at least 0, got -1"),
        (dict(beta2=1.0), "beta2: .*got 1"),
        (dict(step=0), "step: .*got 0"),
        (dict(weight_bound=0.0), "weight_bound: expected above 0 in float32, got 0"),
        (dict(weight_bound=math.nan), "weight_bound: expected above 0 in float32, got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes, message):
    tensors = {name: torch.zeros(3, 5) for name in ("weight", "grad", "exp_avg", "exp_avg_sq")} | {"sign_bits": None}
    arguments = tensors | ADAM | changes
    positional = [arguments.pop(name) for name in tensors]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.engram_kernels._check_update(*positional, **arguments)


# ---- interpreted


def test_interpreted_the_update_is_that_of_the_cpu_bit_for_bit():
    pytest.importorskip("triton", reason="Triton is not installed")
    result = in_a_process(
        "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(TESTS / "emulator" / "interpreted_update.py"),
        TRITON_INTERPRET="1",
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0


# ---- compiled

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
COMPILED = [(formats, 90) for formats in FORMATS]
COMPILED += [(formats, sm) for sm in ARCHITECTURES if sm != 90 for formats in (FORMATS[0], FORMATS[2], FORMATS[8])]
REGISTERS = 112  # leaves an SM 16 warps of two quads a thread at least
REGISTERS_UNALIGNED = 160  # where 4 does not divide K: single elements, each with an address


@pytest.fixture(scope="module")
def triton_ptx():
    pytest.importorskip("triton", reason="Triton is not installed")
    from emulator import triton_ptx

    return triton_ptx


@pytest.mark.parametrize("formats, architecture", COMPILED, ids=str)
def test_compiled_the_update_stays_in_registers_and_reads_wide(triton_ptx, formats, architecture):
    update = triton_ptx.compile_update(*formats, architecture)
    print(triton_ptx.table([(formats, update)]))
    assert update.usage["STACK"] == update.usage["LOCAL"] == update.count("LDL|STL") == 0
    assert update.usage["SHARED"] == update.shared == update.count("LDS|STS|BAR") == 0
    assert update.usage["REG"] <= REGISTERS

    weight, grad, state = formats
    quads = update.weights_per_thread // 4
    loaded, stored = (weight, grad, state, state), (weight, state, state)
    for instruction, dtypes in (("LDG", loaded), ("STG", stored)):
        float32, bfloat16 = (quads * dtypes.count(dtype) for dtype in (torch.float32, torch.bfloat16))
        assert update.count(rf"{instruction}\S*\.128") == float32
        assert update.count(rf"{instruction}\S*\.64") == bfloat16
    # besides: the scales read and written, half-words of signs, the flag; four codes of 8 bits are 32 bits
    assert update.count("LDG") == quads * (4 + 2 * (state == torch.int8))
    assert update.count("STG") == quads * (3 + 2 * (state == torch.int8) + 2)


@pytest.mark.parametrize("formats, architecture", COMPILED, ids=str)
def test_compiled_the_update_rounds_every_operation(triton_ptx, formats, architecture):
    update = triton_ptx.compile_update(*formats, architecture)
    # PTX says what is rounded how. Fused operations are in the machine code only where it spells out these two:
    # 2 for a root and 5 for a quotient, which make them correctly rounded. ptxas, told not to, adds no others.
    operations = re.findall(r"^\s+(?:@\S+\s+)?([a-z]\w*(?:\.\w+)*)\s", update.ptx, flags=re.MULTILINE)
    floats = {name for name in operations if name.endswith(".f32")}
    assert not any(name.startswith(("fma", "mad")) or ".ftz" in name or ".approx" in name for name in floats), floats
    assert operations.count("sqrt.rn.f32") == operations.count("div.rn.f32") == update.weights_per_thread
    assert update.count("FFMA") == (2 + 5) * update.weights_per_thread


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_compiled_the_update_draws_no_number_twice(triton_ptx, formats):
    weight, _, state = formats
    update = triton_ptx.compile_update(*formats, 90)
    per_draw = {torch.bfloat16: 1}.get(weight, 0 if state == torch.float32 else 2)
    draws = update.weights_per_thread // per_draw if per_draw else 0
    last_multiplications = len(re.findall(rf"mul\.lo\.\S+ .*, {0x846CA68B - 2**32};", update.ptx))
    assert last_multiplications == (draws + 2 if draws else 0)  # two more for the row


@pytest.mark.parametrize("formats", FORMATS[::4], ids=str)
def test_compiled_the_update_takes_any_number_of_units(triton_ptx, formats):
    update = triton_ptx.compile_update(*formats, 90, sign_bits=False, k_factor=1)
    assert update.usage["STACK"] == update.usage["LOCAL"] == 0
    assert update.usage["REG"] <= REGISTERS_UNALIGNED


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_launch_asks_for_what_is_compiled_here_whatever_the_numbers(triton_ptx, formats, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from engram_kernels.triton_kernels import metaplastic_adam

    kernel, update = metaplastic_adam.metaplastic_adam_kernel, triton_ptx.compile_update(*formats, 90)
    specialize = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **named: launches.append((grid, specialize(*arguments, **named)))

    monkeypatch.setattr(metaplastic_adam, "metaplastic_adam_kernel", Kernel())
    weight_dtype, grad_dtype, state_dtype = formats
    numbers = [0.0, 1.0, 0.999, 0.001, 1e-8, 1.0, 1.35, 0.0, math.inf]
    for n, k, key, first_row in [(1, 64, 1, 0), (16, 260, 2**32 - 1, 1), (33, 784, 16, 2**33)]:
        (weight, *state), compact = compact_arguments(n, k, weight_dtype, state_dtype)
        scales = compact.get("exp_avg_scale"), compact.get("exp_avg_sq_scale")
        grad, held = torch.ones(n, k, dtype=grad_dtype), (*state[:2], *scales, state[2])
        metaplastic_adam.launch(weight, grad, held, numbers + 4 * [float(key)], first_row, 2**47 + 4)
        (programs,), (arguments, specialization, options) = launches.pop()

        types = {name: type_ for name, (type_, _) in zip(arguments, specialization, strict=True)}
        assert tuple((name, type_) for name, type_ in types.items() if type_ != "constexpr") == update.parameters
        for name, (type_, alignment) in zip(arguments, specialization, strict=True):
            if type_ != "constexpr":
                assert alignment == ("D" if type_.startswith("*") else None), name
        assert arguments["ROWS"] == update.rows and arguments["K_FACTOR"] == 4
        assert options == {"num_warps": update.num_warps, "enable_fp_fusion": False}
        assert programs == -(-n // update.rows) * -(-k // 128)


# ---- on a GPU


def on_cuda(arguments, settings):
    moved = {name: t.cuda() for name, t in settings.items() if isinstance(t, torch.Tensor) and name != "seed"}
    return [t.cuda() for t in arguments], settings | moved


def assert_same_bits(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def scales_of(settings):
    return [settings[name] for name in ("exp_avg_scale", "exp_avg_sq_scale") if name in settings]


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (5, 65), (33, 127), (300, 784), (1000, 1030)], ids=str)
def test_on_cuda_every_bit_is_that_of_the_cpu(shape, formats):
    weight_dtype, grad_dtype, state_dtype = formats
    theirs, their_settings = compact_arguments(*shape, weight_dtype, state_dtype)
    mine, settings = on_cuda(theirs, their_settings)
    for step, weight_bound in ((3, math.inf), (4, 0.2), (5, 0.125)):
        grad = (torch.randn(shape) * torch.randn(shape).exp()).to(grad_dtype)
        changes = dict(step=step, weight_bound=weight_bound)
        ops.metaplastic_adam_(mine[0], grad.cuda(), *mine[1:], **settings | changes)
        ops.metaplastic_adam_(theirs[0], grad, *theirs[1:], **their_settings | changes)
        assert_same_bits([*mine, *scales_of(settings)], [*theirs, *scales_of(their_settings)])


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_on_cuda_every_bit_of_a_large_layer_is_that_of_the_cpu(formats):
    weight_dtype, grad_dtype, state_dtype = formats
    n = k = 4096
    weight, grad = (torch.randn(n, k) * 0.2).to(weight_dtype), torch.randn(n, k).to(grad_dtype)
    second = torch.uint8 if state_dtype == torch.int8 else state_dtype
    theirs = [weight, torch.zeros(n, k, dtype=state_dtype), torch.zeros(n, k, dtype=second), bits_of(n, k)]
    their_settings = ADAM | {"seed": torch.tensor([2**62 + 1, 77])}
    if state_dtype == torch.int8:
        their_settings |= {name: torch.zeros(n, k // 64) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
    mine, settings = on_cuda(theirs, their_settings)
    for step in (1, 2):
        ops.metaplastic_adam_(mine[0], grad.cuda(), *mine[1:], **settings | {"step": step})
        ops.metaplastic_adam_(theirs[0], grad, *theirs[1:], **their_settings | {"step": step})
    assert_same_bits([*mine, *scales_of(settings)], [*theirs, *scales_of(their_settings)])


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS[::4], ids=str)
def test_on_cuda_the_fused_update_is_the_two_operators_one_after_the_other(formats):
    weight_dtype, _, state_dtype = formats
    for m, n, k in [(20, 3, 7), (100, 2000, 1030), (0, 5, 65)]:
        arguments, settings = compact_arguments(n, k, weight_dtype, state_dtype)
        settings |= {"weight_bound": math.inf if k == 7 else 0.2}
        (fused, fused_settings), (apart, apart_settings) = (on_cuda(*cloned(arguments, settings)) for _ in range(2))
        d, x_bits = torch.randn(m, n).cuda(), bits_of(m, k).cuda()
        gate = gate_of("per sample", m, k).cuda() if m else None
        ops.gated_metaplastic_adam_(d, x_bits, gate, *fused, **fused_settings)
        grad = ops.gated_weight_grad(d, x_bits, k, gate)
        ops.metaplastic_adam_(apart[0], grad, *apart[1:], **apart_settings)
        assert_same_bits([*fused, *scales_of(fused_settings)], [*apart, *scales_of(apart_settings)])


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_optimizer_trains_as_on_the_cpu(weight_dtype, state_dtype):
    theirs = ek.BinaryEngramLinear(784, 300, dtype=weight_dtype)
    mine = copy.deepcopy(theirs).cuda()
    optimizers = []
    for layer in (mine, theirs):
        torch.manual_seed(3)
        settings = dict(state_dtype=state_dtype, weight_decay=1e-3, weight_bound=0.125)
        optimizers.append(ek.MetaplasticAdam(layer.parameters(), **settings))
    for _ in range(10):
        grad = torch.randn(300, 784).to(weight_dtype)
        mine.weight.grad, theirs.weight.grad = grad.cuda(), grad
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(
            [mine.weight.detach(), mine.weight.sign_bits()], [theirs.weight.detach(), theirs.weight.sign_bits()]
        )
    state, their_state = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    assert_same_bits([state["exp_avg"], state["exp_avg_sq"]], [their_state["exp_avg"], their_state["exp_avg_sq"]])


@pytest.mark.gpu
@pytest.mark.parametrize("weight_bound", [math.inf, 0.125])
def test_on_cuda_a_nan_is_an_error_of_a_later_operator(weight_bound):
    weight, *state = (torch.zeros(64, 64, device="cuda") for _ in range(3))
    ops.metaplastic_adam_(weight, torch.full_like(weight, torch.nan), *state, None, **ADAM, weight_bound=weight_bound)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="NaN"):
        ops.pack_signs(torch.ones(1, 64, device="cuda"))
    assert torch.equal(ops.pack_signs(torch.ones(1, 64, device="cuda")).cpu(), reference.pack_signs(torch.ones(1, 64)))


@pytest.mark.gpu
def test_on_cuda_the_update_goes_to_the_current_stream():
    stream = torch.cuda.Stream()
    weight, *state = (torch.zeros(4096, 4096, device="cuda") for _ in range(3))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        grad = torch.ones_like(weight)
        ops.metaplastic_adam_(weight, grad, *state, None, **ADAM)
        moved = (weight != 0).all()
    stream.synchronize()
    assert moved.item()


@pytest.mark.parametrize("gated", [False, True])
def test_a_capture_into_a_graph_is_refused(gated, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_launch", lambda: pytest.fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight, state = torch.zeros(3, 5), (torch.zeros(3, 5), torch.zeros(3, 5), None)
    with pytest.raises(RuntimeError, match="step: expected no capture into a CUDA graph"):
        if gated:
            x_bits = torch.zeros(4, 2, dtype=torch.int64)
            triton_kernels.gated_metaplastic_adam_(torch.ones(4, 3), x_bits, None, weight, *state, **ADAM)
        else:
            triton_kernels.metaplastic_adam_(weight, torch.ones(3, 5), *state, **ADAM)
