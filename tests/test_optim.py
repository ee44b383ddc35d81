import copy
import io
import math

import pytest
import torch
from test_layers import unscaled
from torch import nn

import engram_kernels as ek


def restated_step(w, grad, state, lr, beta1, beta2, eps, decay, m, bound):
    """The published rule in float64, one step; state = [mu, v, t]."""
    state[2] += 1
    grad = grad + decay * w
    state[0] = beta1 * state[0] + (1 - beta1) * grad
    state[1] = beta2 * state[1] + (1 - beta2) * grad**2
    mu = torch.where(torch.sign(w) * state[0] > 0, state[0] * (1 - torch.tanh(m * w.abs()) ** 2), state[0])
    step_size = lr * math.sqrt(1 - beta2 ** state[2]) / (1 - beta1 ** state[2])
    return (w - step_size * mu / (state[1].sqrt() + eps)).clamp(-bound, bound)


@pytest.mark.parametrize("metaplasticity", [0.0, 1.35, 8.0])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("weight_bound", [math.inf, 0.05])
def test_equals_the_published_rule_over_50_steps(isa, metaplasticity, weight_decay, weight_bound):
    shapes = [(7, 65), (33, 128), (1, 1)]
    layers = nn.ModuleList(unscaled(k, n) for n, k in shapes)
    lr, betas, eps = 5e-3, (0.9, 0.999), 1e-8
    optimizer = ek.MetaplasticAdam(layers.parameters(), lr, betas, eps, weight_decay, metaplasticity, weight_bound)
    weights = [layer.weight.detach().double() for layer in layers]
    states = [[torch.zeros_like(w), torch.zeros_like(w), 0] for w in weights]
    for _ in range(50):
        for i, layer in enumerate(layers):
            layer.weight.grad = torch.randn(layer.weight.shape)
            weights[i] = restated_step(
                weights[i],
                layer.weight.grad.double(),
                states[i],
                lr,
                *betas,
                eps,
                weight_decay,
                metaplasticity,
                weight_bound,
            )
        optimizer.step()
        for w, layer in zip(weights, layers, strict=True):
            torch.testing.assert_close(layer.weight.detach().double(), w, rtol=1e-4, atol=2e-6)
            assert (layer.weight.detach().abs() <= torch.tensor(weight_bound)).all()
            assert torch.equal(layer.weight.sign_bits(), ek.reference.pack_signs(layer.weight.detach().clone()))


def test_groups_have_settings_of_their_own():
    a, b = unscaled(10, 4), unscaled(10, 4)
    b.load_state_dict(a.state_dict())
    optimizer = ek.MetaplasticAdam(
        [{"params": a.parameters(), "metaplasticity": 0.0}, {"params": b.parameters(), "metaplasticity": 40.0}]
    )
    grad = a.weight.detach().sign()  # every step would shrink |W|
    moved = []
    for layer in (a, b):
        layer.weight.grad = grad.clone()
    before = a.weight.detach().clone()
    optimizer.step()
    for layer in (a, b):
        moved.append((layer.weight.detach() - before).abs())
    assert (moved[1] <= moved[0]).all() and moved[1].sum() < 0.9 * moved[0].sum()


def test_groups_have_bounds_of_their_own():
    layers = [unscaled(70, 4) for _ in range(3)]
    groups = [{"params": layer.parameters()} for layer in layers]
    optimizer = ek.MetaplasticAdam([groups[0], groups[1] | {"weight_bound": 0.25}], lr=0.1, weight_bound=0.5)
    optimizer.add_param_group(groups[2] | {"weight_bound": math.inf})
    for _ in range(20):
        for layer in layers:
            layer.weight.grad = -layer.weight.detach().sign()
        optimizer.step()
    largest = [layer.weight.detach().abs() for layer in layers]
    assert (largest[0] == 0.5).all() and (largest[1] == 0.25).all() and (largest[2] > 1).all()


