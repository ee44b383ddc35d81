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


@parametrize_with_checks([classifier()])
def test_scikit_learn_takes_it_for_an_estimator(estimator, check):
    check(estimator)


def same_counts(a, b):
    assert a.n_units_ == b.n_units_
    assert (a.classes_ == b.classes_).all()
    assert (a.moments_.samples == b.moments_.samples).all()
    assert (a.moments_.counts == b.moments_.counts).all()
    assert (a.moments_.matrix(torch.int64) == b.moments_.matrix(torch.int64)).all()
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
