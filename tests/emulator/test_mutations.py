"""Tests of the tests: every wrong kernel of mutations.py is caught. Minutes: `pytest -m slow tests/emulator`."""

import shutil

import pytest

from . import build, mutations


def test_mutations_are_of_every_kernel_and_can_be_applied():
    folder = build.ROOT / "csrc" / "cuda"
    for mutation in mutations.MUTATIONS:
        assert mutation.apply((folder / mutation.file).read_text())
    assert len(mutations.BY_KEY) == len(mutations.MUTATIONS) >= 40  # names are unique
    assert {mutation.file for mutation in mutations.MUTATIONS} == set(mutations.PARTS)
    assert mutations.EQUIVALENT.keys() | mutations.MISSED.keys() <= mutations.BY_KEY.keys()


def test_parts_of_the_host_have_every_function():
    functions = {name for names, _ in mutations.PARTS.values() for name in names}
    declared = [
        line.split("(")[0].split()[1] for line in mutations.HOST.read_text().splitlines() if "EXPORT run" in line
    ]
    assert functions == set(declared)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason=f"{build.COMPILER} not installed")
@pytest.mark.parametrize("key", [key for key in mutations.BY_KEY if key not in mutations.EQUIVALENT])
def test_mutation_is_caught(key):
    how, _ = mutations.result_of(mutations.BY_KEY[key])
    if key in mutations.MISSED and not how:
        pytest.xfail(mutations.MISSED[key])
    assert how, "neither the comparisons nor the checker tell this kernel from the right one"
