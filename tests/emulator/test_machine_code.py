"""What the analysis says of kernels whose machine code is known, and of resources by arithmetic."""

import re
import subprocess

import pytest

from . import machine_code as mc

pytestmark = pytest.mark.skipif(
    bool(mc.missing("nvcc", "ptxas", "nvdisasm")), reason=mc.missing("nvcc", "ptxas", "nvdisasm")
)


@pytest.fixture(scope="module", params=mc.ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def cubin(architecture):
    return mc.assemble(mc.compile_ptx(mc.FOLDER / "machine_code_self_test.cu", architecture), architecture)


@pytest.fixture(scope="module")
def kernels(cubin):
    return mc.kernels(cubin)


def test_resources_are_those_that_cuobjdump_prints(cubin, kernels, architecture):
    tool = mc.find_tool("cuobjdump")
    if tool is None:
        pytest.skip(mc.missing("cuobjdump"))
    printed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    reserved = mc.RESERVED_SHARED if architecture in ("90a", "100", "120") else 0  # which it counts as the kernel's
    assert {name: tuple(map(int, numbers)) for name, *numbers in re.findall(pattern, printed)} == {
        name: (k.registers, k.stack, k.shared + reserved if k.shared else 0) for name, k in kernels.items()
    }


def test_spills_are_found(kernels):
    spilling = kernels["spilling"]
    assert spilling.most_threads == 1024 and spilling.registers <= 64
    assert spilling.spilled > 0 and spilling.stack > 0
    assert kernels["wide"].spilled == kernels["wide"].stack == 0


def test_array_indexed_at_run_time_is_found(kernels):
    assert kernels["indexing"].stack == 64
    assert kernels["indexing"].spilled > 0


def test_wide_accesses(kernels):
    wide = kernels["wide"]
    assert wide.count("LDG.E.128") == wide.count("STG.E.128") == 1
    assert wide.shared == 256
    assert wide.most_threads == 128
    assert kernels["counting"].count("LDG.E.128") == 0


def test_inner_loop_is_the_hot_one(kernels):
    hot = kernels["counting"].hot_loop()
    opcodes = [instruction.name for instruction in hot]
    assert opcodes.count("POPC") == 4
    assert opcodes.count("LDG") == 8
    assert opcodes.count("STG") == 0  # that is in the outer loop
    assert len(kernels["counting"].loops()) >= 2


def test_binary_product(kernels, architecture):
    multiplying = kernels["multiplying"]
    hot = multiplying.hot_loop()
    if architecture == "75":
        assert multiplying.count("BMMA.88128.XOR") == 1
        assert sum(map(mc.multiply_adds, hot)) == 8 * 8 * 128
    elif architecture in ("100", "120"):  # emulated by 8 products of bytes
        assert multiplying.count("BMMA") == 0
        assert multiplying.count("IMMA") == 8
    else:
        assert multiplying.count("BMMA.168256.AND") == 1
        assert sum(map(mc.multiply_adds, hot)) == 16 * 8 * 256


def test_summary_is_of_one_kernel(kernels, architecture):
    text = mc.summary(kernels["multiplying"], architecture)
    assert "registers" in text and "not measured" in text


def kernel(registers: int, shared: int = 0) -> mc.Kernel:
    return mc.Kernel("k", registers, 0, shared, None)


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "blocks"),
    [
        ("80", 32, 0, 256, 8),  # 64 warps
        ("86", 32, 0, 256, 6),  # 48 warps
        ("75", 32, 0, 256, 4),
        ("80", 128, 0, 256, 2),  # 4 warps a scheduler
        ("80", 129, 0, 256, 1),  # one register more
        ("80", 255, 0, 128, 2),
        ("80", 16, 48 << 10, 128, 3),  # 164 KiB, 1 KiB taken by each block
        ("90a", 16, 48 << 10, 128, 4),
        ("75", 16, 32 << 10, 128, 2),
        ("80", 16, 0, 32, 32),  # blocks
        ("86", 16, 0, 32, 16),
    ],
)
def test_blocks_at_once(architecture, registers, shared, threads, blocks):
    assert mc.blocks_at_once(kernel(registers, shared), architecture, threads) == blocks


def test_clocks_of_instructions():
    body = [mc.Instruction(16 * i, opcode, opcode) for i, opcode in enumerate(
        ["POPC"] * 4 + ["LOP3.LUT"] * 4 + ["BMMA.168256.AND.POPC"] * 2 + ["LDSM.16.M88.4", "LDS.128", "FFMA"]
    )]  # fmt: skip
    needed = mc.clocks(body, "80")
    assert needed == {"issue": 13 / 4, "popc": 8, "integer": 2, "tensor": 4, "shared": 8, "float": 0.5}
    assert "tensor" not in mc.clocks(body, "90a")  # no documented rate


def test_compiler_of_cuda_home_comes_first(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert mc.find_nvcc() != tool  # not executable
    tool.chmod(0o755)
    assert mc.find_nvcc() == tool


def test_error_of_the_compiler_is_told(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void k() { undeclared(); }\n")
    with pytest.raises(RuntimeError, match="undeclared"):
        mc.compile_ptx(source, "80")
