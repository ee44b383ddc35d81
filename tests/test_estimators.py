import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.utils.estimator_checks import parametrize_with_checks

import engram_kernels as ek

UNITS = 512  # enough to learn, few enough for fast tests


def tables():
    return {load.__name__: load(return_X_y=True) for load in (load_iris, load_wine, load_breast_cancer, load_digits)}


TABLES = tables()


def classifier(**settings):
    return ek.EngramClassifier(n_units=UNITS, **settings)


@parametrize_with_checks([classifier(), classifier(readout="dendritic")])
def test_scikit_learn_takes_it_for_an_estimator(estimator, check):
    check(estimator)


def same_counts(a, b):
    assert a.n_units_ == b.n_units_
    assert (a.classes_ == b.classes_).all()
    assert (a.moments_.samples == b.moments_.samples).all()
    assert (a.moments_.counts == b.moments_.counts).all()
    assert len(a.moments_.blocks) == len(b.moments_.blocks)
    assert (a.segments_ is None) == (b.segments_ is None)
    if a.segments_ is not None:
        ours, theirs = a.segments_.state_dict(), b.segments_.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for block, other in zip(a.moments_.blocks, b.moments_.blocks, strict=True):
        assert (block == other).all()
    return True


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("readout", ["ridge", "prototype"])
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-3, 1e4), (1e5, -3.0)])
def test_order_leaves_no_trace(table, readout, scale, offset):
    X, y = TABLES[table]
    X = X * scale + offset
    together = classifier(readout=readout).fit(X, y)
    by_class = classifier(readout=readout)
    for label in np.unique(y)[::-1]:
        by_class.partial_fit(X[y == label], y[y == label])
    shuffled = classifier(readout=readout)
    order = np.random.default_rng(0).permutation(len(y))
    for part in np.array_split(order, 7):
        shuffled.partial_fit(X[part], y[part])
    for other in (by_class, shuffled):
        if readout == "ridge":
            assert same_counts(together, other)
        assert (together.decision_function(X) == other.decision_function(X)).all()


DENDRITIC_IMAGES = {"readout": "dendritic", "image_shape": (8, 8), "patch": 4}


def test_segments_keep_no_trace_of_the_order_of_classes():
    X, y = TABLES["load_digits"]
    together = classifier(**DENDRITIC_IMAGES).fit(X, y)
    by_class = classifier(**DENDRITIC_IMAGES)
    for label in np.unique(y)[::-1]:
        for part in np.array_split(np.flatnonzero(y == label), 3):
            by_class.partial_fit(X[part], y[part])
    assert same_counts(together, by_class)
    assert (together.decision_function(X) == by_class.decision_function(X)).all()


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-3, 1e4), (1e5, -3.0)])
def test_segments_learn_classes_that_no_line_parts(scale, offset):
    rng = np.random.default_rng(0)
    X = rng.random((1200, 2))
    y = (X[:, 0] > 0.5) ^ (X[:, 1] > 0.5)
    X = X * scale + offset
    model = classifier(readout="dendritic")
    for label in (False, True):
        model.partial_fit(X[:600][y[:600] == label], y[:600][y[:600] == label])
    assert model.score(X[600:], y[600:]) > 0.95
    assert classifier().fit(X[:600], y[:600]).score(X[600:], y[600:]) < 0.7


def test_segments_of_tables_do_as_well_whatever_order_the_ranges_come_in():
    for table in TABLES:
        X, y, X_test, y_test = split(table)
        by_class = classifier(readout="dendritic")
        for label in np.unique(y):
            by_class.partial_fit(X[y == label], y[y == label])
        together = classifier(readout="dendritic").fit(X, y)
        assert by_class.score(X_test, y_test) > together.score(X_test, y_test) - 0.03 > 0.88


def split(table="load_digits"):
    X, y = TABLES[table]
    return X[::2], y[::2], X[1::2], y[1::2]


@pytest.mark.parametrize("settings", [{}, DENDRITIC_IMAGES])
def test_merged_estimators_are_one_that_saw_all(settings):
    X, y, X_test, _ = split()
    one = classifier(**settings).fit(X, y)
    a = classifier(**settings).partial_fit(X[y < 6], y[y < 6])
    b = classifier(**settings).partial_fit(X[y >= 6], y[y >= 6])
    before = b.decision_function(X_test)
    assert a.merge(b) is a
    assert same_counts(a, one)
    assert (a.decision_function(X_test) == one.decision_function(X_test)).all()
    assert (b.decision_function(X_test) == before).all()
    with pytest.raises(ValueError, match="other: expected an estimator with seed_ = "):
        a.merge(classifier(random_state=1, **settings).fit(X, y))


