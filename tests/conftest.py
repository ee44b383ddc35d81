import pytest
import torch

import engram_kernels as ek


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
