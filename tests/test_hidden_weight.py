import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from test_layers import unscaled
from torch import nn

import engram_kernels as ek
from engram_kernels.hidden_weight import as_hidden_weight


@pytest.fixture
def weight():
    return ek.HiddenWeight(torch.randn(7, 70))


def actual_signs(weight):
    return ek.reference.pack_signs(weight.detach().clone())


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0)


def numpy_write(w):
    w.detach().numpy()[...] *= -1


def optimizer_step(w):
    w.grad = torch.randn_like(w)
    torch.optim.SGD([w], lr=10.0).step()
    w.grad = None


def load_state(w):
    layer = unscaled(70, 7)
    layer.weight = w
    layer.load_state_dict({"weight": torch.randn(7, 70)})


CHANGES = {
    "in place": lambda w: w.detach().neg_(),
    "no_grad": lambda w: torch.no_grad()(lambda: w.mul_(-1))(),
    "data": lambda w: w.data.neg_(),
    "data of a view": lambda w: w[0].data.neg_(),
    "data of a transpose": lambda w: w.T.data.neg_(),
    "data assigned": lambda w: setattr(w, "data", torch.randn(7, 70)),
    "data copied into": lambda w: w.data.copy_(torch.randn(7, 70)),
    "numpy": numpy_write,
    "dlpack": lambda w: torch.from_dlpack(w.detach()).neg_(),
    "index": lambda w: w.data.__setitem__((3, 5), -w.data[3, 5]),
    "init": lambda w: nn.init.normal_(w),
    "an optimizer": optimizer_step,
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.randn(490), [w]),
    "load_state_dict": load_state,
    "storage": lambda w: w.untyped_storage().copy_(torch.randn(490).untyped_storage()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_signs_are_never_stale(weight, change):
    before = weight.sign_bits().clone()
    CHANGES[change](weight)
    gc.collect()
    assert torch.equal(weight.sign_bits(), actual_signs(weight))
    assert not torch.equal(weight.sign_bits(), before)


@pytest.mark.parametrize(
    "alias",
    {
        "data": lambda w: w.data,
        "a view's data": lambda w: w.view(-1).data,
        "numpy": lambda w: w.detach().numpy(),
        "state_dict": lambda w: w.detach().data,
    }.items(),
    ids=lambda item: item[0],
)
def test_an_alias_that_lives_on_keeps_signs_from_going_stale(weight, alias):
    other = alias[1](weight)
    for _ in range(3):
        weight.sign_bits()
        other *= -1
        assert torch.equal(weight.sign_bits(), actual_signs(weight))


@pytest.mark.parametrize(
    "alias",
    {
        "data": lambda w: w.data,
        "numpy": lambda w: w.detach().numpy(),
        "data set to a tensor that lives on": lambda w: setattr(w, "data", values := torch.randn(7, 70)) or values,
        "a tuple of views": lambda w: torch.atleast_3d([w])[0].data,
        "flattened": lambda w: torch._utils._flatten_dense_tensors((w,)).data,
        "a storage": lambda w: w.untyped_storage(),
    }.items(),
    ids=lambda item: item[0],
)
def test_an_alias_that_writes_and_dies_between_two_looks_is_noticed(weight, alias):
    other = alias[1](weight)
    before = weight.sign_bits().clone()
    if isinstance(other, torch.UntypedStorage):
        other.copy_(torch.randn(490).untyped_storage())
    else:
        other *= -1
    del other
    assert torch.equal(weight.sign_bits(), actual_signs(weight)) and not torch.equal(weight.sign_bits(), before)


def test_an_alias_that_spans_a_metaplastic_step_is_noticed(weight):
    alias = weight.data
    weight.grad = torch.randn(7, 70)
    ek.MetaplasticAdam([weight]).step()
    alias.neg_()
    del alias
    assert torch.equal(weight.sign_bits(), actual_signs(weight))


def test_memory_of_others_is_looked_at_every_time():
    array = np.random.default_rng(0).normal(size=(7, 70)).astype(np.float32)
    weight = ek.HiddenWeight(torch.from_numpy(array))
    shared = ek.HiddenWeight(torch.randn(7, 70).share_memory_())
    for each, write in ((weight, lambda: np.negative(array, out=array)), (shared, lambda: shared.data.neg_())):
        each.sign_bits()
        write()
        assert torch.equal(each.sign_bits(), actual_signs(each))
        assert not each._is_fresh()


def test_two_weights_in_one_memory_follow_each_others_steps():
    one = ek.HiddenWeight(torch.randn(7, 70))
    other = ek.HiddenWeight(one.detach())
    other.sign_bits()
    one.grad = torch.randn(7, 70)
    optimizer = ek.MetaplasticAdam([one], lr=1.0)
    optimizer.step()
    del one, optimizer
    assert torch.equal(other.sign_bits(), actual_signs(other))


def test_a_step_after_the_shape_changed():
    weight = ek.HiddenWeight(torch.randn(7, 70))
    weight.sign_bits()
    weight.data = torch.randn(7, 200)
    weight.grad = torch.randn(7, 200)
    ek.MetaplasticAdam([weight]).step()
    assert torch.equal(weight.sign_bits(), actual_signs(weight))


def test_a_hidden_weight_of_a_hidden_weight(weight):
    other = ek.HiddenWeight(weight)
    assert other.data_ptr() == weight.data_ptr() and torch.equal(other.sign_bits(), weight.sign_bits())


def test_signs_are_kept_while_nothing_changed(weight):
    kept = weight.sign_bits()
    assert weight.shape == (7, 70) and weight.dtype == torch.float32 and weight.grad is None
    assert weight.sign_bits() is kept
    weight.detach().sum()
    assert weight.sign_bits() is not kept  # handed out: packed anew, since the alias may have been written to


def test_layer_calls_and_metaplastic_steps_keep_the_signs():
    layer = unscaled(70, 7)
    optimizer = ek.MetaplasticAdam(layer.parameters(), lr=0.05)
    kept = layer.weight.sign_bits()
    before = kept.clone()
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(3, 70)).square().sum().backward()
        optimizer.step()
        assert layer.weight.sign_bits() is kept  # written by the step itself
    assert torch.equal(kept, actual_signs(layer.weight)) and not torch.equal(kept, before)


