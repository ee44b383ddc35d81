"""Full-precision baselines: each does what its paper says, against the slow and obvious computation."""

import io
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import engram_kernels as ek
from engram_kernels.continual.data import Dataset
from engram_kernels.continual.methods import (
    EWCConfig,
    FloatTwinConfig,
    FullPrecisionConfig,
    LwFConfig,
    PenaltyConfig,
    ReplayConfig,
)
from engram_kernels.continual.methods import ewc as ewc_module
from engram_kernels.continual.methods.engram_fp import FloatTwin, FloatTwinMethod
from engram_kernels.continual.methods.ewc import EWC, fisher_diagonal
from engram_kernels.continual.methods.finetune import MLP, FullPrecisionMethod
from engram_kernels.continual.methods.joint import JointTraining
from engram_kernels.continual.methods.lwf import LwF, SeenClassesMLP
from engram_kernels.continual.methods.replay import Replay, ReplayBuffer
from engram_kernels.continual.methods.si import SI_DAMPING, SynapticIntelligence
from engram_kernels.continual.scenarios import SCENARIOS, Experience, class_scenario, make_scenario, permuted_scenario

seeds = st.integers(0, 2**31)
widths = st.lists(st.integers(1, 9), min_size=0, max_size=3)


def random_dataset(samples=60, classes=6, shape=(7,)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, math.prod(shape), generator=generator)
    y = torch.arange(samples) % classes
    return Dataset("random", x, y, x, y, classes=tuple(range(classes)), sample_shape=shape)


def double(method, lr=1.0):
    """The method in float64 under plain gradient descent, where a step shows the gradient."""
    method.model.double()
    method.optimizer = torch.optim.SGD(method.model.parameters(), lr=lr)
    for name in ("anchors", "path"):
        if hasattr(method, name):
            setattr(method, name, [tensor.double() for tensor in getattr(method, name)])
    return method


# the network


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


# ewc


