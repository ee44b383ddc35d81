"""The checker finds nothing wrong with the kernels, and the compact comparisons that it runs reach their lines.

The checker sees every access of every thread: out of bounds, misaligned, uninitialised, or racing with another.
"""

import shutil
from pathlib import Path

import pytest

from . import build, compare
from .operators import EmulatedOps

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason=f"{build.COMPILER} not installed")

FILES = list(compare.COMPACT)
# No other kernel asks whether it runs on sm_100.
CHECKED = [(architecture, file) for architecture in (750, 800) for file in FILES] + [(1000, "binary_matmul.cuh")]
LEAST_COVERAGE = 0.95


@pytest.mark.parametrize("schedule", [1, *(pytest.param(other, marks=pytest.mark.slow) for other in (0, 2))])
@pytest.mark.parametrize(("architecture", "file"), CHECKED)
def test_checker_finds_nothing(architecture, file, schedule):
    ops = EmulatedOps(architecture, "checked", schedule)
    for check in compare.COMPACT[file]:
        check(ops)


@pytest.mark.slow  # a test of the comparisons, with builds of its own
def test_compact_comparisons_cover_the_kernels(capsys):
    parts = []
    for architecture in build.ARCHITECTURES:
        ops = EmulatedOps(architecture, "coverage")
        for checks in compare.COMPACT.values():
            for check in checks:
                check(ops)
        parts.append(ops.library.coverage())
    coverage = build.merged(*parts)
    with capsys.disabled():
        print(f"\n{'csrc/cuda':20} lines   ran  missed")
        for name, lines in sorted(coverage.items()):
            missed = ", ".join(map(str, lines.missed))
            print(f"{name:20} {len(lines.executable):5} {lines.ratio:5.1%}  {missed}")
    kernels = {path.name for path in Path(build.ROOT / "csrc" / "cuda").glob("*.cuh")}
    without_code = {
        "device.cuh",
        "ptx.cuh",
    }  # of the emulator's compiler: tests/emulator gives the functions of ptx.cuh
    assert set(coverage) == kernels - without_code
    for name, lines in coverage.items():
        assert lines.ratio >= LEAST_COVERAGE, (name, lines.missed)