def test_a_bounded_weight_flips_however_long_it_was_consolidated():
    lr, m, weight_bound = 0.01, 2.0, 0.5
    opposed_steps = math.ceil(weight_bound / (lr * (1 - math.tanh(m * weight_bound) ** 2)))
    turn = 25  # steps in which the first moment has come from one gradient to the other, all but a tenth of it

    def flipped(steps_of_consolidation, opposed_steps, **settings):
        layer = unscaled(70, 4)
        optimizer = ek.MetaplasticAdam(layer.parameters(), lr, metaplasticity=m, **settings)
        before = layer.weight.detach().sign()
        for step in range(steps_of_consolidation + opposed_steps):
            layer.weight.grad = -before if step < steps_of_consolidation else before.clone()
            optimizer.step()
        return layer.weight.detach().sign() != before

    for steps_of_consolidation in (100, 1000):
        assert flipped(steps_of_consolidation, opposed_steps + turn, weight_bound=weight_bound).all()
    assert not flipped(1000, 5 * opposed_steps).any()


@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype, weight_bound", [(torch.float32, 0.02), (torch.bfloat16, 2**-6)])
def test_hidden_weights_keep_to_their_bound_and_nothing_else_does(dtype, weight_bound, state_dtype, fuse_backward):
    model, optimizer = network(fuse_backward, state_dtype, dtype, weight_bound=weight_bound)
    train(model, optimizer, 10)
    for layer in (model[0], model[2], model[4]):
        largest, bound = layer.weight.detach().abs(), torch.tensor(weight_bound)
        assert (largest <= bound).all() and (largest == bound).any()
        assert torch.equal(layer.weight.sign_bits(), ek.reference.pack_signs(layer.weight.detach().clone()))
    assert (model[1].weight.detach() > 0.5).all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
