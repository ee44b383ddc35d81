"""Read-outs: what they compute and learn is what their formulas say, and counted ones keep no trace of the order."""

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engram_kernels as ek
from engram_kernels.hidden_weight import HiddenWeight

sizes = st.integers(1, 70)


def gates_of(engram, x):
    """The gates of an engram without noise, as 0 and 1."""
    return ek.ops.unpack_signs(engram(x).gate_bits, x.shape[1], torch.float32).add(1).div(2)


def make(kind, k, classes, rate=0.3, **options):
    return kind(k, classes, engram=ek.StochasticEngram(rate, temperature=0.0), **options)


@given(sizes, st.integers(2, 150), st.integers(1, 6), st.integers(1, 5), st.floats(0.05, 1.0), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_segments_are_products_of_the_centred_code(m, k, classes, segments, rate, seed):
    torch.manual_seed(seed)
    readout = make(ek.DendriticReadout, k, classes, rate, segments=segments)
    x = torch.randn(m, k)
    code = gates_of(readout.engram, x) - readout.rate
    signs = torch.where(readout.weight.detach() >= 0, 1.0, -1.0)
    expected = (code @ signs.T / math.sqrt(readout.engram.recruited(k))).view(m, classes, segments)
    torch.testing.assert_close(readout.activations(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(readout(x), expected.amax(2), atol=1e-4, rtol=1e-4)
    for readout.top_segments in range(2, segments + 1):
        speaking = expected.sort(dim=2).values[:, :, -readout.top_segments :]
        torch.testing.assert_close(readout(x), speaking.mean(2), atol=1e-4, rtol=1e-4)


@given(sizes, st.integers(2, 150), st.integers(1, 40), st.floats(0.05, 1.0), st.sampled_from([0.2, math.inf]))
@settings(deadline=None, max_examples=40)
def test_gradients_are_straight_through(m, k, classes, rate, window):
    torch.manual_seed(m)
    readout = make(ek.DendriticReadout, k, classes, rate, segments=2, ste_window=window)
    x = torch.randn(m, k, requires_grad=True)
    d = torch.randn(m, classes, 2)
    readout.activations(x).backward(d)
    gate = gates_of(readout.engram, x.detach())
    scale = 1 / math.sqrt(readout.engram.recruited(k))
    flat = scale * d.view(m, -1)
    torch.testing.assert_close(readout.weight.grad, flat.T @ (gate - readout.rate), atol=1e-4, rtol=1e-4)
    signs = torch.where(readout.weight.detach() >= 0, 1.0, -1.0)
    weakest = x.detach().masked_fill(gate == 0, math.inf).amin(1, keepdim=True)
    passes = gate * (x.detach() - weakest <= window)
    torch.testing.assert_close(x.grad, passes * (flat @ signs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
def test_the_update_within_the_backward_pass_gives_the_same_weights(state_dtype):
    weights = []
    for fuse in (False, True):
        torch.manual_seed(0)
        readout = make(ek.DendriticReadout, 130, 5, segments=3)
        optimizer = ek.MetaplasticAdam(readout.parameters(), state_dtype=state_dtype, fuse_backward=fuse)
        for _ in range(4):
            x, y = torch.randn(20, 130), torch.randint(5, (20,))
            readout.local_loss(readout.activations(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(readout.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "how",
    [
        lambda r: r.load_state_dict(copy.deepcopy(r.state_dict()), assign=True),
        lambda r: setattr(r, "weight", torch.nn.Parameter(r.weight.detach().clone())),
        lambda r: r.to(torch.bfloat16).float(),
        lambda r: r._parameters.update(weight=torch.nn.Parameter(r.weight.detach().clone())) or r(torch.randn(1, 64)),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_weights_of_segments_stay_hidden_weights(how, overwrite):
    """Otherwise the optimizer would take them for others, and train them by plain Adam."""
    readout = make(ek.DendriticReadout, 64, 3, segments=2)
    try:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        how(readout)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert isinstance(readout.weight, HiddenWeight)
    before = readout.weight.detach().clone()
    readout.weight.grad = before.sign()
    ek.MetaplasticAdam(readout.parameters(), metaplasticity=1e6).step()  # every step would shrink |W|: none may
    torch.testing.assert_close(readout.weight.detach(), before)


def test_all_segments_that_speak_learn_from_a_loss_on_the_logits():
    torch.manual_seed(0)
    readout = make(ek.DendriticReadout, 64, 3, segments=5, top_segments=2)
    x = torch.randn(1, 64)
    speaking = readout.activations(x)[0, 1].topk(2).indices + 5
    readout(x)[0, 1].backward()
    moved = readout.weight.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(moved, speaking.sort().values)


def test_only_the_winning_segment_of_the_true_class_learns():
    torch.manual_seed(0)
    readout = make(ek.DendriticReadout, 64, 4, segments=3)
    x, y = torch.randn(1, 64), torch.tensor([2])
    activations = readout.activations(x)
    winner = 2 * 3 + int(activations[0, 2].argmax())
    loss = readout.local_loss(activations, y)
    assert loss.item() == pytest.approx(-activations[0, 2].max().item())
    loss.backward()
    moved = readout.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [winner]
    assert readout.wins.sum() == 4 * 3 + 1
    assert readout.wins.flatten()[winner] == 2


def test_conscience_shares_out_the_wins():
    """The same sample again and again: without conscience one segment takes it, with it all do."""
    x, y = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    for conscience, winners in ((0.0, 1), (100.0, 4)):
        torch.manual_seed(0)
        readout = make(ek.DendriticReadout, 64, 2, segments=4, conscience=conscience)
        for _ in range(12):
            readout.local_loss(readout.activations(x), y)
        assert (readout.wins[1] > 1).sum() == winners
    readout.eval()
    before = readout.wins.clone()
    readout.local_loss(readout.activations(x), y)
    assert torch.equal(readout.wins, before), "evaluation counts nothing"


@given(st.integers(1, 90), st.integers(1, 300), st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=40)
def test_the_gram_matrix_is_counted_exactly(m, k, rate):
    torch.manual_seed(m)
    readout = ek.RidgeReadout(k, 2, engram=ek.StochasticEngram(rate, temperature=0.0))
    x = torch.randn(2, m, k)
    gates = gates_of(readout.engram, x.view(-1, k))
    for part in x:
        readout.observe(part, torch.arange(m) % 2)
    assert torch.equal(readout.gram, (gates.T @ gates).to(torch.int32))


def clusters(samples=240, classes=4, k=96, missing=()):
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(classes, k, generator=generator)
    y = torch.arange(samples) % classes
    y = y[~torch.isin(y, torch.tensor(missing, dtype=torch.int64))]
    return centres[y] + 0.7 * torch.randn(len(y), k, generator=generator), y


def test_prototypes_are_what_classes_recruit_more_often_than_the_mean():
    x, y = clusters(missing=[2])
    readout = make(ek.PrototypeReadout, 96, 4)
    for part in range(0, len(y), 50):
        readout.observe(x[part : part + 50], y[part : part + 50])
    gates = gates_of(readout.engram, x)
    seen = [0, 1, 3]
    shares = torch.stack([gates[y == c].mean(0) for c in seen])
    signs = torch.where(shares >= shares.mean(0) - 1e-7, 1.0, -1.0)
    expected = (gates - shares.mean(0)) @ signs.T / math.sqrt(readout.engram.recruited(96))
    scores = readout(x)
    torch.testing.assert_close(scores[:, seen], expected, atol=1e-4, rtol=1e-4)
    assert (scores[:, 2] == -math.inf).all()
    assert (scores.argmax(1) == y).float().mean() > 0.95


def test_ridge_solves_its_equations():
    x, y = clusters(missing=[1])
    readout = make(ek.RidgeReadout, 96, 4, penalty=0.1)
    for part in range(0, len(y), 50):
        readout.observe(x[part : part + 50], y[part : part + 50])
    gates = gates_of(readout.engram, x).double()
    covariance = torch.cov(gates.T, correction=0)
    regular = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(96)
    scores = readout(x)
    for c in (0, 2, 3):
        mean = gates[y == c].mean(0)
        w = torch.linalg.solve(regular, mean)
        torch.testing.assert_close(scores[:, c].double(), gates @ w - w @ mean / 2, atol=1e-4, rtol=1e-4)
    assert (scores[:, 1] == -math.inf).all()
    assert (scores.argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize("kind", [ek.PrototypeReadout, ek.RidgeReadout])
@given(order=st.permutations(range(4)), batch=st.integers(1, 90))
@settings(deadline=None, max_examples=15)
def test_the_order_of_classes_and_samples_leaves_no_trace(kind, order, batch):
    """Class after class in any order, in batches of any size: the same state and scores, to the last bit."""
    x, y = clusters()
    results = []
    for classes, size in ((range(4), 240), (order, batch)):
        readout = make(kind, 96, 4)
        for c in classes:
            own = (y == c).nonzero().flatten()
            own = own[torch.randperm(len(own))]
            for part in own.split(size):
                readout.observe(x[part], y[part])
        results.append((readout.state_dict(), readout(x)))
    (first, scores), (second, other) = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(scores, other)


@pytest.mark.parametrize("kind", [ek.DendriticReadout, ek.PrototypeReadout, ek.RidgeReadout])
def test_state_dict_restores_the_scores(kind):
    torch.manual_seed(0)
    x, y = clusters()
    readouts = [make(kind, 96, 4) for _ in range(2)]
    if kind is not ek.DendriticReadout:
        readouts[0].observe(x, y)
        readouts[1].observe(x[:50], y[:50])
        readouts[1](x)  # a solution that must not outlive the state
    readouts[1].load_state_dict(readouts[0].state_dict())
    assert torch.equal(readouts[0](x), readouts[1](x))


def add_past_the_version_counter(tensor, other):
    """As ``torch.distributed.all_reduce`` does."""
    tensor.numpy().__iadd__(other.numpy())


def assign_buffers(readout, other):
    for name in MOMENTS:
        setattr(readout, name, getattr(other, name).clone())


MOMENTS = ("gram", "counts", "samples")
CHANGES = {
    "observed": lambda own, other, x, y: own.observe(x[100:], y[100:]),
    "copied": lambda own, other, x, y: [getattr(own, name).copy_(getattr(other, name)) for name in MOMENTS],
    "loaded": lambda own, other, x, y: own.load_state_dict(other.state_dict()),
    "loaded and assigned": lambda own, other, x, y: own.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "assigned": lambda own, other, x, y: assign_buffers(own, other),
    "summed": lambda own, other, x, y: [getattr(own, n).add_(getattr(other, n)) for n in MOMENTS],
    "summed past the version counter": lambda own, other, x, y: [
        add_past_the_version_counter(getattr(own, n), getattr(other, n)) for n in MOMENTS
    ],
    "gram off the diagonal": lambda own, other, x, y: own.gram[1, 0].sub_(1),
    "moved": lambda own, other, x, y: own.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict()),
    "another penalty": lambda own, other, x, y: setattr(own, "penalty", 0.7),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "inference"),
    [
        (change, inference)
        for change in CHANGES
        for inference in (False, True)
        if (change, inference) != ("gram off the diagonal", True)
    ],  # tensors of inference have no version counter
)
def test_a_solution_is_derived_anew_whoever_changed_the_moments(change, inference):
    x, y = clusters()
    with torch.inference_mode(inference):
        asked, other = (make(ek.RidgeReadout, 96, 4) for _ in range(2))
        asked.observe(x[:100], y[:100])
        other.observe(x[60:], y[60:])
        before = asked(x)
        assert asked.solve()[0] is asked.solve()[0], "nothing has changed"
        CHANGES[change](asked, other, x, y)
        fresh = make(ek.RidgeReadout, 96, 4, penalty=asked.penalty)
        fresh.load_state_dict(asked.state_dict())
        assert torch.equal(asked(x), fresh(x))
        assert not torch.equal(asked(x), before)


@pytest.mark.parametrize("names", [["gram"], ["counts"], ["samples"], ["gram", "counts"], ["counts", "samples"]])
def test_moments_of_which_some_were_summed_are_refused(names):
    x, y = clusters()
    asked, other = (make(ek.RidgeReadout, 96, 4) for _ in range(2))
    asked.observe(x[:100], y[:100])
    other.observe(x[60:], y[60:])
    asked(x)
    for name in names:
        add_past_the_version_counter(getattr(asked, name), getattr(other, name))
    with pytest.raises(RuntimeError, match="gram, counts, samples: expected moments of the same samples, got"):
        asked(x)
    for name in set(MOMENTS) - set(names):
        add_past_the_version_counter(getattr(asked, name), getattr(other, name))
    both = make(ek.RidgeReadout, 96, 4)
    both.observe(torch.cat([x[:100], x[60:]]), torch.cat([y[:100], y[60:]]))
    assert torch.equal(asked(x), both(x))


def test_moments_swapped_in_for_a_call_give_their_own_solution():
    x, y = clusters()
    readout, other = (make(ek.RidgeReadout, 96, 4) for _ in range(2))
    readout.observe(x[:100], y[:100])
    other.observe(x[60:], y[60:])
    before = readout(x)
    assert torch.equal(torch.func.functional_call(readout, other.state_dict(), x), other(x))
    assert torch.equal(readout(x), before)


def test_copies_and_pickles_of_a_solved_readout_have_solutions_of_their_own():
    x, y = clusters()
    readout = make(ek.RidgeReadout, 96, 4)
    readout.observe(x[:100], y[:100])
    before = readout(x)
    copies = copy.deepcopy(readout), pickle.loads(pickle.dumps(readout)), copy.copy(readout)
    assert all(torch.equal(one(x), before) for one in copies)
    copies[0].observe(x[100:], y[100:])
    assert torch.equal(readout(x), before)
    assert not torch.equal(copies[0](x), before)


def test_a_compiled_ridge_solves_anew():
    x, y = clusters()
    readout = make(ek.RidgeReadout, 96, 4)
    compiled = torch.compile(readout, backend="eager")
    for part in range(0, 240, 60):
        readout.observe(x[part : part + 60], y[part : part + 60])
        assert torch.equal(compiled(x), readout(x))


@pytest.mark.parametrize("kind", [ek.DendriticReadout, ek.PrototypeReadout, ek.RidgeReadout])
def test_no_samples(kind):
    readout = make(kind, 30, 3)
    x, y = torch.empty(0, 30), torch.empty(0, dtype=torch.int64)
    assert readout(x).shape == (0, 3)
    if kind is ek.DendriticReadout:
        assert readout.local_loss(readout.activations(x), y).item() == 0
    else:
        readout.observe(x, y)
        assert readout.samples.sum() == 0
        assert (readout(torch.randn(2, 30)) == -math.inf).all()


@pytest.mark.parametrize("kind", [ek.DendriticReadout, ek.PrototypeReadout, ek.RidgeReadout])
def test_a_network_ends_in_a_readout(kind):
    torch.manual_seed(0)
    engram = ek.StochasticEngram(0.2, temperature=0.0)
    model = ek.EngramMLP([20, 60, 50, 4], engram=engram, readout=kind(50, 4, engram=engram), balanced=True)
    x = torch.randn(7, 20)
    assert torch.equal(model(x), model.readout(model.features(x)))
    assert len(model.layers) == 2
    for layer in model.layers:
        assert ((layer.weight < 0).sum(1) == layer.in_features // 2).all()


@pytest.mark.parametrize(
    ("make_it", "wanted"),
    [
        (lambda e: ek.DendriticReadout(0, 3, engram=e), "in_features: expected at least 1, got 0"),
        (lambda e: ek.PrototypeReadout(3, 0, engram=e), "num_classes: expected at least 1, got 0"),
        (lambda e: ek.DendriticReadout(3, 3, 0, engram=e), "segments: expected at least 1, got 0"),
        (lambda e: ek.DendriticReadout(3, 3, 4, engram=e, top_segments=5), "top_segments: expected 1 to segments = 4"),
        (lambda e: ek.DendriticReadout(3, 3, 4, engram=e, top_segments=0), "top_segments: expected 1 to segments = 4"),
        (lambda e: ek.DendriticReadout(3, 3, engram=e, conscience=-1.0), "conscience: expected a finite number"),
        (lambda e: ek.DendriticReadout(3, 3, engram=e, ste_window=0.0), "ste_window: expected above 0, got 0.0"),
        (lambda e: ek.RidgeReadout(3, 3, engram=e, penalty=0.0), "penalty: expected a finite number above 0, got 0.0"),
        (
            lambda e: ek.RidgeReadout(3, 3, engram=ek.BernoulliEngram(0.1)),
            "engram: expected a StochasticEngram, got Be",
        ),
    ],
)
def test_bad_settings(make_it, wanted):
    with pytest.raises(ValueError, match=wanted):
        make_it(ek.StochasticEngram(0.1))


SHAPES = [(), (30,), (2, 31), (2, 3, 30)]


@pytest.mark.parametrize("kind", [ek.DendriticReadout, ek.PrototypeReadout, ek.RidgeReadout])
def test_inputs_of_other_shapes_are_named(kind):
    readout, y = make(kind, 30, 3), torch.tensor([0, 1])
    calls = [readout] if kind is ek.DendriticReadout else [readout, lambda x: readout.observe(x, y)]
    for call in calls:
        for shape in SHAPES:
            with pytest.raises(RuntimeError, match=re.escape(f"input: expected shape (M, 30), got {shape}")):
                call(torch.randn(shape))
    with pytest.raises(RuntimeError, match="score: expected numbers, got NaN"):
        readout(torch.full((2, 30), math.nan))


@pytest.mark.parametrize("kind", [ek.DendriticReadout, ek.PrototypeReadout, ek.RidgeReadout])
@pytest.mark.parametrize(
    ("y", "wanted"),
    [
        (torch.tensor([0, 3]), "y: expected labels in [0, 3), got 0 to 3"),
        (torch.tensor([-1, 2]), "y: expected labels in [0, 3), got -1 to 2"),
        (torch.tensor([0]), "y: expected int64 (2,), got torch.int64 (1,)"),
        (torch.tensor([[0, 1]]), "y: expected int64 (2,), got torch.int64 (1, 2)"),
        (torch.tensor(1), "y: expected int64 (2,), got torch.int64 ()"),
        (torch.tensor([0.0, 1.0]), "y: expected int64 (2,), got torch.float32 (2,)"),
        ([0, 1], "y: expected int64 (2,), got list"),
    ],
)
def test_labels_that_are_none_are_named_and_nothing_is_counted(kind, y, wanted):
    readout, x = make(kind, 30, 3), torch.randn(2, 30)
    before = copy.deepcopy(readout.state_dict())
    with pytest.raises(ValueError, match=re.escape(wanted)):
        readout.local_loss(readout.activations(x), y) if kind is ek.DendriticReadout else readout.observe(x, y)
    assert all(torch.equal(value, before[name]) for name, value in readout.state_dict().items())


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 15), (2, 5, 3), (2, 3, 4), (2, 4, 5), (1, 2, 3, 5)])
def test_activations_of_other_shapes_are_named(shape):
    readout, y = make(ek.DendriticReadout, 30, 3, segments=5), torch.tensor([0, 1])
    wanted = f"activations: expected shape (M, 3, 5), as activations(x) gives, got {shape}"
    with pytest.raises(RuntimeError, match=re.escape(wanted)):
        readout.local_loss(torch.randn(shape), y)
    assert readout.wins.sum() == 15
