"""Peak resident memory of training, each configuration in a process of its own; what counts: ``memory_probe.py``."""

import functools

import pytest
import report
import torch
from memory_probe import peak_bytes_in_fresh_process
from steps import CONFIGURATIONS, fastest_way

HIDDEN = 4096
peak = functools.cache(peak_bytes_in_fresh_process)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_peak_memory(benchmark, target, two_threads, name):
    threads = torch.get_num_threads()
    way = fastest_way(HIDDEN, target.device)
    ours = benchmark.pedantic(peak, (name, HIDDEN, threads, target.device), rounds=1)
    row = report.Row("peak memory above import", f"step H={HIDDEN}, {name}", target.isa, threads, peak_bytes=ours)
    for other in ("published", way):
        theirs = peak(other, HIDDEN, threads, target.device)
        ratio = theirs / ours if ours and theirs else None
        row.baselines.append(report.Baseline(other, ratio, peak_bytes=theirs))
    report.add(row, benchmark)