@given(st.integers(1, 9), widths, st.integers(2, 5), st.data())
@settings(deadline=None, max_examples=30)
def test_fisher_is_that_of_single_samples(samples, hidden, classes, draw):
    """Against one backward pass for each sample and label."""
    torch.manual_seed(draw.draw(seeds))
    model = MLP([4, *hidden, classes]).double()
    x = torch.randn(samples, 4, dtype=torch.float64)
    labels = draw.draw(st.none() | st.sets(st.integers(0, classes - 1), min_size=1).map(sorted))
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for row in x:
        scores = model(row[None])[0]
        scores = scores if labels is None else scores[labels]
        for log_p in scores.log_softmax(0):
            gradients = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=True)
            for total, gradient in zip(wanted, gradients, strict=True):
                total += log_p.exp().detach() * gradient**2 / samples
    for found, expected in zip(fisher_diagonal(model, x, labels), wanted, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", ["all", "batch"])
def test_fisher_of_an_experience_and_of_those_before(loss):
    """More samples than are looked at together, the last chunk smaller; then the earlier Fisher, decayed."""
    scenario = class_scenario(random_dataset(samples=2310))
    config = EWCConfig(lr=0.1, loss=loss, decay=0.7)
    method = double(EWC.build(config, 7, [8, 5], 6))
    wanted = [torch.zeros_like(p) for p in method.model.parameters()]
    for experience in scenario.train_stream:
        with torch.no_grad():
            for parameter in method.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        x, _ = next(experience.batches(len(experience)))
        fisher = fisher_diagonal(method.model, x.double(), experience.classes if loss == "batch" else None)
        wanted = [0.7 * old + new for old, new in zip(wanted, fisher, strict=True)]
        double_samples = Experience(experience.x, experience.y, experience.classes, experience.indices)
        object.__setattr__(double_samples, "samples", lambda rows, e=experience: (e.samples(rows)[0].double(), None))
        method.after_training_exp(double_samples)
        for parameter, anchor in zip(method.model.parameters(), method.anchors, strict=True):
            assert torch.equal(parameter, anchor)
    for found, expected in zip(method.importance, wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_fisher_looks_at_a_bounded_number_of_samples(monkeypatch):
    monkeypatch.setattr(ewc_module, "FISHER_SAMPLES", 40)
    monkeypatch.setattr(ewc_module, "_CHUNK", 15)
    seen = []

    def count(model, x, classes):
        seen.append(x)
        return [torch.ones_like(p) for p in model.parameters()]

    monkeypatch.setattr(ewc_module, "fisher_diagonal", count)
    method = EWC.build(EWCConfig(lr=0.1), 7, [8], 6)
    method.after_training_exp(permuted_scenario(random_dataset(), tasks=1).train_stream[0])
    assert [len(x) for x in seen] == [15, 15, 10]
    assert len(torch.cat(seen).unique(dim=0)) == 40
    for fisher in method.importance:
        torch.testing.assert_close(fisher, torch.ones_like(fisher))


@pytest.mark.parametrize(("kind", "factor"), [(EWC, 0.5), (SynapticIntelligence, 1.0)])
@given(strength=st.floats(0, 100), seed=seeds)
@settings(deadline=None, max_examples=20)
def test_the_penalty_pulls_as_its_formula_says(kind, factor, strength, seed):
    """Against autograd of the loss with the penalty; what is reported is the loss without it."""
    torch.manual_seed(seed)
    config = (EWCConfig if kind is EWC else PenaltyConfig)(lr=0.1, strength=strength)
    method = double(kind.build(config, 5, [6], 4))
    parameters = list(method.model.parameters())
    method.anchors = [torch.randn_like(p) for p in parameters]
    method.importance = [torch.rand_like(p) for p in parameters]
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(4, (8,))
    task = F.cross_entropy(method.model(x), y)
    penalty = sum(
        (importance * (p - anchor) ** 2).sum()
        for importance, p, anchor in zip(method.importance, parameters, method.anchors, strict=True)
    )
    gradients = torch.autograd.grad(task + factor * strength * penalty, parameters)
    wanted = [p.detach() - gradient for p, gradient in zip(parameters, gradients, strict=True)]
    loss, _ = method.observe(x, y)
    assert loss == pytest.approx(task.item())
    for parameter, expected in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)
        assert parameter.grad is None


@pytest.mark.parametrize("kind", [EWC, SynapticIntelligence])
def test_nothing_is_held_before_an_experience_has_ended(kind):
    """The same steps as without the penalty, to the bit."""
    config = (EWCConfig if kind is EWC else PenaltyConfig)(lr=0.1, strength=1e9)
    torch.manual_seed(0)
    method = kind.build(config, 7, [8], 6)
    torch.manual_seed(0)
    plain = FullPrecisionMethod.build(FullPrecisionConfig(lr=0.1), 7, [8], 6)
    experience = class_scenario(random_dataset()).train_stream[0]
    for learner in (method, plain):
        for x, y in learner.before_training_exp(experience).batches(5):
            learner.observe(x, y)
    assert all(map(torch.equal, method.model.parameters(), plain.model.parameters()))


# si


@given(strength=st.floats(0, 5), seed=seeds)
@settings(deadline=None, max_examples=20)
def test_omega_is_the_path_integral_of_the_task_loss(strength, seed):
    """Three experiences, each a quadratic with a minimum of its own; everything computed again by hand."""
    torch.manual_seed(seed)
    method = double(SynapticIntelligence.build(PenaltyConfig(lr=0.1, strength=strength), 2, [2], 2), lr=0.05)
    parameters = list(method.model.parameters())
    theta = torch.cat([p.detach().flatten() for p in parameters]).clone()
    anchor, omega, held = theta.clone(), torch.zeros_like(theta), False
    for _ in range(3):
        curvature, minimum = torch.rand_like(theta) + 0.5, torch.randn_like(theta)

        def loss(x, y, curvature=curvature, minimum=minimum):
            now = torch.cat([p.flatten() for p in parameters])
            return 0.5 * (curvature * (now - minimum) ** 2).sum(), x

        method.loss = loss
        path, first = torch.zeros_like(theta), 0.5 * curvature * (theta - minimum) ** 2
        for _ in range(40):
            method.observe(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
            gradient = curvature * (theta - minimum)
            step = -0.05 * (gradient + 2.0 * strength * omega * (theta - anchor))
            path -= gradient * step
            theta = theta + step
        if not held:  # without a penalty the path is, up to the size of a step, by how much the loss fell
            fell = first - 0.5 * curvature * (theta - minimum) ** 2
            torch.testing.assert_close(path, fell, rtol=0.1, atol=1e-12)
        method.after_training_exp(None)
        omega = (omega + path / ((theta - anchor) ** 2 + SI_DAMPING)).clamp(min=0.0)
        anchor, held = theta.clone(), True
        for found, expected in ((method.importance, omega), (method.anchors, anchor), (parameters, theta)):
            torch.testing.assert_close(torch.cat([f.detach().flatten() for f in found]), expected)
        assert all((path == 0).all() for path in method.path)


# lwf


@given(strength=st.floats(0, 10), temperature=st.floats(0.5, 8), loss=st.sampled_from(["all", "batch"]), seed=seeds)
@settings(deadline=None, max_examples=30)
def test_distillation_is_what_its_formula_says(strength, temperature, loss, seed):
    """Spelled out with probabilities: the old network's over the classes seen before, the new one's over all so far."""
    torch.manual_seed(seed)
    config = LwFConfig(lr=0.1, strength=strength, distillation_temperature=temperature, loss=loss)
    method = double(LwF.build(config, 7, [8], 6), lr=0.01)
    stream = class_scenario(random_dataset()).train_stream
    active, before = [], []
    for experience in stream:
        samples = method.before_training_exp(experience)
        before, active = active, [*active, *experience.classes]
        x, y = next(samples.batches(9, torch.Generator().manual_seed(seed)))
        x = x.double()
        frozen = MLP([7, 8, 6]).double()
        if before:
            frozen.load_state_dict({k: v for k, v in method.teacher.state_dict().items() if k != "seen"})
        found, scores = method.loss(x, y)
        assert (scores[:, active] > -math.inf).all()
        assert (scores[:, [c for c in range(6) if c not in active]] == -math.inf).all()
        classes = active if loss == "all" else sorted(set(y.tolist()))
        p = scores[:, classes].softmax(1)
        wanted = -p[torch.arange(len(y)), [classes.index(c) for c in y.tolist()]].log().mean()
        if before:
            target = (frozen(x)[:, before] / temperature).softmax(1)
            own = (scores[:, active] / temperature).softmax(1)[:, [active.index(c) for c in before]]
            wanted = wanted - strength * (target * own.log()).sum(1).mean()
        else:
            assert method.teacher is None
        torch.testing.assert_close(found, wanted)
        for x, y in samples.batches(10):
            method.observe(x.double(), y)


def test_the_teacher_is_the_network_before_and_does_not_learn():
    method = LwF.build(LwFConfig(lr=0.1), 7, [8], 6)
    stream = class_scenario(random_dataset()).train_stream
    for experience in stream:
        kept = {key: value.clone() for key, value in method.model.state_dict().items()}
        samples = method.before_training_exp(experience)
        for x, y in samples.batches(5):
            method.observe(x, y)
        if experience is not stream[0]:
            assert all(torch.equal(kept[key], value) for key, value in method.teacher.state_dict().items())
    assert isinstance(method.teacher, SeenClassesMLP)
    assert method.teacher.seen.tolist() == [True] * 4 + [False] * 2


# replay


@given(st.integers(1, 30), st.lists(st.lists(st.integers(0, 5), max_size=25), min_size=1, max_size=6), seeds)
@settings(deadline=None)
def test_the_buffer_is_bounded_balanced_and_holds_what_was_shown(size, stream, seed):
    torch.manual_seed(seed)
    buffer = ReplayBuffer(size, 2)
    shown = []
    for labels in stream:
        y = torch.tensor(labels, dtype=torch.int64)
        numbers = torch.arange(len(shown), len(shown) + len(y))
        shown += labels
        buffer.add(torch.stack([numbers, y], dim=1).float(), y)  # every sample is recognisable
        assert len(buffer) == min(size, len(shown))
        assert torch.equal(buffer.x[:, 1], buffer.y.float())
        numbers = buffer.x[:, 0].long()
        assert len(numbers.unique()) == len(buffer)
        assert [shown[number] for number in numbers.tolist()] == buffer.y.tolist()
        kept = buffer.y.bincount(minlength=6)
        for label in range(6):
            # a class with less than another has given all that it ever showed
            assert kept[label] >= kept.max() - 1 or kept[label] == shown.count(label)


def test_the_buffer_is_a_uniform_sample_whatever_the_order():
    counts = torch.zeros(12)
    trials = 3000
    for _ in range(trials):
        buffer = ReplayBuffer(3, 1)
        for start, stop in ((0, 2), (2, 9), (9, 12)):
            buffer.add(torch.arange(start, stop).float()[:, None], torch.zeros(stop - start, dtype=torch.int64))
        counts[buffer.x[:, 0].long()] += 1
    expected, deviation = trials / 4, math.sqrt(trials * 0.25 * 0.75)
    assert ((counts - expected).abs() < 5 * deviation).all()


def test_replayed_samples_are_of_earlier_experiences_only_and_as_many_as_new_ones(monkeypatch):
    method = Replay.build(ReplayConfig(lr=0.1, buffer_size=8), 7, [8], 6)
    batches, drawn = [], []
    method.model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    draw = method.buffer.draw
    monkeypatch.setattr(method.buffer, "draw", lambda n: drawn.append(draw(n)) or drawn[-1])
    stream = class_scenario(random_dataset()).train_stream
    earlier = set()
    for experience in stream:
        batches.clear(), drawn.clear()
        samples = method.before_training_exp(experience)
        for x, y in samples.batches(6):
            _, scores = method.loss(x, y)
            assert len(scores) == len(y)
            method.observe(x, y)
        new = [6, 6, 6, 6, 6, 6, 2, 2]  # each minibatch of 20 samples twice: loss, and the step
        assert batches == (new if not earlier else [2 * n for n in new])
        assert {int(label) for _, y in drawn for label in y} == earlier
        method.after_training_exp(samples)
        earlier |= set(experience.classes)
    everything = class_scenario(random_dataset(), classes_per_task=6).train_stream[0]
    known = {tuple(row) for row in next(everything.batches(60))[0].tolist()}
    assert {tuple(row) for row in method.buffer.x.tolist()} <= known


# joint


@pytest.mark.parametrize("scenario", [class_scenario, permuted_scenario])
def test_joint_training_sees_all_samples_so_far(scenario):
    method = JointTraining.build(FullPrecisionConfig(lr=0.1), 7, [8], 6)
    stream = scenario(random_dataset(), tasks=3).train_stream
    wanted = []
    for experience in stream:
        wanted += [(*x.tolist(), int(y)) for xs, ys in experience.batches(10) for x, y in zip(xs, ys, strict=True)]
        samples = method.before_training_exp(experience)
        batches = list(samples.batches(7, torch.Generator().manual_seed(0)))
        found = [(*x.tolist(), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
        assert sorted(found) == sorted(wanted)
        assert len(samples) == len(wanted)
        assert set(samples.classes) == {label for *_, label in wanted}
        method.after_training_exp(samples)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_joint_training_remembers_the_experiences_of_every_scenario(scenario):
    """Through a file that is read without running what is in it."""
    data, options = random_dataset(shape=(3, 3)), {} if scenario == "domain" else {"tasks": 3}
    stream = make_scenario(scenario, [data] * (3 if scenario == "domain" else 1), **options).train_stream
    method, other = (JointTraining.build(FullPrecisionConfig(lr=0.1), 9, [8], 6) for _ in range(2))
    for experience in stream[:2]:
        method.after_training_exp(method.before_training_exp(experience))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    wanted, found = (list(learner.before_training_exp(stream[2]).batches(10)) for learner in (method, other))
    assert len(wanted) == len(found)
    for batch, same_batch in zip(wanted, found, strict=True):
        assert all(map(torch.equal, batch, same_batch))


# engram-fp


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.floats(0.01, 1.0), seeds)
@settings(deadline=None, max_examples=50)
def test_the_twin_is_its_formula(hidden, rate, seed):
    torch.manual_seed(seed)
    model = FloatTwin([5, *hidden, 3], rate, segments=4)
    x = torch.randn(6, 5)
    h = x
    for weight in model.hidden_weights:
        z = F.layer_norm(h @ weight.T, weight.shape[:1])
        recruited = ek.StochasticEngram(rate).recruited(z.shape[1])
        gate = torch.zeros_like(z).scatter(1, z.argsort(dim=1, descending=True, stable=True)[:, :recruited], 1.0)
        h = z.relu() * gate
    torch.testing.assert_close(model.features(x), h)
    cosines = F.cosine_similarity(h[:, None], model.weight[None], dim=2)
    torch.testing.assert_close(model.activations(x), 10.0 * cosines.view(6, 3, 4), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), model.activations(x).amax(2))
    model.top_segments = 3
    torch.testing.assert_close(model(x), model.activations(x).sort(dim=2).values[:, :, 1:].mean(2))


def test_the_twin_starts_gaussian_and_keeps_its_hidden_layers():
    method = FloatTwinMethod.build(FloatTwinConfig(lr=0.1, loss="local", segments=3), 100, [400, 300], 6)
    first, second = method.model.hidden_weights
    assert (first * 10).std() == pytest.approx(1.0, abs=0.02)
    assert (second * 20).std() == pytest.approx(1.0, abs=0.02)
    assert method.model.weight.abs().max() <= 0.05
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    method.observe(torch.randn(9, 100), torch.arange(9) % 6)
    after = method.model.state_dict()
    assert sorted(key for key in before if not torch.equal(before[key], after[key])) == ["weight", "wins"]


@pytest.mark.parametrize("training", [True, False])
def test_the_twin_is_trained_by_the_loss_of_the_binary_read_out(training):
    config = FloatTwinConfig(lr=0.1, loss="local", segments=3, top_segments=2, conscience=2.0)
    method = FloatTwinMethod.build(config, 7, [20], 6)
    method.model.train(training)
    method.model.wins.random_(1, 9)
    readout = ek.DendriticReadout(20, 6, 3, engram=ek.StochasticEngram(0.1), conscience=2.0).train(training)
    readout.wins.copy_(method.model.wins)
    x, y = torch.randn(9, 7), torch.tensor([0, 1, 1, 2, 2, 2, 4, 4, 5])
    loss, scores = method.loss(x, y)
    assert loss == readout.local_loss(method.model.activations(x), y)
    assert torch.equal(scores, method.model(x))
    assert torch.equal(method.model.wins, readout.wins)
    loss.backward()
    moved = method.model.weight.grad.view(6, 3, 20).abs().sum(2) > 0
    assert not moved[3].any(), "no sample of this class"
    assert moved[[0, 1, 2, 4, 5]].any(1).all()


@pytest.mark.parametrize("loss", ["all", "batch"])
def test_the_twin_takes_the_other_losses(loss):
    method = FloatTwinMethod.build(FloatTwinConfig(lr=0.1, loss=loss, segments=3), 7, [20], 6)
    x, y = torch.randn(9, 7), torch.arange(9) % 3
    scores = method.model(x)
    wanted = F.cross_entropy(scores if loss == "all" else scores[:, :3], y)
    torch.testing.assert_close(method.loss(x, y)[0], wanted)