def test_copies_and_pickles_carry_values_only(weight):
    weight.sign_bits()
    for other in (
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.load(io.BytesIO(saved(weight)), weights_only=True),
    ):
        assert type(other) is ek.HiddenWeight and other.requires_grad
        assert torch.equal(other, weight)
        other.data.neg_()
        assert torch.equal(other.sign_bits(), actual_signs(other))
        assert torch.equal(weight.sign_bits(), actual_signs(weight))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_plain_parameter_becomes_a_hidden_weight_in_place():
    parameter = nn.Parameter(torch.randn(3, 4))
    assert as_hidden_weight(parameter) is parameter and isinstance(parameter, ek.HiddenWeight)
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \(3,\)"):
        as_hidden_weight(nn.Parameter(torch.randn(3)))
    with pytest.raises(TypeError, match="weight: expected an nn.Parameter, got Tensor"):
        as_hidden_weight(torch.randn(3, 4))


def test_signs_made_in_inference_mode_serve_training():
    layer = unscaled(70, 7)
    with torch.inference_mode():
        layer(torch.randn(2, 70))
    layer(torch.randn(2, 70, requires_grad=True)).sum().backward()
    assert layer.weight.grad is not None


def weights_packed(call):
    """How many times the call packs a matrix of 7 rows, which only weights have here."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    return sum(e.name == "engram_kernels::pack_signs" and e.input_shapes[0][0] == 7 for e in profile.events())


def exported(layer, x):
    return torch.export.export(layer, (x,)).module()


def loaded(layer, x):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), buffer)
    return torch.export.load(io.BytesIO(buffer.getvalue())).module()


RUNNERS = {
    "eager": lambda layer, x: layer,
    "inference mode": lambda layer, x: torch.inference_mode()(layer.forward),
    "aot_eager": lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager"),
    "inductor": lambda layer, x: torch.compile(layer, fullgraph=True),
    "inductor without gradients": lambda layer, x: torch.no_grad()(torch.compile(layer, fullgraph=True)),
    "exported": exported,
    "exported and loaded": loaded,
}


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("runner", RUNNERS)
def test_weights_are_packed_once_however_the_layer_runs(runner, binary_input):
    torch._dynamo.reset()
    layer, x = unscaled(70, 7, binary_input=binary_input), torch.randn(3, 70)
    run = RUNNERS[runner](layer, x)
    for _ in range(2):  # the first call compiles
        run(x)
    assert weights_packed(lambda: run(x)) == 0
    assert weights_packed(lambda: (layer(x), layer(x), run(x))) <= 1
    assert weights_packed(lambda: (layer(x), run(x))) == 0
    own = run.weight if runner.startswith("exported") else layer.weight
    for write in (lambda: own.data.neg_(), lambda: torch.no_grad()(own.neg_)(), lambda: optimizer_step(own)):
        before = run(x)
        write()
        assert not torch.equal(run(x), before)
        expected = (sign(x) if binary_input else x) @ sign(own.detach()).T
        torch.testing.assert_close(run(x), expected)


def test_weights_made_in_inference_mode_are_packed_once():
    x = torch.randn(3, 70)
    with torch.inference_mode():
        layer = unscaled(70, 7)
        layer(x)
        assert weights_packed(lambda: layer(x)) == 0
        for write in (
            lambda: layer.weight.neg_(),
            lambda: layer.weight.view(-1).neg_(),
            lambda: layer.weight.detach().neg_(),
            lambda: layer.weight.data.neg_(),
        ):
            before = layer(x)
            write()
            assert torch.equal(layer(x), -before)


def test_parameters_of_a_hidden_weight(weight):
    other = nn.Parameter(weight)
    assert type(other) is ek.HiddenWeight and other.requires_grad and other.data_ptr() == weight.data_ptr()
    assert type(weight.detach()) is torch.Tensor
    with torch.no_grad():
        other.neg_()
    assert torch.equal(weight.sign_bits(), actual_signs(weight))


def test_a_nan_weight_is_refused(weight):
    weight.data[2, 3] = float("nan")
    with pytest.raises(RuntimeError, match="^weight: expected numbers, got NaN, which has no sign"):
        weight.sign_bits()
