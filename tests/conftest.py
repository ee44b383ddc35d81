import os
from pathlib import Path

import pytest
import torch

import engram_kernels as ek

MOST_WORKERS = 8  # each is a process of up to 1 GB


def cores():
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_xdist_auto_num_workers(config):
    """A worker for each core; none for a single file, which is done before workers have imported torch."""
    files = {argument.split("::")[0] for argument in config.args}
    if len(files) == 1 and Path(config.invocation_params.dir, files.pop()).is_file():
        return 0
    return min(cores(), MOST_WORKERS)


def pytest_configure(config):
    """Workers share the cores: their threads would only wait for each other. Tests of threads set their own number."""
    if hasattr(config, "workerinput"):
        threads = max(1, cores() // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that tests start


@pytest.fixture(params=ek.ops.available_isas())
def isa(request):
    """Runs the test once per instruction set that this machine has."""
    before = ek.ops.isa()
    ek.ops.set_isa(request.param)
    yield request.param
    ek.ops.set_isa(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
