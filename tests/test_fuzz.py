"""The fuzzer of operators: that it finds nothing here, and finds what is put in front of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import operators as fuzz

from engram_kernels import ops, reference

CASES = 1200


def test_every_operator_has_a_recipe():
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("engram_kernels::"))
    taking_tensors = {
        schema.name.removeprefix("engram_kernels::")
        for schema in schemas
        if any("Tensor" in str(argument.type) for argument in schema.arguments)
    }
    # the checks of metaplastic_adam_, for updates outside the library; whole layers; whole steps
    services = {"_check_update", "_layer", "_layer_grad", "_update_all", "_update_from_layer"}
    assert services < taking_tensors and taking_tensors - services == set(fuzz.OPERATORS)


def test_operators_agree_with_the_reference_and_refuse_everything_else():
    tally = fuzz.Tally()
    assert fuzz.find_failure(1, range(CASES), tally=tally) == ""
    for name in fuzz.OPERATORS:
        assert tally.valid[name] >= 10 and tally.refused[name] >= 5, name


def test_cases_are_made_by_their_seed_and_number_alone():
    def shown(seed, case):
        call = fuzz.make_call(seed, case, list(fuzz.OPERATORS))
        values = [t.to_dense().flatten().tolist() for t in call.tensors().values() if not t.is_meta]
        return str(call), str(values)

    first = [shown(3, case) for case in range(40)]
    torch.manual_seed(9)
    assert [shown(3, case) for case in reversed(range(40))] == first[::-1]
    assert shown(4, 0) != first[0]


# ---- faults: name of the operator, and what it does instead


def after(change):
    """The operator, and then a change of its result."""

    def wrap(function):
        def wrapped(*arguments, **named):
            result = function(*arguments, **named)
            change(result, named)
            return result

        return wrapped

    return wrap


def before(change):
    """A change of the arguments, then the operator."""

    def wrap(function):
        def wrapped(*arguments, **named):
            return function(*arguments, **named | change(named))

        return wrapped

    return wrap


def refuses(error):
    """The operator, whose errors are of another kind."""

    def wrap(function):
        def wrapped(*arguments, **named):
            try:
                return function(*arguments, **named)
            except RuntimeError as own:
                raise error from own

        return wrapped

    return wrap


def last_of(result, named):
    if result.numel() and not result.is_meta:
        result.view(-1)[-1] += 1


def last_of_scalar(result, named):
    if ops.isa() == "scalar":
        last_of(result, named)


def one_part_in_a_thousand(result, named):
    if result.is_floating_point() and not result.is_meta:
        result.mul_(1.001)


def writes_to(name):
    def change(result, named):
        if isinstance(named[name], torch.Tensor) and not named[name].is_meta and named[name].numel():
            named[name].view(-1)[0] += 1

    return change


def writes_behind(name):
    def change(result, named):
        t = named[name]
        if isinstance(t, torch.Tensor) and not t.is_meta and t.is_contiguous():
            memory = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
            end = (t.storage_offset() + t.numel()) * t.element_size()
            memory[end:] ^= 1

    return change


def writes_before_it_refuses(function):
    def wrapped(**named):
        try:
            return function(**named)
        except RuntimeError:
            writes_to("weight")(None, named)
            raise

    return wrapped


def ignores_strides(named):
    x = named["x"]
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.numel() and not x.is_meta:
        return {"x": x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())}
    return {}


def takes_float64(named):
    d = named["d"]
    return {"d": d.float() if isinstance(d, torch.Tensor) and d.dtype == torch.float64 else d}


def without_gate_padding(named):
    gate = named["gate_bits"]
    return {} if gate is None else {"k": named["x_bits"].shape[-1] * 64}


def forgets(name, value):
    return before(lambda named: {name: value} if isinstance(named[name], type(value)) else {})


FAULTS = {
    "a wrong last bit": ("pack_signs", after(last_of)),
    "a wrong last number": ("binary_matmul", after(last_of)),
    "a wrong kernel of one instruction set": ("unpack_signs", after(last_of_scalar)),
    "sums that are a little off": ("sign_matmul", after(one_part_in_a_thousand)),
    "gradients that are a little off": ("gated_weight_grad", after(one_part_in_a_thousand)),
    "padding that counts": ("binary_matmul", before(without_gate_padding)),
    "strides that are not looked at": ("pack_signs", before(ignores_strides)),
    "a dtype that is let through": ("masked_input_grad", before(takes_float64)),
    "a rate that is let through": ("sample_engram", before(lambda named: {"rate": 0.5})),
    "a NaN that is let through": ("pack_signs", before(lambda named: {"x": torch.nan_to_num(named["x"])})),
    "an argument that is ignored": ("sample_engram", forgets("first_row", 0)),
    "another argument that is ignored": ("metaplastic_adam_", forgets("weight_decay", 0.0)),
    "a step that is taken twice": ("metaplastic_adam_", before(lambda named: {"step": named["step"] + 1})),
    "sign bits that are forgotten": ("gated_metaplastic_adam_", before(lambda named: {"sign_bits": None})),
    "an argument that is written to": ("gated_input_grad", after(writes_to("x"))),
    "memory beside an argument that is written to": ("metaplastic_adam_", after(writes_behind("weight"))),
    "writes before a refusal": ("metaplastic_adam_", writes_before_it_refuses),
    "an error that names nothing": ("sign_matmul_t", refuses(RuntimeError("bad argument"))),
    "an error that names another argument": ("binary_threshold", refuses(RuntimeError("gate: expected more"))),
    "an assertion of torch's": ("pack_window", refuses(RuntimeError('k: expected "x" INTERNAL ASSERT FAILED'))),
    "an error of another kind": ("pack_window", refuses(AttributeError("x"))),
    "a result of another dtype": ("unpack_signs", before(lambda named: {"dtype": torch.float32})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_operators_are_found(monkeypatch, fault):
    name, wrap = FAULTS[fault]
    monkeypatch.setattr(ops, name, wrap(getattr(ops, name)))
    report = fuzz.find_failure(0, range(400), [name])
    assert report.startswith(("WrongCallError", "AttributeError")), report
    command = re.search(
        r"repeat it with: python -m tests\.fuzz\.operators --seed 0 --case (\d+) --operators (\w+)", report
    )
    assert command[2] == name
    assert fuzz.find_failure(0, [int(command[1])], [name]) == report
    monkeypatch.undo()
    assert fuzz.find_failure(0, [int(command[1])], [name]) == ""


def test_a_fault_of_the_reference_is_found(monkeypatch):
    definition = reference.pack_window
    monkeypatch.setattr(reference, "pack_window", lambda x, width, gate_bits: definition(x, width / 2, gate_bits))
    assert "element" in fuzz.find_failure(0, range(100), ["pack_window"])


ROOT = Path(__file__).parents[1]


def fuzzed(*arguments, program="from tests.fuzz.operators import *"):
    command = f"{program}\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", command, *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_tells_what_it_did():
    done = fuzzed("--seconds", 2, "--seed", 5, "--operators", "pack_signs", "unpack_signs")
    assert done.returncode == 0, done.stderr
    assert re.search(r"seed 5, \d+ cases\npack_signs: [1-9]\d* valid calls agree, [1-9]\d* bad ones", done.stdout)


def test_the_command_names_the_case_that_crashes():
    crash = "\n".join((
        "from tests.fuzz.operators import *",
        "import os, signal",
        "pack = ops.pack_signs",
        "def crash(x):",
        "    os.kill(os.getpid(), signal.SIGSEGV) if isinstance(x, Tensor) and x.dim() == 4 else None",
        "    return pack(x)",
        "ops.pack_signs = crash",
    ))  # fmt: skip
    done = fuzzed("--seconds", 60, "--seed", 0, "--operators", "pack_signs", program=crash)
    assert done.returncode == 1
    case = re.search(r"the process ended with -11\nrepeat it with: .* --seed 0 --case (\d+)", done.stdout)[1]
    assert "x: torch." in str(fuzz.make_call(0, int(case), ["pack_signs"]))
