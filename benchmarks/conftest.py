"""Side-by-side measurement: our call and its baseline alternate in one run, and medians are compared."""

import statistics
import time

import pytest
import torch

import engram_kernels as ek

ROWS = []


@pytest.fixture(params=ek.ops.available_isas())
def isa(request):
    """Each instruction set that this machine has, in turn."""
    before = ek.ops.isa()
    ek.ops.set_isa(request.param)
    yield request.param
    ek.ops.set_isa(before)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}threads")
def threads(request):
    """Threads of torch and of our kernels alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def side_by_side(benchmark):
    """Calls ``baseline`` before every round of ``ours`` and reports the ratio of the medians."""

    def run(row, ours, baseline, baseline_name, *, rounds=7, **rates):
        baseline_seconds = []

        def time_baseline():
            start = time.perf_counter()
            baseline()
            baseline_seconds.append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=time_baseline, rounds=rounds, warmup_rounds=1)
        seconds = benchmark.stats.stats.median
        ratio = statistics.median(baseline_seconds[1:]) / seconds
        benchmark.extra_info.update(
            ratio=ratio, baseline=baseline_name, isa=ek.ops.isa(), threads=torch.get_num_threads()
        )
        text = [row, f"{torch.get_num_threads()} thread(s) {ek.ops.isa()}"]
        text += [f"{amount / seconds / 1e9:.0f} {unit}" for unit, amount in rates.items()]
        ROWS.append(" | ".join([*text, f"{ratio:.1f}x {baseline_name}"]))

    return run


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section(f"ratios of medians, torch {torch.__version__}")
        for row in ROWS:
            terminalreporter.write_line(row)
