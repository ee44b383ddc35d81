"""Machine code of the real kernels on every architecture: nothing spills, and the instructions are those we count on.

``pytest -s`` prints a table: resources, the loop that does the work, and the bound that its instructions set.
"""

import pytest

from . import machine_code as mc

pytestmark = [
    pytest.mark.skipif(bool(mc.missing("nvcc", "ptxas", "nvdisasm")), reason=mc.missing("nvcc", "ptxas", "nvdisasm"))
]

CSRC = mc.FOLDER.parents[1] / "csrc"
BYTES = ("100", "120")  # where the product of bits is emulated, and ours is of bytes


# these have the PTX of the architecture before them, and other registers and latencies
VARIANTS = ("86", "89", "90a", "120")


@pytest.fixture(
    scope="module",
    params=[pytest.param(a, marks=pytest.mark.slow if a in VARIANTS else []) for a in mc.ARCHITECTURES],
)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(architecture):
    ptx = mc.compile_ptx(CSRC / "cuda" / "launch.cu", architecture, include=[CSRC])
    found = {
        name: kernel
        for name, kernel in mc.kernels(mc.assemble(ptx, architecture)).items()
        if "probe_kernel" not in name
    }
    for name, kernel in sorted(found.items()):
        print(mc.summary(kernel, architecture, name.removeprefix("_ZN6engram4cuda")))
    return found


def named(kernels: dict[str, mc.Kernel], *fragments: str) -> dict[str, mc.Kernel]:
    """Kernels whose mangled name has all of these in it; there must be some."""
    found = {name: kernel for name, kernel in kernels.items() if all(f in name for f in fragments)}
    assert found, fragments
    return found


def test_nothing_spills(kernels):
    assert {name: kernel.spilled for name, kernel in kernels.items() if kernel.spilled} == {}
    assert {name: kernel.stack for name, kernel in kernels.items() if kernel.stack} == {}


def test_every_kernel_fits(kernels, architecture):
    for name, kernel in kernels.items():
        assert kernel.most_threads is not None, f"{name} has no __launch_bounds__"
        assert mc.blocks_at_once(kernel, architecture, kernel.most_threads) >= 1, name
        assert kernel.shared <= 48 << 10, name


def test_binary_matmul_is_of_tensor_core_products(kernels, architecture):
    for name, kernel in named(kernels, "binary_matmul_kernel").items():
        hot = [instruction.opcode for instruction in kernel.hot_loop()]
        if architecture in BYTES:
            assert any(opcode.startswith("IMMA.16832.U8.S8") for opcode in hot), name
            assert kernel.count("BMMA") == 0, name
        else:
            wanted = "BMMA.88128.XOR" if architecture == "75" else "BMMA.168256.AND"
            assert any(opcode.startswith(wanted) for opcode in hot), name
            assert kernel.count("BMMA") == kernel.count(wanted), name


@pytest.mark.parametrize(("gate", "products"), [(0, 1), (1, 1), (2, 2)], ids=["none", "shared", "per sample"])
@pytest.mark.parametrize(("tile", "tiles"), [("ILi2ELi4ELi4E", 4), ("ILi2ELi2ELi2E", 2)])
def test_multiply_adds_of_a_stage(kernels, gate, products, tile, tiles):
    """512 bits of ``tiles`` x 4 products of 16 x 8, once more for a gate per sample; nothing is multiplied twice."""
    for name, kernel in named(kernels, f"BinaryTile{tile}LNS0_4GateE{gate}E").items():
        assert sum(map(mc.multiply_adds, kernel.hot_loop())) == products * tiles * 4 * 16 * 8 * 512, name


def test_sign_products_of_floats_are_of_bfloat16(kernels, architecture):
    if architecture == "75":
        pytest.skip("sm_75 has no product of bfloat16")
    for kind, planes in (("Float32", 3), ("BFloat16", 1)):
        for name, kernel in named(kernels, "sign_product_kernel", f"{len(kind)}{kind}").items():
            assert kernel.count("HMMA.16816.F32.BF16") == kernel.count("HMMA"), name
            assert sum(i.name == "HMMA" for i in kernel.hot_loop()) == planes * 2 * 2 * 8, name
    for name, kernel in named(kernels, "sign_product_kernel", "5Uint8").items():
        assert kernel.count("IMMA.16832.U8.S8") > 0 and kernel.count("HMMA") == 0, name


def test_tiles_are_copied_16_bytes_at_a_time(kernels, architecture):
    for name, kernel in named(kernels, "binary_matmul_kernel").items():
        if architecture == "75":
            assert kernel.count("LDG.E.128") and kernel.count("STS.128"), name
        else:
            assert any("LDGSTS" in opcode and "128" in opcode for opcode in kernel.opcodes), name
        assert kernel.count("LDSM.16.M88.4"), name


def test_wide_loads(kernels):
    for name, kernel in named(kernels, "binary_dot_kernel").items():
        assert kernel.count("LDG.E.128"), name
    for fragments in (("pack_kernelILb1", "SignOfFloat32"), ("gumbel_top_k_kernelILb1E",)):
        for name, kernel in named(kernels, *fragments).items():
            assert kernel.count("LDG.E.128"), name
    for fragment in ("IhLi16E", "ItLi8E", "IjLi4E", "ImLi2E"):
        for name, kernel in named(kernels, f"unpack_kernel{fragment}").items():
            assert kernel.count("STG.E.128"), name


def test_dots_count_fewer_words_than_they_add(kernels):
    """Carry-save adders: 4 POPC for 8 words, and 8 LOP3 a sum beside."""
    for name, kernel in named(kernels, "binary_dot_kernel").items():
        hot = [instruction.name for instruction in kernel.hot_loop()]
        assert hot.count("POPC") % 4 == 0 and hot.count("POPC") >= 16, name
        assert hot.count("LOP3") >= 2 * hot.count("POPC"), name