def test_merged_segments_of_the_same_classes_are_of_both():
    X, y, X_test, y_test = split()
    a, b = (classifier(readout="dendritic", segments=20).fit(X[i::2], y[i::2]) for i in range(2))
    alone = a.score(X_test, y_test)
    a.merge(b)
    assert a.moments_.total == len(y) == int(a.segments_.state_dict()["won"].sum())
    assert a.score(X_test, y_test) > alone - 0.01
    with pytest.raises(ValueError, match="other: expected an estimator with segments = 20, got 21"):
        a.merge(classifier(readout="dendritic", segments=21).fit(X, y))
    classifier(segments=20).fit(X, y).merge(classifier(segments=21).fit(X, y))  # which the ridge has no use for


@pytest.mark.parametrize("readout", ["prototype", "dendritic"])
def test_classes_of_images_are_forgotten_exactly_without_their_samples(readout):
    X, y, X_test, _ = split()
    settings = {"readout": readout, "image_shape": (8, 8), "patch": 4}
    never = classifier(**settings).fit(X[y != 3], y[y != 3])
    forgot = classifier(**settings).fit(X, y).forget(3)
    assert same_counts(never, forgot)
    assert (never.decision_function(X_test) == forgot.decision_function(X_test)).all()


def test_ridge_forgets_the_class_and_goes_on_learning():
    X, y, X_test, y_test = split()
    model = classifier().fit(X, y)
    model.forget([3, 8])
    assert model.classes_.tolist() == [0, 1, 2, 4, 5, 6, 7, 9]
    known = ~np.isin(y_test, [3, 8])
    assert model.score(X_test[known], y_test[known]) > 0.95
    model.partial_fit(X[y == 3], y[y == 3])
    assert 3 in model.classes_
    assert (model.predict(X_test)[y_test == 3] == 3).mean() > 0.9
    with pytest.raises(ValueError, match="classes: expected some of"):
        model.forget("three")


