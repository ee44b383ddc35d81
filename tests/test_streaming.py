"""The step of benchmarks/continual/stream.py, written in operators, against the layers and their optimizer."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import engram_kernels as ek

PROGRAMS = str(Path(__file__).resolve().parents[1] / "benchmarks" / "continual")


@pytest.mark.parametrize("rate", [None, 0.8])
def test_the_step_in_operators_is_that_of_the_layers(monkeypatch, rate):
    monkeypatch.syspath_prepend(PROGRAMS)
    import stream

    settings = stream.Settings(1e-3, 2.5, 0.1, rate)
    learner = stream.Learner(settings)
    window = 1.0 if rate is None else float("inf")
    first = ek.BinaryEngramLinear(stream.INPUTS, stream.HIDDEN, bias=False, scaled=False, binary_input=False)
    second = ek.BinaryEngramLinear(stream.HIDDEN, stream.CLASSES, bias=False, engram=learner.engram, ste_window=window)
    for layer, weight in zip((first, second), learner.weights, strict=True):
        layer.load_state_dict({"weight": weight.clone()})
    network = nn.Sequential(first, nn.LayerNorm(stream.HIDDEN, elementwise_affine=False), second)
    optimizer = ek.MetaplasticAdam(network.parameters(), settings.lr, metaplasticity=2.5, weight_bound=0.1)
    for label in (3, 1, 3, 7):
        x = torch.randn(1, stream.INPUTS)
        torch.testing.assert_close(learner.forward(x)[0], network(x).detach())
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), torch.tensor([label])).backward()
        optimizer.step()
        learner.step(x, label)
        for layer, weight in zip((first, second), learner.weights, strict=True):
            torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-4, atol=1e-5)
    del sys.modules["stream"]
