"""Methods: the losses are what they say, options are checked, and each method is built as it is defined."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.continual.methods import (
    METHODS,
    MethodConfig,
    batch_cross_entropy,
    build,
    build_optimizer,
    method_config,
)
from engram_kernels.continual.scenarios import SCENARIOS


@given(st.integers(1, 20), st.integers(2, 12), st.integers(0, 2**31))
@settings(deadline=None)
def test_batch_loss_is_cross_entropy_over_the_classes_of_the_batch(samples, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(classes, (samples,), generator=generator)
    loss = batch_cross_entropy(logits, y)
    present, index = y.unique(return_inverse=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, present], index))
    (gradient,) = torch.autograd.grad(loss, logits)
    absent = torch.ones(classes, dtype=torch.bool).index_fill_(0, present, False)
    assert (gradient[:, absent] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("dataset", ["digits", "mnist", "own"])
def test_every_method_has_what_defines_it(scenario, dataset):
    configs = {name: method_config(name, scenario, dataset) for name in METHODS}
    assert configs["engram"].rate is not None
    assert configs["mbnn"].rate is None
    assert configs["bnn"].rate is None
    assert configs["bnn"].metaplasticity == 0


def test_overrides_win_and_none_keeps_the_default():
    default = method_config("engram", "class", "digits")
    assert method_config("engram", "class", "digits", lr=None, rate=None) == default
    changed = method_config("engram", "class", "digits", lr=(0.1, 0.2, 0.3), rate=0.3, epochs=7, loss="all")
    assert changed == dataclasses.replace(default, lr=(0.1, 0.2, 0.3), rate=0.3, epochs=7, loss="all")


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("ewc", {}, "method: expected one of engram, mbnn, bnn, got 'ewc'"),
        ("engram", {"rate": 0.0}, r"rate: expected a number in \(0, 1\], got 0.0"),
        ("engram", {"rate": 1.5}, r"rate: expected a number in \(0, 1\], got 1.5"),
        ("engram", {"rate": math.nan}, r"rate: expected a number in \(0, 1\], got nan"),
        ("engram", {"temperature": -1.0}, "temperature: expected a number >= 0, got -1.0"),
        ("engram", {"temperature": math.nan}, "temperature: expected a number >= 0, got nan"),
        ("engram", {"temperature": 1e-9}, "temperature: expected 0 or at least 1e-6"),
        ("engram", {"ste_window": 0.0}, "ste_window: expected a number > 0, got 0.0"),
        ("engram", {"lr": 0.0}, "lr: expected a finite number > 0, got 0.0"),
        ("engram", {"lr": (0.1, math.nan, 0.1)}, "lr: expected a finite number > 0, got nan"),
        ("engram", {"metaplasticity": -0.5}, "metaplasticity: expected a finite number >= 0, got -0.5"),
        ("engram", {"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0, got -1.0"),
        ("engram", {"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ("engram", {"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ("engram", {"state_dtype": "int4"}, "state_dtype: expected one of float32, bfloat16, int8, got 'int4'"),
        ("engram", {"weight_dtype": "int8"}, "weight_dtype: expected one of float32, bfloat16, got 'int8'"),
        ("engram", {"loss": "hinge"}, "loss: expected one of all, batch, got 'hinge'"),
        ("mbnn", {"rate": 0.1}, "rate: expected only with a method that has engram gates, .* method mbnn"),
        ("bnn", {"temperature": 1.0}, "temperature: expected only with a method that has engram gates"),
        (
            "bnn",
            {"metaplasticity": 1.0},
            r"metaplasticity: expected 0 with method bnn, got 1.0 \(that is method mbnn",
        ),
    ],
)
def test_bad_options(method, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        build(method_config(method, "class", "mnist", **options), 8, [16, 16], 4)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fuse_backward", [False, True])
def test_compact_methods_learn(state_dtype, weight_dtype, fuse_backward):
    torch.manual_seed(0)
    config = method_config(
        "mbnn", "class", "mnist", state_dtype=state_dtype, weight_dtype=weight_dtype, fuse_backward=fuse_backward
    )
    method = build(config, 9, [70, 24], 4)
    assert {p.dtype for p in method.model.parameters()} == {getattr(torch, weight_dtype)}
    x, y = torch.randn(12, 9), torch.arange(12) % 4
    losses = []
    for _ in range(60):
        method.optimizer.zero_grad()
        loss = method.loss(method.model(x), y)
        loss.backward()
        method.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert {s["exp_avg"].dtype for s in method.optimizer.state.values()} == {getattr(torch, state_dtype)}


@pytest.mark.parametrize("hidden", [[], [0], [16, -1]])
def test_bad_widths(hidden):
    with pytest.raises(ValueError, match="hidden: expected at least one layer width, each >= 1"):
        build(METHODS["bnn"], 8, hidden, 3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("hidden", [[33], [40, 24]])
def test_a_built_method_maps_inputs_to_logits_and_learns_from_them(name, hidden):
    torch.manual_seed(0)
    method = build(dataclasses.replace(METHODS[name], train_hidden=True), 9, hidden, 4)
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    x, y = torch.randn(12, 9), torch.arange(12) % 4
    logits = method.model(x)
    assert logits.shape == (12, 4)
    assert logits.dtype == torch.float32
    method.loss(logits, y).backward()
    method.optimizer.step()
    after = method.model.state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) >= len(hidden) + 1, f"every layer moves, only {changed} did"


def test_hidden_layers_can_be_kept_as_initialised():
    torch.manual_seed(0)
    method = build(dataclasses.replace(METHODS["engram"], train_hidden=False), 9, [40, 24], 4)
    trained = [p for group in method.optimizer.param_groups for p in group["params"]]
    assert sum(p.ndim == 2 for p in trained) == 1


class Layered(torch.nn.Module):
    """Three matrices, vectors after the first two."""

    def __init__(self):
        super().__init__()
        shapes = {"w1": (4, 3), "b1": (4,), "w2": (5, 4), "b2": (5,), "w3": (2, 5)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))


def test_layers_can_have_their_own_values():
    model = Layered()
    config = MethodConfig(lr=(0.1, 0.2, 0.3), metaplasticity=2.0)
    groups = build_optimizer(config, model).param_groups
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [
        [(4, 3), (4,)],
        [(5, 4), (5,)],
        [(2, 5)],
    ]
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.3]
    assert [group["metaplasticity"] for group in groups] == [2.0] * 3
    assert len(build_optimizer(MethodConfig(lr=0.1, metaplasticity=2.0), model).param_groups) == 1


@pytest.mark.parametrize("hidden, wanted", [([], [3]), ([8], [1, 3]), ([8, 8], [1, 2, 3]), ([8] * 3, [1, 2, 2, 3])])
def test_three_values_serve_any_depth(hidden, wanted):
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in [*hidden, 8]))
    config = MethodConfig(lr=(1.0, 2.0, 3.0), metaplasticity=0.0)
    assert [group["lr"] for group in build_optimizer(config, model).param_groups] == wanted


def test_as_many_values_as_layers():
    with pytest.raises(
        ValueError, match=r"lr: expected one value, three .* or one for each of the 3 trainable .*, got 2"
    ):
        build_optimizer(MethodConfig(lr=(0.1, 0.2), metaplasticity=0.0), Layered())
