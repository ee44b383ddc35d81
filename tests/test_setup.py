"""How setup.py reads its surroundings. It builds nothing when it is imported."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("needs the checkout that the package was built in", allow_module_level=True)
_specification = importlib.util.spec_from_file_location("setup_of_engram_kernels", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(setup)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("CXX", "MAX_JOBS", "ENGRAM_BUILD_JOBS", "ENGRAM_SANITIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "value, words, host",
    [
        (None, ["c++"], ["-ccbin", "c++"]),
        ("", ["c++"], ["-ccbin", "c++"]),
        ("clang++", ["clang++"], ["-ccbin", "clang++"]),
        ("ccache g++", ["ccache", "g++"], ["-ccbin", "g++"]),
        ("g++ -m64", ["g++", "-m64"], ["-ccbin", "g++", "-Xcompiler", "-m64"]),
        ("'/a folder/g++' -m64", ["/a folder/g++", "-m64"], ["-ccbin", "/a folder/g++", "-Xcompiler", "-m64"]),
    ],
)
def test_a_compiler_may_have_a_launcher_and_options(monkeypatch, value, words, host):
    if value is not None:
        monkeypatch.setenv("CXX", value)
    assert setup.compiler_words() == words
    assert setup.host_compiler_flags(words) == host
    commands = setup.kernel_commands(Path("objects"))
    assert len(commands) == len(setup.KERNELS) * len(setup.isa_flags())
    for target, command in commands.items():
        assert command[: len(words)] == words and command[command.index("-o") + 1] == str(target)


@pytest.mark.parametrize(
    "host, isas",
    [
        ("linux-x86_64", ["scalar", "avx2", "avx512"]),
        ("linux-aarch64", ["scalar", "neon"]),
        ("macosx-11.0-arm64", ["scalar", "neon"]),
        ("win-amd64", ["scalar", "avx2", "avx512"]),
        ("linux-riscv64", ["scalar"]),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="elsewhere Python has no name of another processor")
def test_kernels_are_those_of_the_processor_that_is_built_for(monkeypatch, host, isas):
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", host)
    assert list(setup.isa_flags()) == isas


def test_a_kernel_is_compiled_through_a_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"env {os.environ.get('CXX', 'c++')}")
    target, command = next((t, c) for t, c in setup.kernel_commands(tmp_path).items() if t.name == "tables.o")
    target.parent.mkdir()
    subprocess.run(command, cwd=ROOT, check=True)
    assert target.stat().st_size > 0


@pytest.mark.parametrize(
    "own, general, jobs", [("3", None, 3), (None, "5", 5), ("3", "5", 3), ("", "5", 5), ("3", "none", 3)]
)
def test_jobs_are_what_is_asked_for(monkeypatch, own, general, jobs):
    for name, value in (("ENGRAM_BUILD_JOBS", own), ("MAX_JOBS", general)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert setup.build_jobs() == jobs


@pytest.mark.parametrize("name", ["ENGRAM_BUILD_JOBS", "MAX_JOBS"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_a_wrong_number_of_jobs_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name}: expected a number of at least 1, got '{value}'"):
        setup.build_jobs()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes")
def test_jobs_are_the_cores_of_the_process():
    assert setup.build_jobs() == len(os.sched_getaffinity(0))
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert setup.build_jobs() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_sanitizers_are_in_every_command_where_they_are_asked_for(monkeypatch):
    def sanitized():
        flags = setup.bindings()
        commands = [*setup.kernel_commands(Path()).values(), flags.extra_compile_args["cxx"], flags.extra_link_args]
        return ["-fsanitize=address,undefined" in command for command in commands]

    monkeypatch.setenv("ENGRAM_CUDA", "0")
    assert not any(sanitized())
    monkeypatch.setenv("ENGRAM_SANITIZE", "address,undefined")
    assert all(sanitized())