def test_a_bound_far_beyond_all_weights_changes_nothing(state_dtype):
    (bounded, its_optimizer), (plain, optimizer) = (
        network(False, state_dtype, **settings) for settings in ({"weight_bound": 1e6}, {})
    )
    train(bounded, its_optimizer, 5)
    train(plain, optimizer, 5)
    assert all(torch.equal(p, q) for p, q in zip(bounded.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("weight_bound", [math.inf, 0.02])
def test_states_from_before_there_was_a_bound_load(weight_bound):
    old_model, old = network(False)
    train(old_model, old, 2)
    for settings in (old.defaults, *old.param_groups):
        del settings["weight_bound"]
    revived = copy.deepcopy(old)  # by way of __getstate__ and __setstate__, as pickle
    assert revived.defaults["weight_bound"] == math.inf
    assert all(group["weight_bound"] == math.inf for group in revived.param_groups)
    model, optimizer = network(False, weight_bound=weight_bound)
    optimizer.load_state_dict(old.state_dict())
    assert all(group["weight_bound"] == weight_bound for group in optimizer.param_groups)
    train(model, optimizer, 2)
    assert (model[0].weight.detach().abs().max() <= torch.tensor(weight_bound)).item()


def test_other_parameters_get_plain_adam():
    mine, theirs = nn.Linear(10, 4), nn.Linear(10, 4)
    theirs.load_state_dict(mine.state_dict())
    settings = dict(lr=5e-3, betas=(0.8, 0.99), eps=1e-7, weight_decay=1e-3)
    with pytest.warns(UserWarning, match="hidden weights of binary layers among them, got none"):
        a = ek.MetaplasticAdam(mine.parameters(), **settings, weight_bound=0.01)
    b = torch.optim.Adam(theirs.parameters(), **settings)
    for _ in range(10):
        x = torch.randn(6, 10)
        for model, optimizer in ((mine, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trips_bit_exactly_in_mid_run(state_dtype, dtype):
    def run(steps, model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 20, dtype=dtype)).square().sum().backward()
            optimizer.step()

    model = ek.EngramMLP((20, 65, 65, 3), engram=ek.StochasticEngram(0.3), readout="linear").to(dtype)
    model.layers[0].bias = nn.Parameter(torch.zeros(65, dtype=dtype))
    optimizer = ek.MetaplasticAdam(model.parameters(), state_dtype=state_dtype)
    run(5, model, optimizer, 1)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = copy.deepcopy(model)
    for p in other.parameters():
        nn.init.normal_(p)
    other_optimizer = ek.MetaplasticAdam(other.parameters(), lr=1.0, state_dtype=state_dtype)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    run(5, model, optimizer, 2)
    run(5, other, other_optimizer, 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert p.keys() == q.keys()
        assert all(p[name].dtype == q[name].dtype and torch.equal(p[name], q[name]) for name in p)


def test_a_state_of_another_dtype_is_refused():
    layer = unscaled(5, 5)
    compact, plain = (ek.MetaplasticAdam(layer.parameters(), state_dtype=d) for d in (torch.int8, torch.float32))
    layer(torch.randn(2, 5)).sum().backward()
    plain.step()
    with pytest.raises(ValueError, match="moments in torch.int8 as state_dtype, got torch.float32"):
        compact.load_state_dict(plain.state_dict())


# ---- the update within the backward pass


def network(fuse_backward, state_dtype=torch.float32, dtype=torch.float32, **settings):
    torch.manual_seed(3)
    engram = ek.StochasticEngram(0.3)
    model = nn.Sequential(
        unscaled(40, 300, binary_input=False, dtype=dtype),
        nn.BatchNorm1d(300),
        unscaled(300, 70, engram=engram, dtype=dtype),
        nn.BatchNorm1d(70),
        unscaled(70, 3, bias=True, dtype=dtype),
    )
    optimizer = ek.MetaplasticAdam(model.parameters(), state_dtype=state_dtype, fuse_backward=fuse_backward, **settings)
    return model, optimizer


def train(model, optimizer, steps):
    torch.manual_seed(4)
    x, y = torch.randn(16, 40), torch.randint(3, (16,))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("weight_bound", [math.inf, 0.02])
def test_fused_backward_gives_the_same_numbers(isa, state_dtype, weight_bound):
    (fused, fused_optimizer), (plain, plain_optimizer) = (
        network(fuse, state_dtype, weight_bound=weight_bound) for fuse in (True, False)
    )
    assert torch.equal(train(fused, fused_optimizer, 6), train(plain, plain_optimizer, 6))
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert fused[0].weight.grad is None and plain[0].weight.grad is not None
    assert torch.equal(fused[2].weight.sign_bits(), ek.reference.pack_signs(fused[2].weight.detach().clone()))


@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bfloat16_hidden_weights_learn(state_dtype, fuse_backward):
    model, optimizer = network(fuse_backward, state_dtype, torch.bfloat16)
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 40) < 0.5 * first
    assert all(layer.weight.dtype == torch.bfloat16 for layer in (model[0], model[2], model[4]))


def loss_of(model):
    return model(torch.randn(8, 40)).square().sum()


def test_fused_backward_refuses_what_it_cannot_do():
    model, optimizer = network(True)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="consumed in backward.*clipping"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="zero_grad.. before step"):
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="second gradient.*accumulate"):
        loss_of(model).backward()
    optimizer.step()
    loss_of(model).backward()  # the step has ended
    optimizer.step()

    model[0].weight.grad = torch.zeros_like(model[0].weight)
    with pytest.raises(RuntimeError, match="grad: expected None"):
        loss_of(model).backward()
    model, optimizer = network(True)
    model[0].weight.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="hooks"):
        loss_of(model).backward()
    model, optimizer = network(True)
    with pytest.raises(RuntimeError, match="create_graph=False"), pytest.warns(UserWarning, match="create_graph"):
        loss_of(nn.Sequential(model[0])).backward(create_graph=True)
    with pytest.raises(Exception, match="torch.compile"):
        torch.compile(network(True)[0], fullgraph=True)(torch.randn(2, 40))


def test_fused_backward_leaves_weights_alone_where_no_grad_would_be_written():
    model, _optimizer = network(True)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(8, 40, requires_grad=True)
    loss = model(x).square().sum()
    (wanted,) = torch.autograd.grad(loss, model[2].weight, retain_graph=True)
    assert wanted.shape == (70, 300) and wanted.abs().sum() > 0
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    loss.backward(inputs=[model[2].weight])
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [p is model[2].weight for p in model.parameters()]


def test_another_optimizer_takes_the_gradients_over():
    model, fused = network(True)
    plain = ek.MetaplasticAdam(model.parameters())
    loss_of(model).backward()
    assert model[0].weight.grad is not None
    plain.step()
    copied = copy.deepcopy(model)
    loss_of(copied).backward()
    assert copied[0].weight.grad is not None
    model, fused = network(True)
    del fused
    loss_of(model).backward()
    assert model[0].weight.grad is not None


