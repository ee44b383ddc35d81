"""The plain network is torch's own layers."""

from itertools import pairwise

import torch
from full_precision import seeds, widths
from hypothesis import given, settings

from engram_kernels.continual.methods.finetune import MLP


@given(widths, seeds)
@settings(deadline=None)
def test_the_network_is_plain_torch(hidden, seed):
    sizes = [5, *hidden, 4]
    torch.manual_seed(seed)
    model = MLP(sizes)
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(k, n) for k, n in pairwise(sizes)]
    plain = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.ReLU())))[:-1]
    x = torch.randn(3, 5)
    assert torch.equal(model(x), plain(x))
