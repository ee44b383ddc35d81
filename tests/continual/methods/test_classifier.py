"""`classifier` learns what `EngramClassifier` learns, from the features as the data set has them."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine

import engram_kernels as ek
from engram_kernels.continual.data import from_arrays, load_digits
from engram_kernels.continual.methods import build, method_config
from engram_kernels.continual.methods.classifier import image_shape
from engram_kernels.continual.training import run


def wine():
    X, y = load_wine(return_X_y=True)
    return from_arrays("wine", X[::2], y[::2], X[1::2], y[1::2])


def digits():
    return load_digits()


@pytest.mark.parametrize("readout", ["ridge", "prototype"])
@pytest.mark.parametrize(("dataset", "shape"), [(wine, None), (digits, (8, 8))])
def test_a_run_gives_the_counts_and_the_accuracy_of_the_estimator(dataset, shape, readout):
    data = dataset()
    options = {"hidden": (192, 64), "readout": readout, "classes_per_task": 1, "batch_size": 17}
    method, result = run(data, method="classifier", **options)
    estimator = method.model.estimator
    alone = ek.EngramClassifier(256, readout=readout, image_shape=shape, random_state=estimator.random_state)
    alone.fit(data.x_train.numpy(), data.y_train.numpy())
    assert estimator.get_params() == alone.get_params()
    assert torch.equal(estimator.moments_.counts, alone.moments_.counts)
    assert torch.equal(estimator.moments_.samples, alone.moments_.samples)
    for block, other in zip(estimator.moments_.blocks, alone.moments_.blocks, strict=True):
        assert torch.equal(block, other)
    sizes = data.y_test.bincount().double()
    right = (torch.tensor(result.accuracy_matrix[-1]).double() * sizes).sum() / sizes.sum()
    assert float(right) == pytest.approx(alone.score(data.x_test.numpy(), data.y_test.numpy()))


def test_segments_are_those_asked_for():
    options = {"hidden": (512,), "readout": "dendritic", "segments": 20, "classes_per_task": 1}
    method, result = run(digits(), method="classifier", **options)
    assert set(method.model.estimator.segments_.state_dict()["used"].tolist()) == {20}
    assert np.mean(result.accuracy_matrix[-1]) > 0.9


def test_a_permutation_leaves_no_image():
    method, _ = run(digits(), method="classifier", hidden=[128], scenario="permuted", tasks=2)
    assert method.model.estimator.image_shape is None
    method, _ = run(digits(), method="classifier", hidden=[128], scenario="rotated", tasks=2)
    assert method.model.estimator.image_shape == (8, 8)


def test_classes_that_were_not_seen_have_no_probability():
    method = build("classifier", method_config("classifier", "class", "x"), 5, [128], 4)
    x = torch.randn(30, 5)
    assert (method.model(x) == 0).all()
    method.observe(x, torch.arange(30) % 2 * 2)
    scores = method.model(x)
    assert scores.dtype == torch.float32
    assert (scores[:, [1, 3]] == 0).all()
    assert np.allclose(scores.sum(1), 1.0)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((28, 28), (28, 28)), ((28, 28, 1), (28, 28)), ((1, 28, 28), (28, 28)), ((32, 32, 3), (32, 32, 3)),
        ((3, 32, 32), None), ((5, 28), None), ((64,), None), ((), None), ((9, 9, 9, 3), None), ((6, 6), (6, 6)),
    ],
)  # fmt: skip
def test_samples_that_are_images(shape, wanted):
    assert image_shape(shape) == wanted
