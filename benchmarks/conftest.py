"""Side-by-side measurement: ours and its baselines take turns in one run, and medians are compared."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from measure import Contender, environment, peak_bytes_of, torch_threads

import engram_kernels as ek

DESELECTED: list[Any] = []
RESULTS = Path(__file__).parent / "results"


# ---- where and on how many threads


@dataclass(frozen=True)
class Target:
    isa: str
    device: str


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def _use(isa: str):
    if isa == "cuda":
        yield Target(f"cuda, {torch.cuda.get_device_name()}", "cuda")
        return
    before = ek.ops.isa()
    ek.ops.set_isa(isa)
    yield Target(isa, "cpu")
    ek.ops.set_isa(before)


@pytest.fixture(params=[ek.ops.available_isas()[0], CUDA])
def target(request):
    """The best instruction set of this machine, and the GPU."""
    yield from _use(request.param)


@pytest.fixture(params=[*ek.ops.available_isas(), CUDA])
def any_target(request):
    """Each instruction set of this machine in turn, best first, and the GPU."""
    yield from _use(request.param)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}threads")
def threads(request):
    """Threads of torch and of our kernels alike."""
    with torch_threads(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    with torch_threads(1):
        yield


@pytest.fixture
def two_threads():
    with torch_threads(2):
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---- measurement


@pytest.fixture
def side_by_side(request, benchmark):
    """Measures ``ours`` and every baseline in rounds of random order and adds a row to the report.

    ``baselines`` maps names to calls or, for other settings than ours, to :class:`measure.Contender`; ``bound`` is a
    :class:`bound.Bound`. ``work`` is what a call of ours does, in the bound's unit and in 1e-9 ``rate_unit`` seconds.
    """
    group = request.node.originalname.removeprefix("test_").replace("_", " ")

    def run(what, target, ours, baselines, *, bound=None, work=1.0, rate_unit="", rounds=7, peak=True):
        def contender(call):
            return call if isinstance(call, Contender) else Contender(call, device=target.device)

        mine, others = contender(ours), {name: contender(call) for name, call in baselines.items()}
        limit = None if bound is None else Contender(bound.call, device=target.device)
        everyone = [*others.values(), *([limit] if limit else [])]
        for each in [mine, *everyone]:
            each.warm_up()
        if mine.error:
            pytest.fail(f"{what}: {mine.error}", pytrace=False)

        order, after_mine = random.Random(0), []

        def others_turn():  # as in measure.alternate, those after ours before the next round
            turns = order.sample([mine, *everyone], 1 + len(everyone))
            for each in [*after_mine, *turns[: turns.index(mine)]]:
                each.sample()
            after_mine[:] = turns[turns.index(mine) + 1 :]

        benchmark.pedantic(mine.sample, setup=others_turn, rounds=rounds)
        for each in after_mine:
            each.sample()
        row = report.Row(group, what, target.isa, torch.get_num_threads(), mine.median, len(mine.samples))
        if rate_unit:
            row.rate, row.rate_unit = work / mine.median / 1e9, rate_unit
        if limit and limit.median:
            row.bound, row.bound_fraction = bound.name, (work / mine.median) / (bound.work / limit.median)
        if peak:
            row.peak_bytes = peak_bytes_of(ours, target.device)
        for name, each in others.items():
            ratio = None if each.median is None else each.median / mine.median
            baseline = report.Baseline(name, ratio, each.median, calls=len(each.samples), error=each.error)
            row.baselines.append(baseline)
        report.add(row, benchmark)

    return run


# ---- the run


def pytest_addoption(parser):
    parser.addoption(
        "--report", type=Path, metavar="DIR", help="write kernels.json and kernels.png here (a whole run: "
        "benchmarks/results)",
    )  # fmt: skip


def pytest_xdist_auto_num_workers():
    return 0  # measured one after the other


def pytest_configure(config):
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        report.NOTES.append(f"other processes were running when this began (load average {load:.1f})")
    config.option.benchmark_quiet = True  # its table shows ours alone, without the baselines


def pytest_deselected(items):
    DESELECTED.extend(items)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = "no CUDA device on this machine"
    elif ek.ops.build_info()["cuda"] == "no":
        reason = "this build of engram_kernels has no CUDA kernels"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    if not report.ROWS:
        return
    machine = environment()
    terminalreporter.section("ratios of medians, measured in turns")
    for line in [report.header(machine), "", *report.table(report.ROWS, report.NOTES)]:
        terminalreporter.write_line(line)
    folder = config.option.report
    if folder is None:
        whole = not DESELECTED and all(Path(argument).is_dir() for argument in config.args)
        if not whole or terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
            terminalreporter.write_line("not a whole run without failures: no report written; --report DIR writes one")
            return
        folder = RESULTS
    for path in report.write(folder, machine, report.ROWS, report.NOTES):
        terminalreporter.write_line(f"wrote {path}")