def test_parameters_without_a_gradient_stay():
    layer = unscaled(5, 5)
    before = layer.weight.detach().clone()
    optimizer = ek.MetaplasticAdam(layer.parameters())
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(layer.weight, before) and not optimizer.state


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": -1}, "lr: .*got -1"),
        ({"lr": math.nan}, "lr: .*got nan"),
        ({"betas": (0.9, 1.0)}, r"betas: .*got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas: .*got \(0.9,\)"),
        ({"eps": -1e-8}, "eps: "),
        ({"weight_decay": -0.1}, "weight_decay: "),
        ({"metaplasticity": -2}, "metaplasticity: .*got -2"),
        ({"weight_bound": 0.0}, "weight_bound: expected a number above 0, got 0.0"),
        ({"weight_bound": -1}, "weight_bound: .*got -1"),
        ({"weight_bound": math.nan}, "weight_bound: .*got nan"),
        ({"state_dtype": torch.float64}, "state_dtype: .* or torch.int8, got torch.float64"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ek.MetaplasticAdam(unscaled(3, 3).parameters(), **settings)


def test_only_an_optimizer_without_hidden_weights_warns(recwarn):
    optimizer = ek.MetaplasticAdam(unscaled(3, 3).parameters())
    optimizer.add_param_group({"params": nn.Linear(3, 3).parameters()})
    assert not recwarn.list
    optimizer = ek.MetaplasticAdam(nn.Linear(3, 3).parameters())
    assert [warning.category for warning in recwarn.list] == [UserWarning]
    copy.deepcopy(optimizer).step()
    optimizer.add_param_group({"params": nn.LayerNorm(3).parameters()})
    assert len(recwarn.list) == 1


@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_hidden_weights_without_a_kernel_are_refused_when_the_optimizer_is_made(dtype, fuse_backward):
    layer = unscaled(3, 3)
    refused = (
        f"weight: expected float32 or bfloat16 with MetaplasticAdam, got {dtype} .*weight of shape .3, 3. in group"
    )
    with pytest.raises(RuntimeError, match=refused):
        ek.MetaplasticAdam(unscaled(3, 3).to(dtype).named_parameters(), fuse_backward=fuse_backward)
    optimizer = ek.MetaplasticAdam(layer.named_parameters(), fuse_backward=fuse_backward)
    with pytest.raises(RuntimeError, match=refused):
        optimizer.add_param_group({"params": unscaled(3, 3).to(dtype).named_parameters()})
    assert len(optimizer.param_groups) == 1
    layer.to(dtype)
    with pytest.raises(RuntimeError, match=refused):
        if fuse_backward and dtype == torch.float16:  # layers take no float64
            layer(torch.randn(2, 3, dtype=dtype)).sum().backward()
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    layer.float()
    layer.zero_grad()
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("weight_bound", [math.inf, 0.1])
def test_a_nan_gradient_stops_the_step_at_the_weight_it_names(weight_bound, named):
    model = nn.Sequential(unscaled(9, 3, bias=True), unscaled(70, 4), nn.LayerNorm(4))
    parameters = list(model.named_parameters() if named else model.parameters())
    optimizer = ek.MetaplasticAdam(parameters, weight_bound=weight_bound)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[2, 67] = math.nan
    place = "1.weight" if named else r"params\[2\]"
    with pytest.raises(RuntimeError, match=rf"^grad: expected finite steps.*\({place} of shape \(4, 70\) in group 0"):
        optimizer.step()
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [True, False, True, False, False]
    assert [int(optimizer.state[layer.weight]["step"]) for layer in model[:2]] == [1, 0]
    assert not any(p in optimizer.state for p in (model[0].bias, *model[2].parameters()))
    model[1].weight.grad[2, 67] = 1.0
    optimizer.step()
    assert int(optimizer.state[model[1].weight]["step"]) == 1 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])  # moments in 8 bits are coded anew
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_failed_for_nan_can_be_repeated(dtype, state_dtype, fuse_backward):
    models = []
    for failures in (0, 1):
        model, optimizer = network(fuse_backward, state_dtype, dtype)
        train(model, optimizer, 2)
        before = [p.detach().clone() for p in model.parameters()]
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        for _ in range(failures):
            with pytest.raises(RuntimeError, match="grad: expected finite steps"):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(torch.randn(16, 40).to(dtype)), torch.zeros(16).long())
                (loss * math.nan).backward()
                for p in model.parameters() if not fuse_backward else ():
                    p.grad.fill_(math.nan)  # also where no sample had recruited the unit
                optimizer.step()
            optimizer.abandon_step()
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            for own, kept in zip(optimizer.state_dict()["state"].values(), moments.values(), strict=True):
                assert own.keys() == kept.keys() and all(torch.equal(own[name], kept[name]) for name in own)
        train(model, optimizer, 2)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_sparse_gradients_are_refused():
    embedding, layer = nn.Embedding(4, 3, sparse=True), unscaled(3, 3)
    optimizer = ek.MetaplasticAdam([*embedding.parameters(), *layer.parameters()])
    layer(embedding(torch.tensor([1]))).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"grad: expected a dense gradient, got a sparse one \(params\[0\] of shape"):
        optimizer.step()
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_contiguous_learns_as_its_copy_does(dtype, state_dtype, fuse_backward):
    kernel = torch.randn(70, 9, dtype=dtype)  # (inputs, outputs), as others keep it
    wide = torch.randn(9, 140, dtype=dtype)
    for view in (lambda: kernel.clone().T, lambda: wide.clone()[:, ::2], lambda: wide.clone()[:, :70]):
        weights = []
        for values in (view(), view().contiguous()):
            layer = unscaled(70, 9)
            layer.weight = nn.Parameter(values)
            optimizer = ek.MetaplasticAdam(
                layer.parameters(), weight_decay=1e-2, state_dtype=state_dtype, fuse_backward=fuse_backward
            )
            for step in range(3):
                optimizer.zero_grad()
                layer(
                    torch.randn(8, 70, generator=torch.Generator().manual_seed(step)).to(dtype)
                ).square().sum().backward()
                optimizer.step()
                signs = ek.reference.pack_signs(layer.weight.detach().clone(memory_format=torch.contiguous_format))
                assert torch.equal(layer.weight.sign_bits(), signs)
            assert layer.weight.stride() == values.stride()
            assert torch.equal(layer.weight, values)  # the view itself has learned
            weights.append(layer.weight.detach())
        assert torch.equal(*weights) and not torch.equal(weights[0], view())


