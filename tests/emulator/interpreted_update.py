"""The Triton update run by Triton's interpreter, bit for bit against the CPU operator.

Needs TRITON_INTERPRET=1 from the start of the process: tests/test_triton_kernels.py runs this module so.
"""

import contextlib
import itertools
import math
import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_ops import ADAM, GATES, bits_of, gate_of

from emulator.triton_memory import MemoryCheck
from engram_kernels import ops, triton_kernels
from engram_kernels.reference import words_for

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_triton_kernels.py"

# NumPy, which computes, warns of what IEEE 754 defines
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
SECOND_MOMENT = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.uint8}
WEIGHTS_AND_GRADS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
FORMATS = [(weight, grad, state) for weight, grad in WEIGHTS_AND_GRADS for state in SECOND_MOMENT]
SHAPES = [(1, 1), (7, 64), (5, 65), (17, 127), (3, 784)]
SEED = torch.tensor([-5, 2**32 - 1])


class Layer:
    """What an update changes, with random weights and no history."""

    def __init__(self, n, k, weight_dtype, state_dtype, sign_bits=True):
        scaled = state_dtype == torch.int8
        self.weight = (torch.randn(n, k) * 0.2).to(weight_dtype)
        self.exp_avg = torch.zeros(n, k, dtype=state_dtype)
        self.exp_avg_sq = torch.zeros(n, k, dtype=SECOND_MOMENT[state_dtype])
        self.sign_bits = torch.full((n, words_for(k)), -1) if sign_bits else None
        self.exp_avg_scale, self.exp_avg_sq_scale = (torch.zeros(n, -(-k // 64)) if scaled else None for _ in range(2))

    def twin(self):
        other = object.__new__(Layer)
        other.__dict__ = {name: None if t is None else t.clone() for name, t in self.__dict__.items()}
        return other

    def tensors(self):
        return list(self.__dict__.values())

    def updated_by(self, update, *gradient, **settings):
        scales = dict(exp_avg_scale=self.exp_avg_scale, exp_avg_sq_scale=self.exp_avg_sq_scale)
        state = self.exp_avg, self.exp_avg_sq, self.sign_bits
        before, after = (gradient, (self.weight,)) if len(gradient) == 3 else ((self.weight,), gradient)
        update(*before, *after, *state, **ADAM | scales | {"seed": SEED} | settings)


def assert_same_bits(mine, theirs):
    for name, a in mine.__dict__.items():
        b = theirs.__dict__[name]
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.fixture
def nan_flag(monkeypatch):
    """Has the CUDA operators take CPU tensors, and gives them a flag."""
    flag = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton_kernels, "_nan_flag", lambda: flag.data_ptr())
    return flag


def gradient(n, k, dtype, spread=1.0):
    return (torch.randn(n, k) * (torch.randn(n, k) * spread).exp()).to(dtype)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_that_of_the_cpu_operator(shape, formats, nan_flag):
    weight_dtype, grad_dtype, state_dtype = formats
    mine = Layer(*shape, weight_dtype, state_dtype)
    theirs = mine.twin()
    for step, weight_bound in ((1, math.inf), (2, 0.125)):
        grad, settings = gradient(*shape, grad_dtype), dict(step=step, weight_bound=weight_bound, first_row=2**33 - 2)
        mine.updated_by(triton_kernels.metaplastic_adam_, grad, **settings)
        theirs.updated_by(ops.metaplastic_adam_, grad, **settings)
        assert_same_bits(mine, theirs)
    assert (mine.weight.abs() <= 0.125).all()
    assert nan_flag.item() == 0


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    formats=st.sampled_from(FORMATS),
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 4, 7, 64, 65, 132, 200])),
    settings=st.fixed_dictionaries(
        dict(
            lr=st.sampled_from([0.0, 5e-3, 1e-42, 1e30]),
            beta1=st.sampled_from([0.0, 0.9]),
            beta2=st.sampled_from([0.0, 0.999, 1 - 1e-9]),
            eps=st.sampled_from([0.0, 1e-8, 1e-42]),
            weight_decay=st.sampled_from([0.0, 1e-2, 10.0]),
            metaplasticity=st.sampled_from([0.0, 1.35, 30.0, 1e20]),
            step=st.sampled_from([1, 2, 1000, 10**9]),
            weight_bound=st.sampled_from([math.inf, 1e39, 100.0, 0.1, 1e-42]),
        )
    ),
    magnitudes=st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 1e-3, 1.0, 1e15, 1e25, 3e38, math.inf]), min_size=1),
    sign_bits=st.booleans(),
    seed=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1)),
    first_row=st.sampled_from([0, 1, 2**32 - 3, 2**40]),
)
def test_every_bit_is_that_of_the_cpu_operator_for_extreme_numbers(
    formats, shape, settings, magnitudes, sign_bits, seed, first_row
):
    weight_dtype, grad_dtype, state_dtype = formats
    (n, k), flag = shape, torch.zeros(1, dtype=torch.int32)
    mine = Layer(n, k, weight_dtype, state_dtype, sign_bits)
    mine.weight.view(-1)[:: len(magnitudes)] *= 300
    theirs = mine.twin()
    of_unit = torch.tensor(magnitudes).repeat(-(-n * k // len(magnitudes)))[: n * k].view(n, k)
    settings = settings | {"seed": torch.tensor(seed), "first_row": first_row}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(triton_kernels, "_nan_flag", lambda: flag.data_ptr())
        for _ in range(2):
            grad = (torch.randn(n, k).sign() * of_unit).to(grad_dtype)
            mine.updated_by(triton_kernels.metaplastic_adam_, grad, **settings)
            try:
                theirs.updated_by(ops.metaplastic_adam_, grad, **settings)
            except RuntimeError as error:
                assert "expected finite steps" in str(error) and flag.item() == 1
                assert_same_bits(mine, theirs)
                return
            assert flag.item() == 0
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_zero_gradients_and_a_standstill(formats, nan_flag):
    weight_dtype, grad_dtype, state_dtype = formats
    for changes in ({"weight_decay": 0.0}, {"lr": 0.0}, {"metaplasticity": 0.0}):
        mine = Layer(6, 70, weight_dtype, state_dtype)
        theirs = mine.twin()
        for step, scale in ((1, 0.0), (2, 1.0), (3, 0.0)):
            grad = gradient(6, 70, grad_dtype) * scale
            mine.updated_by(triton_kernels.metaplastic_adam_, grad, **changes | {"step": step})
            theirs.updated_by(ops.metaplastic_adam_, grad, **changes | {"step": step})
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_nan_is_noted_wherever_it_is(formats, nan_flag):
    weight_dtype, grad_dtype, state_dtype = formats
    n, k = 9, 131
    places = [(0, 0), (8, 130), (3, 127)]
    for (row, unit), weight_bound in zip(places, itertools.cycle((math.inf, 0.1)), strict=False):
        grad, layer = gradient(n, k, grad_dtype), Layer(n, k, weight_dtype, state_dtype)
        grad[row, unit] = math.nan
        nan_flag.zero_()
        layer.updated_by(triton_kernels.metaplastic_adam_, grad, weight_bound=weight_bound)
        assert nan_flag.item() == 1 and layer.weight.isfinite().all()


def test_what_lies_beyond_the_rows_and_units_is_never_taken_for_a_nan(nan_flag):
    Layer(1, 1, torch.float32, torch.float32).updated_by(
        triton_kernels.metaplastic_adam_, torch.ones(1, 1), eps=0.0, weight_decay=0.0
    )
    assert nan_flag.item() == 0


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_rows_updated_apart_are_those_updated_together(formats, nan_flag):
    weight_dtype, grad_dtype, state_dtype = formats
    whole, grad = Layer(12, 130, weight_dtype, state_dtype), gradient(12, 130, grad_dtype)
    apart = whole.twin()
    whole.updated_by(triton_kernels.metaplastic_adam_, grad, first_row=7)
    for rows in (slice(0, 5), slice(5, 12)):
        part = object.__new__(Layer)
        part.__dict__ = {name: None if t is None else t[rows] for name, t in apart.__dict__.items()}
        part.updated_by(triton_kernels.metaplastic_adam_, grad[rows], first_row=7 + rows.start)
    assert_same_bits(apart, whole)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("formats", FORMATS[::4], ids=str)
def test_the_fused_update_is_the_two_operators_one_after_the_other(formats, gate, nan_flag, monkeypatch):
    weight_dtype, _, state_dtype = formats
    monkeypatch.setattr(triton_kernels, "_GRADIENT_BLOCK_BYTES", 64 * 130 * 4)  # several blocks
    for m, n, k, d_dtype in [(20, 3, 7, torch.float32), (30, 70, 130, torch.bfloat16), (0, 5, 65, torch.float32)]:
        fused = Layer(n, k, weight_dtype, state_dtype)
        apart = fused.twin()
        d, x_bits, gate_bits = torch.randn(m, n).to(d_dtype), bits_of(m, k), None if m == 0 else gate_of(gate, m, k)
        settings = dict(weight_bound=math.inf if k == 7 else 0.2, first_row=3)
        fused.updated_by(triton_kernels.gated_metaplastic_adam_, d, x_bits, gate_bits, **settings)
        grad = ops.gated_weight_grad(d.float(), x_bits, k, gate_bits)
        apart.updated_by(ops.metaplastic_adam_, grad, **settings)
        assert_same_bits(fused, apart)


def test_a_gradient_of_any_strides_is_taken(nan_flag):
    mine = Layer(5, 66, torch.float32, torch.float32)
    theirs, grad = mine.twin(), torch.randn(66, 5).T
    mine.updated_by(triton_kernels.metaplastic_adam_, grad)
    theirs.updated_by(ops.metaplastic_adam_, grad)
    assert_same_bits(mine, theirs)


# ---- memory


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 65), (9, 260)], ids=str)
@pytest.mark.parametrize("sign_bits", [True, False])
def test_the_update_stays_within_its_tensors_and_races_with_nobody(shape, formats, sign_bits, nan_flag):
    weight_dtype, grad_dtype, state_dtype = formats
    layer, grad = Layer(*shape, weight_dtype, state_dtype, sign_bits), gradient(*shape, grad_dtype)
    grad[-1, -1] = math.nan
    with MemoryCheck(*layer.tensors(), grad, flags=[nan_flag]):
        layer.updated_by(triton_kernels.metaplastic_adam_, grad)
    assert nan_flag.item() == 1