@pytest.mark.parametrize(
    "settings", [{}, {"readout": "prototype"}, {"image_shape": (8, 8), "patch": 4}, DENDRITIC_IMAGES]
)
def test_classes_whose_samples_are_shown_again_are_forgotten_exactly(settings):
    X, y, X_test, _ = split()
    gone, rest = np.isin(y, [3, 8]), ~np.isin(y, [3, 8])
    never = classifier(**settings).fit(X[rest], y[rest])
    model = classifier(**settings).fit(X, y)
    for bad_X, bad_y, message in [
        (X[gone][1:], y[gone][1:], r"X: expected the \d+ samples that were learned of class [38], got \d+"),
        (X[gone][:, ::-1], y[gone], "X: expected the .* or others"),
        (X, y, "y: expected labels of the classes to forget alone, got 0"),
        (X[gone], None, "y: expected labels, got None"),
        (X[gone][:, :9], y[gone], "has 9 features"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.forget([3, 8], bad_X, bad_y)
    order = np.random.default_rng(0).permutation(gone.sum())
    model.forget([3, 8], X[gone][order], y[gone][order])
    assert same_counts(never, model)
    assert (never.decision_function(X_test) == model.decision_function(X_test)).all()
    assert model.merge(classifier(**settings).fit(X[gone], y[gone])).score(X, y) > 0.9


@pytest.mark.parametrize(
    "settings",
    [{}, {"readout": "prototype"}, {"image_shape": (8, 8), "patch": 4}, {"readout": "dendritic"}, DENDRITIC_IMAGES],
)
@pytest.mark.parametrize("names", [lambda y: y, lambda y: np.array([f"digit {i}" for i in y]), lambda y: y > 4])
def test_a_saved_estimator_is_the_same(settings, names, tmp_path):
    X, y, X_test, _ = split()
    model = classifier(**settings).fit(X[y != 2], names(y[y != 2]))
    model.save(tmp_path / "model.safetensors")
    loaded = ek.EngramClassifier.load(tmp_path / "model.safetensors")
    assert loaded.get_params() == model.get_params()
    assert (loaded.predict(X_test) == model.predict(X_test)).all()
    assert (loaded.decision_function(X_test) == model.decision_function(X_test)).all()
    for one in (model, loaded):
        one.partial_fit(X[y == 2], names(y[y == 2]))
    assert (loaded.predict(X_test) == model.predict(X_test)).all()


def test_files_that_are_no_saved_estimator_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    X, y, *_ = split()
    path = tmp_path / "model.safetensors"
    classifier().fit(X, y).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file"):
            ek.EngramClassifier.load(path)
    save_file({"a": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a saved EngramClassifier"):
        ek.EngramClassifier.load(path)
    for version, age in ((b"9", "newer"), (b"1", "older")):
        path.write_bytes(whole.replace(b'"version":"2"', b'"version":"' + version + b'"'))
        with pytest.raises(ValueError, match=f"version 2 of the file format, got {version.decode()}; an? {age}"):
            ek.EngramClassifier.load(path)


@pytest.mark.parametrize("readout, reject", [("ridge", 3.0), ("dendritic", 2.0)])
def test_novelty_tells_unknown_classes_and_rejects_them(readout, reject):
    from sklearn.metrics import roc_auc_score

    X, y, X_test, y_test = split()
    model = classifier(readout=readout).fit(X[y < 5], y[y < 5])
    assert roc_auc_score(y_test >= 5, model.novelty(X_test)) > 0.93
    assert abs(model.novelty(X_test[y_test < 5]).mean()) < 1
    model.set_params(reject=reject)
    rejected = model.predict(X_test) == -1
    assert (rejected == (model.novelty(X_test) > reject)).all()
    assert rejected[y_test >= 5].mean() > 0.5 > 0.1 > rejected[y_test < 5].mean()


def test_one_more_sample_is_learned_without_a_new_solution():
    X, y, X_test, _ = split()
    model = classifier().fit(X[1:], y[1:])
    model.predict(X_test)
    model.partial_fit(X[:1], y[:1])
    new = classifier().fit(X, y)
    assert np.abs(model.decision_function(X_test) - new.decision_function(X_test)).max() < 1e-2
    assert (model.predict(X_test) == new.predict(X_test)).all()


@pytest.mark.parametrize(
    "X, y, message",
    [
        (np.full((4, 3), np.nan), [0, 1, 0, 1], "X: expected finite numbers, got NaN at row 0, column 0"),
        (np.array([[1.0, 2.0], [3.0, -np.inf]]), [0, 1], "X: expected finite numbers, got inf at row 1, column 1"),
        (np.zeros((4, 3)), [0, "a", None, 1], "y: expected labels of one kind"),
        (np.zeros((4, 3)), [1, 1, 1, 1], "y: expected at least 2 classes, got 1 class"),
        (np.zeros((0, 3)), [], "minimum of 1 is required"),
        (np.zeros((4, 3)), [0, 1, 1], "inconsistent numbers of samples"),
    ],
)
def test_bad_input_is_refused_by_name(X, y, message):
    y = np.array(y, dtype=object) if "a" in y else np.array(y)
    with pytest.raises(ValueError, match=message):
        classifier().fit(X, y)


def test_a_call_that_fails_leaves_the_estimator_as_it_was():
    X, y, X_test, _ = split()
    model = classifier().fit(X, y)
    scores = model.decision_function(X_test)
    for bad_X, bad_y in [(X * np.nan, y), (X[:, :3], y), (X, np.array(["a"] * len(y))), (X[:0], y[:0])]:
        with pytest.raises(ValueError):
            model.partial_fit(bad_X, bad_y)
    with pytest.raises(ValueError, match="has 3 features, but EngramClassifier is expecting 64"):
        model.predict(X_test[:, :3])
    assert (model.decision_function(X_test) == scores).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_units": 0}, "n_units: expected at least 1"),
        ({"readout": "lasso"}, "readout: expected one of 'ridge', 'prototype', 'dendritic', got 'lasso'"),
        ({"segments": 0}, "segments: expected at least 1"),
        ({"rate": 1.5}, "rate: expected"),
        ({"memory_budget": "1kB"}, "memory_budget: expected at least"),
        ({"memory_budget": "much"}, "memory_budget: expected bytes, or text"),
        ({"memory_budget": "1GB", "n_units": 3}, "memory_budget: expected None"),
        ({"image_shape": (8, 9)}, "image_shape: expected the shape of 64 features"),
        ({"image_shape": (8, 8), "patch": 8}, "patch: expected at most 6 pixels"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    X, y, *_ = split()
    with pytest.raises(ValueError, match=message):
        ek.EngramClassifier(**settings).fit(X, y)


def test_a_memory_budget_chooses_the_width_and_says_so(capsys):
    X, y, X_test, y_test = split()
    narrow, wide = (ek.EngramClassifier(memory_budget=budget).fit(X, y) for budget in ("50MB", 80_000_000))
    assert narrow.n_units_ < wide.n_units_
    assert f"memory_budget: 50000000 bytes allow {narrow.n_units_} units\n" in capsys.readouterr().out
    ek.EngramClassifier(memory_budget="50MB", verbose=False).fit(X, y)
    assert capsys.readouterr().out == ""
    assert narrow.score(X_test, y_test) > 0.95
    for readout in ("prototype", "dendritic"):
        model = ek.EngramClassifier(memory_budget="30MB", readout=readout, verbose=False).fit(X, y)
        assert model.n_units_ >= 1024
        assert sum(a.nbytes for a in model.state_dict().values() if isinstance(a, torch.Tensor)) < 30e6


def test_inputs_of_any_kind_are_the_same():
    import pandas

    X, y, X_test, _ = split()
    scores = classifier().fit(X, y).decision_function(X_test)
    for of in (
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int16),
        lambda a: a.astype(np.uint8),
        lambda a: a.tolist(),
        torch.from_numpy,
    ):
        assert (classifier().fit(of(X), of(y)).decision_function(of(X_test)) == scores).all()
    frame = pandas.DataFrame(X, columns=[f"pixel {i}" for i in range(64)])
    model = classifier().fit(frame, y)
    assert model.feature_names_in_[3] == "pixel 3"
    assert (model.decision_function(pandas.DataFrame(X_test, columns=frame.columns)) == scores).all()
    with pytest.raises(TypeError, match="[Ss]parse"):
        import scipy.sparse

        classifier().fit(scipy.sparse.csr_array(X), y)


def test_frames_of_polars_are_the_same():
    polars = pytest.importorskip("polars")
    X, y, X_test, _ = split()
    names = [f"pixel {i}" for i in range(64)]
    model = classifier().fit(polars.DataFrame(X, schema=names), polars.Series(y))
    assert model.feature_names_in_.tolist() == names
    scores = classifier().fit(X, y).decision_function(X_test)
    assert (model.decision_function(polars.DataFrame(X_test, schema=names)) == scores).all()
    with pytest.raises(ValueError, match="feature names"):
        model.predict(polars.DataFrame(X_test, schema=names[::-1]))
    text = polars.DataFrame({"size": [1.0, 2.0], "kind": ["a", "b"]})
    with pytest.raises(ValueError, match="could not convert string to float"):
        classifier().fit(text, [0, 1])


@pytest.mark.parametrize("readout", ["ridge", "dendritic"])
def test_features_may_be_constant_few_or_huge(readout):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    X = np.stack([np.full(60, 7.0), y * 1e-9 + 1.0, rng.normal(size=60) * 1e300, y * 0.0], axis=1)
    assert classifier(readout=readout).fit(X, y).score(X, y) == 1.0
    assert classifier(readout=readout).fit(X[:, 1:2], y).score(X[:, 1:2], y) == 1.0


def test_it_works_in_pipelines_and_searches():
    import pickle

    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, y, X_test, y_test = split("load_wine")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), classifier()),
        {"engramclassifier__readout": ["ridge", "prototype", "dendritic"]},
        n_jobs=1,
    ).fit(X, y)
    assert search.score(X_test, y_test) > 0.9
    copy = pickle.loads(pickle.dumps(search.best_estimator_))
    assert (copy.predict_proba(X_test) == search.predict_proba(X_test)).all()


def test_the_package_does_not_need_scikit_learn():
    import subprocess
    import sys

    code = "import sys, engram_kernels; assert 'sklearn' not in sys.modules; engram_kernels.EngramClassifier"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_probabilities_are_calibrated_where_classes_overlap():
    rng = np.random.default_rng(0)
    for shares in ([0.5, 0.5], [0.8, 0.2], [0.6, 0.3, 0.1]):
        y = rng.choice(len(shares), 3000, p=shares)
        X = rng.normal(size=(3000, 6)) + y[:, None] * 0.6
        model = classifier().fit(X[:600], y[:600])
        sure, right = model.predict_proba(X[600:]).max(axis=1), model.predict(X[600:]) == y[600:]
        bins = np.minimum((sure * 10).astype(int), 9)
        assert sum(abs((sure - right)[bins == b].sum()) for b in range(10)) / len(right) < 0.06


def test_conjugate_gradients_find_what_a_factor_gives(monkeypatch):
    X, y, X_test, _ = split()
    model = classifier().fit(X, y)
    direct = model.decision_function(X_test)
    penalty = model.discriminants_._start.penalty
    monkeypatch.setattr("engram_kernels.discriminants.DIRECT_UNITS", 0)
    found = classifier(penalty=penalty).fit(X, y).decision_function(X_test)
    assert np.abs(found - direct).max() < 0.01 * np.abs(direct).max()
    assert (found.argmax(1) == direct.argmax(1)).mean() > 0.995
