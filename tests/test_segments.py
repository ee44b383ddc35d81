import numpy as np
import pytest
import torch

from engram_kernels import ops
from engram_kernels.segments import Segments

K = 200


def codes(samples, seed=0, rate=0.25):
    """Noisy copies of six codes, float (samples, K) of 0 and 1."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((6, K)) < rate
    return (patterns[rng.integers(6, size=samples)] ^ (rng.random((samples, K)) < 0.1)).astype(float)


def pack(g):
    return ops.pack_signs(torch.from_numpy(g).float() - 0.5)


def learned(g, y, segments=8, classes=3, rates=None):
    model = Segments(np.full(K, 0.25) if rates is None else rates, segments)
    model.place_classes({}, classes)
    model.add(pack(g), torch.from_numpy(y))
    return model


def plain(g, rates, segments):
    """The rule by its definition, of one class: counts (segments, K), wins, and the scores of samples met."""
    fired, won, met = np.zeros((0, K)), np.zeros(0), []
    for sample in g:
        weight = np.where(fired - rates * won[:, None] >= 0, 1.0, -1.0)
        a = weight @ (sample - rates) / (2 * rates * (1 - rates)).sum()
        if len(won):
            met.append(np.sort(a)[-3:].mean())
        if len(won) < segments and not ((weight > 0) == (sample > 0)).all(axis=1).any():
            fired, won, j = np.vstack([fired, np.zeros(K)]), np.append(won, 0), len(won)
        else:
            j = (a + 0.3 * (1 - won / won.mean())).argmax()
        fired[j] += sample
        won[j] += 1
    return fired, won, met


@pytest.mark.parametrize("rates", [np.full(K, 0.25), np.full(K, 0.5), np.linspace(0.1, 0.9, K)])
@pytest.mark.parametrize("segments", [1, 2, 8, 50])
def test_segments_follow_their_definition(rates, segments):
    g = codes(120)
    g[40:50] = g[0]  # repeated samples do not take further segments
    state = learned(g, np.zeros(120, np.int64), segments, 1, rates).state_dict()
    fired, won, met = plain(g, rates, segments)
    assert (state["fired"].numpy() == fired).all()
    assert (state["won"].numpy() == won).all()
    assert state["met"].tolist() == [119]
    mean = np.average(met, weights=range(1, 120))
    assert state["score_mean"][0] == pytest.approx(mean)
    assert state["score_variance"][0] == pytest.approx(np.average((met - mean) ** 2, weights=range(1, 120)))


def test_scores_are_those_of_the_definition():
    rates = np.linspace(0.1, 0.9, K)
    g, asked = codes(90), codes(30, seed=1)
    y = np.arange(90) % 2
    scores = learned(g, y, rates=rates).scores(pack(asked))
    assert scores.dtype == torch.float64
    for c in range(2):
        fired, won, _ = plain(g[y == c], rates, 8)
        weight = np.where(fired - rates * won[:, None] >= 0, 1.0, -1.0)
        a = (asked - rates) @ weight.T / (2 * rates * (1 - rates)).sum()
        assert np.allclose(scores[:, c], np.sort(a, axis=1)[:, -3:].mean(axis=1))
    assert (scores[:, 2] == -torch.inf).all()


def test_the_activation_of_a_code_that_a_segment_holds_alone_is_one():
    g = np.zeros((1, K))
    g[0, : K // 4] = 1
    model = learned(g, np.zeros(1, np.int64), classes=1)
    assert model.scores(pack(g)).item() == pytest.approx(1.0)


def test_only_the_order_within_a_class_leaves_a_trace():
    g, y = codes(150), np.arange(150) % 3
    whole = learned(g, y)
    by_class = Segments(np.full(K, 0.25), 8)
    by_class.place_classes({}, 3)
    for c in (2, 0, 1):
        for part in np.array_split(np.flatnonzero(y == c), 7):
            by_class.add(pack(g[part]), torch.from_numpy(y[part]))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, by_class.state_dict()[name]), name


def test_classes_move_and_are_dropped_whole():
    g, y = codes(60), np.arange(60) % 3
    model, asked = learned(g, y), pack(codes(20, seed=1))
    before = model.scores(asked)
    model.place_classes({2: 0, 0: 3}, 4)
    after = model.scores(asked)
    assert torch.equal(after[:, [0, 3]], before[:, [2, 0]])
    assert (after[:, 1:3] == -torch.inf).all()


def test_a_state_goes_on_as_the_original():
    g, y = codes(60), np.arange(60) % 2
    model = learned(g, y)
    again = Segments(np.full(K, 0.25), 8)
    again.load_state_dict(model.state_dict())
    more = codes(50, seed=1)
    for one in (model, again):
        one.add(pack(more), torch.from_numpy(np.arange(50) % 3))
    assert torch.equal(model.scores(pack(g)), again.scores(pack(g)))
    assert model.temper() == again.temper()
    for a, b in zip(model.typical(), again.typical(), strict=True):
        assert torch.equal(a, b)


def test_states_without_classes_are_states():
    model = Segments(np.full(K, 0.25), 8)
    again = Segments(np.full(K, 0.25), 8)
    again.load_state_dict(model.state_dict())
    assert again.state_dict()["fired"].shape == (0, K)


def test_of_two_that_know_a_class_the_most_alike_segments_unite():
    g = codes(64)
    halves = [learned(part, np.zeros(len(part), np.int64), 8, 1) for part in (g[:40], g[40:])]
    states = [half.state_dict() for half in halves]
    halves[0].add_all(halves[1])
    state = halves[0].state_dict()
    assert state["used"].tolist() == [8]
    assert int(state["won"].sum()) == 64
    assert (state["fired"].sum(0) == torch.from_numpy(g.sum(0))).all()
    mean, variance = states[0]["score_mean"], states[0]["score_variance"]
    both = (39 * mean + 23 * states[1]["score_mean"]) / 62
    assert torch.allclose(state["score_mean"], both)
    squares = (39 * (variance + mean**2) + 23 * (states[1]["score_variance"] + states[1]["score_mean"] ** 2)) / 62
    assert torch.allclose(state["score_variance"], squares - both**2)
    patterns = halves[0].scores(pack(codes(30, seed=2)))
    assert patterns.shape == (30, 1)


def test_the_most_alike_of_all_unite_first():
    base = codes(1)[0]
    near, far = base.copy(), 1 - base
    near[0] = 1 - near[0]
    one = learned(np.stack([base, far]), np.zeros(2, np.int64), 2, 1)
    one.add_all(learned(near[None], np.zeros(1, np.int64), 2, 1))
    state = one.state_dict()
    assert sorted(state["won"].tolist()) == [1, 2]
    assert (state["fired"][state["won"] == 1].numpy() == far).all()
    assert (state["fired"][state["won"] == 2].numpy() == base + near).all()


def test_counts_are_carried_over_to_other_units():
    rng = np.random.default_rng(0)
    g = codes(40)
    T = np.zeros((5, 5), np.int64)
    T[0, 3] = T[4, 1] = 1
    c = np.array([0, 1, 0, 0, 0])
    wide = g.copy()
    wide[:, 10:15] = g[:, 10:15] @ T.T + c
    model = learned(g, np.zeros(40, np.int64), 4, 1)
    fired = model.state_dict()["fired"].numpy()
    won = model.state_dict()["won"].numpy()
    model.transform(10, T, c)
    expected = fired.copy()
    expected[:, 10:15] = fired[:, 10:15] @ T.T + won[:, None] * c
    assert (model.state_dict()["fired"].numpy() == expected).all()
    assert (expected.sum(0) == wide.sum(0)).all()
    again = Segments(np.full(K, 0.25), 4)
    again.load_state_dict(model.state_dict())
    asked = pack((rng.random((9, K)) < 0.25).astype(float))
    assert torch.equal(model.scores(asked), again.scores(asked))


def test_a_class_without_samples_asks_nothing_of_a_temper():
    model = Segments(np.full(K, 0.25), 8)
    assert model.temper() > 0
    model.place_classes({}, 2)
    model.add(pack(codes(1)), torch.zeros(1, dtype=torch.int64))
    assert np.isfinite(model.temper())
    mean, deviation = model.typical()
    assert (deviation > 0).all() and mean.shape == (2,)