SIZE = tl.constexpr(32)


@triton.jit
def copy_kernel(x, y, n, load_at, load_limit, store_limit, stride):
    at = tl.program_id(0) * stride + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at + load_at, mask=at + load_at < load_limit), mask=at < store_limit)


@triton.jit
def collide_kernel(y):
    tl.store(y + tl.arange(0, SIZE) // 2, tl.arange(0, SIZE))


def copied(x, y, *, load_at=0, load_limit=100, store_limit=100, stride=SIZE.value):
    with MemoryCheck(x, y if y is not x else None):
        copy_kernel[(4,)](x, y, 100, load_at, load_limit, store_limit, stride)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"store_limit": 101}, "store of program .* outside every tensor, 1 elements"),
        ({"load_limit": 103}, "load of program .* outside every tensor, 3 elements"),
        ({"load_at": -1}, r"load of program \(0, 0, 0\) outside every tensor, 1 elements"),
        ({"stride": 31}, "race: 12 bytes written more than once"),
    ],
)
def test_the_check_notices_wrong_accesses(changes, message):
    x, y = torch.randn(100), torch.zeros(100)
    with pytest.raises((RuntimeError, IndexError, triton.runtime.errors.InterpreterError), match=message):
        copied(x, y, **changes)


def test_the_check_notices_a_program_that_reads_what_another_writes():
    x = torch.randn(100)
    with pytest.raises(RuntimeError, match="race: 12 bytes read by one program and written by another"):
        copied(x, x, load_at=1)


def test_the_check_notices_two_writes_of_one_program():
    y = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="race: 64 bytes written more than once"), MemoryCheck(y):
        collide_kernel[(1,)](y)


def test_the_check_lets_correct_kernels_pass_and_leaves_the_interpreter_as_it_was():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    x, y = torch.randn(100), torch.zeros(100)
    copied(x, y)
    copied(x, x)
    assert torch.equal(x, y)
    assert before == (InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store)