def test_moments_of_torchs_adam_load_whatever_their_strides():
    layer = unscaled(70, 9)
    layer.weight = nn.Parameter(torch.randn(70, 9).T)
    adam, optimizer = torch.optim.Adam(layer.parameters()), ek.MetaplasticAdam(layer.parameters())
    layer.weight.grad = torch.randn(9, 70)
    adam.step()
    optimizer.load_state_dict(adam.state_dict())
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], adam.state[layer.weight]["exp_avg"])
    optimizer.step()
    assert int(optimizer.state[layer.weight]["step"]) == 2


@pytest.mark.parametrize("weight_bound", [math.inf, 0.01])
def test_a_step_of_size_0_moves_no_weight(weight_bound):
    model, optimizer = network(False, lr=0.0, weight_bound=weight_bound)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_penalty_on_a_consumed_weight_is_refused():
    model, optimizer = network(True)
    (loss_of(model) + model[0].weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="besides the one that its layer consumed.*fuse_backward=False"):
        optimizer.step()


def test_a_layer_used_twice_is_refused_by_name():
    layer = unscaled(9, 9)
    optimizer = ek.MetaplasticAdam(layer.parameters(), fuse_backward=True)
    with pytest.raises(RuntimeError, match="second gradient.*two layers share"):
        layer(layer(torch.randn(4, 9))).sum().backward()
    optimizer.abandon_step()
    layer(torch.randn(4, 9)).sum().backward()
    optimizer.step()


