"""Binarized methods: per-layer values, compact formats, fixed hidden layers."""

import dataclasses

import pytest
import torch

from engram_kernels import BinaryEngramLinear, HiddenWeight
from engram_kernels.continual.methods import METHODS, BinaryConfig, build, method_config
from engram_kernels.continual.methods.binary import build_optimizer


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fuse_backward", [False, True])
def test_compact_methods_learn(state_dtype, weight_dtype, fuse_backward):
    torch.manual_seed(0)
    config = method_config(
        "mbnn", "class", "mnist", state_dtype=state_dtype, weight_dtype=weight_dtype, fuse_backward=fuse_backward
    )
    method = build("mbnn", config, 9, [70, 24], 4)
    assert {p.dtype for p in method.model.parameters()} == {getattr(torch, weight_dtype)}
    x, y = torch.randn(12, 9), torch.arange(12) % 4
    losses = [method.observe(x, y)[0] for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert {s["exp_avg"].dtype for s in method.optimizer.state.values()} == {getattr(torch, state_dtype)}


@pytest.mark.parametrize("name", ["engram", "mbnn", "bnn"])
@pytest.mark.parametrize("hidden", [[33], [40, 24]])
def test_every_layer_learns(name, hidden):
    torch.manual_seed(0)
    config = method_config(name, "class", "mnist", readout="linear", lr=0.01)
    method = build(name, config, 9, hidden, 4)
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    method.observe(torch.randn(12, 9), torch.arange(12) % 4)
    after = method.model.state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) >= len(hidden) + 1, f"every layer moves, only {changed} did"


def test_hidden_layers_can_be_kept_as_initialised():
    torch.manual_seed(0)
    method = build("engram", dataclasses.replace(METHODS["engram"].config, train_hidden=False), 9, [40, 24], 4)
    trained = [p for group in method.optimizer.param_groups for p in group["params"]]
    assert sum(p.ndim == 2 for p in trained) == 1


class Layered(torch.nn.Module):
    """Three hidden weights, vectors after the first two."""

    def __init__(self):
        super().__init__()
        shapes = {"w1": (4, 3), "b1": (4,), "w2": (5, 4), "b2": (5,), "w3": (2, 5)}
        for name, shape in shapes.items():
            kind = HiddenWeight if len(shape) == 2 else torch.nn.Parameter
            self.register_parameter(name, kind(torch.ones(shape)))


def test_layers_can_have_their_own_values():
    model = Layered()
    config = BinaryConfig(lr=(0.1, 0.2, 0.3), metaplasticity=2.0)
    groups = build_optimizer(config, model).param_groups
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [
        [(4, 3), (4,)],
        [(5, 4), (5,)],
        [(2, 5)],
    ]
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.3]
    assert [group["metaplasticity"] for group in groups] == [2.0] * 3
    assert len(build_optimizer(BinaryConfig(lr=0.1, metaplasticity=2.0), model).param_groups) == 1


@pytest.mark.parametrize("hidden, wanted", [([], [3]), ([8], [1, 3]), ([8, 8], [1, 2, 3]), ([8] * 3, [1, 2, 2, 3])])
def test_three_values_serve_any_depth(hidden, wanted):
    model = torch.nn.Sequential(*(BinaryEngramLinear(8, 8) for _ in [*hidden, 8]))
    config = BinaryConfig(lr=(1.0, 2.0, 3.0))
    assert [group["lr"] for group in build_optimizer(config, model).param_groups] == wanted


def test_as_many_values_as_layers():
    with pytest.raises(
        ValueError, match=r"lr: expected one value, three .* or one for each of the 3 trainable .*, got 2"
    ):
        build_optimizer(BinaryConfig(lr=(0.1, 0.2)), Layered())
