"""Timing, memory and the machine: what every benchmark here measures with."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import engram_kernels as ek
from engram_kernels.continual.memory import MemoryMeter

# A call that takes longer is not repeated: its warm-up is its measurement, so that a baseline without hardware
# support (bfloat16, int8 on older processors) does not take the time of all the others.
SLOW_SECONDS = 2.0
# A sample is as many calls in a row as take about so long: shorter ones would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.005
MOST_CALLS = 5000


def seconds_of(call: Callable[[], Any], device: str = "cpu", calls: int = 1) -> float:
    """Seconds per call, over ``calls`` in a row; on a GPU between two CUDA events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start_seconds = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start_seconds) / calls


def peak_bytes_of(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Most memory during a call above that before it: its results and its workspace. None where nothing tells.

    On the CPU it is resident memory, pages of 4 KiB counted in batches: not exact below about 0.5 MiB.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    trim_heap()
    meter = MemoryMeter()
    if not meter.can_reset:  # an earlier and higher peak would hide this one
        return None
    result = call()  # kept until the peak is read
    peak = meter.peak_above_start()
    del result
    return peak


def trim_heap() -> None:
    """Gives freed memory back, so that using it again counts."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Threads of torch and of our kernels alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Contender:
    """A call under measurement: its seconds, or why it has none. ``threads``: if others than the caller's."""

    def __init__(self, call: Callable[[], Any], *, device: str = "cpu", threads: int | None = None) -> None:
        self.call, self.device, self.threads = call, device, threads
        self.calls = 1
        self.samples: list[float] = []
        self.error: str | None = None
        self.once = False

    def warm_up(self) -> None:
        """Calls twice or more, to see how many calls make a sample; what fails here is not called again."""
        try:
            seconds = self._seconds()
            if seconds < SLOW_SECONDS:
                seconds = self._seconds()
                self.calls = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / seconds)))
        except Exception as error:  # whatever a library refuses with, the report shows it
            self.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return
        if seconds >= SLOW_SECONDS:
            self.once, self.samples = True, [seconds]

    def sample(self) -> None:
        if not self.once and self.error is None:
            self.samples.append(self._seconds())

    def _seconds(self) -> float:
        with torch_threads(self.threads or torch.get_num_threads()):
            return seconds_of(self.call, self.device, self.calls)

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


def alternate(contenders: Iterable[Contender], rounds: int) -> None:
    """Measures all of them in turns, so that a machine that slows down does so for all.

    The order changes at random: a call after one that multiplies large floats takes up to a fifth longer.
    """
    contenders, order = list(contenders), random.Random(0)
    for contender in contenders:
        contender.warm_up()
    for _ in range(rounds):
        for contender in order.sample(contenders, len(contenders)):
            contender.sample()


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_sets": ek.ops.available_isas(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "engram_kernels": ek.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = ", ".join(f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return f"{fields['model name']} ({numbers})"


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