def test_training_goes_on_after_a_backward_pass_that_failed():
    model, optimizer = network(True)

    def fail(grad):
        raise MemoryError

    hidden = model[1](model[0](torch.randn(8, 40)))
    hidden.register_hook(fail)
    with pytest.raises(MemoryError):
        model[4](model[3](model[2](hidden))).sum().backward()
    with pytest.raises(RuntimeError, match="abandon_step"):
        optimizer.zero_grad()
    optimizer.abandon_step()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_of_model_and_optimizer_go_on_alike(steps, state_dtype, fuse_backward):
    model, optimizer = network(fuse_backward, state_dtype)
    if steps:
        train(model, optimizer, steps)
    buffer = io.BytesIO()
    torch.save((model, optimizer), buffer)
    buffer.seek(0)
    copies = [copy.deepcopy((model, optimizer)), torch.load(buffer, weights_only=False)]
    train(model, optimizer, 3)
    for other, its_optimizer in copies:
        train(other, its_optimizer, 3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
        assert (other[0].weight.grad is None) == fuse_backward


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_default_dtype_and_device_change_nothing(default_dtype, state_dtype):
    def weights_and_state(dtype, device, steps=300):
        torch.manual_seed(5)
        default_dtype(torch.float32)
        layer = unscaled(70, 4, bias=True)
        grads = torch.randn(4, 70), torch.randn(4)
        default_dtype(dtype)
        with torch.device(device):
            optimizer = ek.MetaplasticAdam(layer.parameters(), state_dtype=state_dtype)
            for _ in range(steps):
                layer.weight.grad, layer.bias.grad = (grad.clone() for grad in grads)
                optimizer.step()
        state = [(name, value) for p in layer.parameters() for name, value in optimizer.state[p].items()]
        assert all(int(value) == steps for name, value in state if name == "step")
        return [("", p.detach()) for p in layer.parameters()] + state

    plain = weights_and_state(torch.float32, "cpu")
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float64, "meta")):
        for (name, value), (its_name, its_value) in zip(plain, weights_and_state(dtype, device), strict=True):
            assert name == its_name and value.dtype == its_value.dtype and torch.equal(value, its_value)


@pytest.mark.parametrize("steps", [2**11, 2**24, 2**31, 2**32 - 1, 2**53, 2**62])
def test_steps_are_counted_exactly(steps):
    layer = unscaled(70, 4, bias=True)
    optimizer = ek.MetaplasticAdam(layer.parameters(), state_dtype=torch.int8)
    for i in range(4):
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        if i == 0:
            for p in layer.parameters():
                optimizer.state[p]["step"].fill_(steps)
    assert all(int(optimizer.state[p]["step"]) == steps + 3 for p in layer.parameters())


@pytest.mark.parametrize(
    "step", [torch.tensor(256.0, dtype=d) for d in (torch.bfloat16, torch.float16, torch.float32)] + [256]
)
@pytest.mark.parametrize("as_pickle", [False, True])
def test_counts_of_older_versions_are_read(step, as_pickle):
    """They kept steps in the default dtype."""
    model, optimizer = network(False, torch.int8)
    train(model, optimizer, 2)
    seeds = [state["seed"].clone() for state in optimizer.state.values() if "seed" in state]
    for state in optimizer.state.values():
        state["step"] = copy.deepcopy(step)
    buffer = io.BytesIO()
    torch.save(optimizer if as_pickle else optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=not as_pickle)
    if as_pickle:
        optimizer = saved
    else:
        optimizer.load_state_dict(saved)
    for state in optimizer.state.values():
        assert state["step"].dtype == torch.int64 and int(state["step"]) == 256
    kept = [state["seed"] for state in optimizer.state.values() if "seed" in state]
    assert len(seeds) == 3 and all(map(torch.equal, seeds, kept))


@pytest.mark.parametrize("step", [-1.0, 2.5, math.nan, math.inf, 2.0**63])
def test_a_count_that_is_none_is_refused(step):
    model, optimizer = network(False)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(step)
    with pytest.raises(
        ValueError, match=f"state_dict: expected a whole number of at least 0 as step, got {step}".replace("+", ".")
    ):
        optimizer.load_state_dict(saved)


def test_a_state_of_older_versions_from_before_the_first_step_is_none():
    model, optimizer = network(False, torch.int8)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"seed": torch.tensor([5, 0])}}
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    train(model, optimizer, 1)


# ---- random bits


