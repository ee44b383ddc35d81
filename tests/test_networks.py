import math

import pytest
import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.continual.data import load


def test_a_network_uses_no_statistics_of_the_batch():
    for engram in (None, ek.StochasticEngram(0.1)):
        model = ek.EngramMLP((30, 100, 100, 7), engram=engram, readout="linear", encode=False).eval()
        x = torch.randn(12, 30)
        whole = model(x)
        torch.testing.assert_close(whole, torch.cat([model(row[None]) for row in x]), rtol=1e-5, atol=1e-5)
        assert not list(model.buffers())


@pytest.mark.parametrize("readout", ["linear", "dendritic"])
@pytest.mark.parametrize("train_hidden", [True, False])
def test_hidden_layers_are_trained_or_left(readout, train_hidden):
    model = ek.EngramMLP((30, 100, 100, 7), engram=0.2, readout=readout, train_hidden=train_hidden)
    model.loss(torch.randn(12, 30), torch.arange(12) % 7).backward()
    hidden = [layer.weight.grad is not None for layer in model.layers[:2]]
    assert hidden == [train_hidden] * 2
    last = model.layers[2] if readout == "linear" else model.readout
    assert last.weight.grad.abs().max() > 0


def test_defaults_follow_the_readout():
    paper = ek.EngramMLP((784, 64, 64, 10), readout="linear")
    assert all(parameter.requires_grad for parameter in paper.parameters())
    assert paper.layers[1].ste_window == math.inf and paper.layers[1].engram.rate == 0.1
    fixed = ek.EngramMLP((784, 64, 10))
    assert [name for name, parameter in fixed.named_parameters() if parameter.requires_grad] == ["readout.weight"]
    negative = (fixed.layers[0].weight < 0).sum(1)
    assert torch.equal(negative, torch.full_like(negative, 392))  # balanced
    assert ek.EngramMLP((5, 4, 3), engram=None, readout="linear").layers[1].ste_window == 1.0
    first = ek.EngramMLP((5, 4, 3), readout="linear", backward_dtype=torch.bfloat16).layers[0]
    assert first.backward_dtype == torch.bfloat16
    own = nn.Linear(4, 3)
    assert ek.EngramMLP((5, 4, 3), readout=own).readout is own


def test_untrained_logits_have_unit_variance():
    model = ek.EngramMLP((784, 512, 200), readout="linear")
    assert 0.8 < model(torch.randn(50, 784)).var().item() < 1.25


def class_by_class(model, x, y, passes=1):
    """Trains on one class after the other."""
    counted = isinstance(model.readout, (ek.PrototypeReadout, ek.RidgeReadout))
    optimizer = None if counted else ek.MetaplasticAdam(model.parameters())
    for label in y.unique():
        own = (y == label).nonzero().flatten()
        order = torch.cat([own[torch.randperm(len(own))] for _ in range(1 if counted else passes)])
        for rows in order.split(16):
            if counted:
                model.observe(x[rows], y[rows])
                continue
            optimizer.zero_grad()
            model.loss(x[rows], y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("readout, wanted", [("dendritic", 90), ("ridge", 93), ("prototype", 80)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_as_it_comes_a_network_learns_digits_class_by_class(readout, wanted, dtype):
    digits = load("digits")
    model = ek.EngramMLP((64, 1024, 10), readout=readout)
    class_by_class(model, digits.x_train.to(dtype), digits.y_train, passes=3)
    accuracy = (model(digits.x_test.to(dtype)).argmax(1) == digits.y_test).float().mean().item()
    assert 100 * accuracy > wanted


@pytest.mark.parametrize("readout", ["dendritic", "ridge"])
def test_as_it_comes_a_network_learns_a_table_of_any_scale(readout):
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(6, 5, generator=generator) * 2
    y = torch.arange(1200) % 6
    x = centres[y] + torch.randn(1200, 5, generator=generator)
    x = x * torch.tensor([1e-6, 1.0, 1e5, 30.0, 1e-2]) + torch.tensor([3.0, -1e3, 1e6, 0.0, 5.0])
    train, test = slice(None, 900), slice(900, None)
    model = class_by_class(ek.EngramMLP((5, 1024, 6), readout=readout), x[train], y[train], passes=3)
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    z = (x - x.mean(0)) / x.std(0)
    means = torch.stack([z[y == label].mean(0) for label in range(6)])
    nearest_mean = (torch.cdist(z[test], means).argmin(1) == y[test]).float().mean().item()
    assert accuracy > nearest_mean - 0.08  # which has seen all classes together, the test samples too


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda: ek.EngramMLP((3,)), r"sizes: .*got \(3,\)"),
        (ValueError, lambda: ek.EngramMLP((3, 3)), r"sizes: expected a hidden layer before a dendritic read-out"),
        (
            ValueError,
            lambda: ek.EngramMLP((3, 3, 2), engram=None),
            "engram: expected a share .* with dendritic, got None",
        ),
        (ValueError, lambda: ek.EngramMLP((3, 3, 2), engram=1.5), r"rate: expected a number in \(0, 1\], got 1.5"),
        (ValueError, lambda: ek.EngramMLP((3, 3, 2), readout="forest"), "readout: expected linear, .* got 'forest'"),
        (TypeError, lambda: ek.EngramMLP((3, 3, 2), readout=3), "readout: expected a name or a module, got 3"),
        (
            ValueError,
            lambda: ek.EngramMLP((3, 3, 2), readout="ridge", train_hidden=True),
            "train_hidden: expected False with readout ridge",
        ),
        (
            TypeError,
            lambda: ek.EngramMLP((3, 3, 2), readout="ridge").loss(torch.randn(1, 3), torch.tensor([0])),
            r"call observe\(x, y\)",
        ),
        (
            TypeError,
            lambda: ek.EngramMLP((3, 3, 2)).observe(torch.randn(1, 3), torch.tensor([0])),
            r"train this one by loss\(x, y\)",
        ),
    ],
)
def test_bad_settings_are_named(error, call, message):
    with pytest.raises(error, match=message):
        call()