@pytest.mark.parametrize("dtype, state_dtype", [(torch.float32, torch.int8), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("fuse_backward", [False, True])
def test_rounding_follows_from_the_weights_alone(dtype, state_dtype, fuse_backward):
    """So that data-parallel processes, whose generators differ, keep the same weights."""
    model, optimizer = network(fuse_backward, state_dtype, dtype)
    other = copy.deepcopy(model)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    its_optimizer = ek.MetaplasticAdam(other.parameters(), state_dtype=state_dtype, fuse_backward=fuse_backward)
    assert torch.equal(before, torch.get_rng_state())
    train(model, optimizer, 4)
    train(other, its_optimizer, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_equal_weights_round_by_draws_of_their_own():
    values = torch.randn(8, 70)
    weights = [ek.HiddenWeight(values.clone()) for _ in range(3)]
    weights.append(ek.HiddenWeight(values + 1e-3))
    groups = [{"params": weights[:2]}, {"params": weights[2:]}]
    optimizer = ek.MetaplasticAdam(groups, state_dtype=torch.bfloat16)
    for weight in weights:
        weight.grad = torch.full((8, 70), 0.3)
    optimizer.step()
    assert len({int(optimizer.state[weight]["seed"][0]) for weight in weights}) == 4
    moments = [optimizer.state[weight]["exp_avg"] for weight in weights[:3]]
    assert not torch.equal(moments[0], moments[1]) and not torch.equal(moments[1], moments[2])


# ---- beside other parts of torch


def test_a_scaled_loss_is_refused_by_name_in_the_first_step():
    model, optimizer = network(True)
    for refused in (lambda scaler: scaler.step(optimizer), lambda scaler: scaler.unscale_(optimizer)):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model)).backward()
        with pytest.raises(RuntimeError, match="fuse_backward.*scal"):
            refused(scaler)
        optimizer.abandon_step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)


def test_a_scaled_loss_serves_whole_gradients():
    (plain, optimizer), (scaled, its_optimizer) = network(False), network(False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 40)
    for model, step in ((plain, optimizer.step), (scaled, lambda: scaler.step(its_optimizer))):
        torch.manual_seed(1)
        loss = model(x).square().sum()
        (loss if model is plain else scaler.scale(loss)).backward()
        step()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))
    before = [p.detach().clone() for p in scaled.parameters()]
    its_optimizer.zero_grad()
    scaled.get_parameter("0.weight").grad = torch.full((300, 40), math.inf)
    scaler.update()
    scaler.step(its_optimizer)  # skipped
    assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), before, strict=True))


@pytest.mark.parametrize("fuse_backward", [False, True])
def test_the_state_of_a_plain_adam_loads(fuse_backward):
    model, optimizer = network(fuse_backward)
    adam = torch.optim.Adam(model.parameters())
    optimizer.fuse_backward = False
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    adam.zero_grad()
    optimizer.fuse_backward = fuse_backward
    optimizer.load_state_dict(adam.state_dict())
    loss_of(model).backward()
    optimizer.step()
    assert int(optimizer.state[model[0].weight]["step"]) == 2


@pytest.mark.parametrize("fuse_backward", [False, True])
def test_a_checkpoint_from_before_the_first_step_loads_into_compact_state(fuse_backward):
    saved = network(False)[1].state_dict()
    model, optimizer = network(fuse_backward, torch.int8)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 2)


@pytest.mark.parametrize("fuse_backward", [False, True])
def test_weights_converted_after_the_optimizer_was_made_learn_on(fuse_backward):
    model, optimizer = network(fuse_backward)
    model.to(torch.bfloat16)
    torch.manual_seed(4)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 40, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    assert model[2].weight.dtype == torch.bfloat16


def test_fused_backward_takes_half_precision_inputs():
    layer = unscaled(9, 4, binary_input=False)
    optimizer = ek.MetaplasticAdam(layer.parameters(), fuse_backward=True)
    for dtype in (torch.float16, torch.bfloat16):
        before = layer.weight.detach().clone()
        layer(torch.randn(2, 9).to(dtype)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, layer.weight)


def test_freezing_or_deleting_between_forward_and_backward():
    model, optimizer = network(True)
    loss = loss_of(model)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    loss.backward()
    optimizer.step()
    assert torch.equal(before, model[0].weight)
    model, optimizer = network(True)
    loss = loss_of(model)
    del optimizer
    loss.backward()
    assert model[2].weight.grad is not None
    model, optimizer = network(True)
    optimizer.param_groups.clear()
    with pytest.raises(RuntimeError, match="still in param_groups"):
        loss_of(model).backward()
