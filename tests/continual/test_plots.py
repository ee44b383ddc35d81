"""The drawings: of any run, labels apart, nothing that leaves a figure."""

import os
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_kernels.continual import plots, report
from engram_kernels.continual.training import TrainingResult

CONFIG = {"dataset": "own.npz", "scenario": "class", "method": "engram", "hidden": [32], "seed": 7}


def result_of(tasks, learned=None):
    """A run of so many tasks, stopped after ``learned``."""
    learned = tasks if learned is None else learned
    rows = [[max(0.0, 0.9 - 0.05 * (i - j)) if j <= i else 0.0 for j in range(tasks)] for i in range(learned)]
    matrix = rows + [[None] * tasks for _ in range(tasks - learned)]
    return TrainingResult(matrix, learned == tasks, learned, 100 * learned, 1.5, 2**20, 2**28)


@pytest.mark.parametrize(("tasks", "learned"), [(5, 5), (10, 10), (2, 1), (1, 1), (3, 0), (30, 30)])
def test_a_picture_of_any_run(tmp_path, tasks, learned):
    pytest.importorskip("matplotlib")
    path = plots.write_picture(tmp_path, report.metrics_of(result_of(tasks, learned), CONFIG), chance=0.1)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") > 800
    assert os.listdir(tmp_path) == ["report.png"]


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("mnist", "on mnist, class"),
        ("folder/own.npz", "on own, class"),
        (["mnist", "folder/own.npz"], "on mnist, own, class"),
        (["a.npz", "b.npz", "c.npz", "d.npz"], "on a and 3 more data sets, class"),
    ],
)
def test_the_title_names_the_data(dataset, wanted):
    assert wanted in plots.title_of(report.metrics_of(result_of(2), {**CONFIG, "dataset": dataset}))


@given(st.lists(st.floats(0, 100), max_size=15).map(sorted))
def test_labels_are_spread_in_order_and_within_bounds(values):
    placed = plots.spread(values, gap=5.0, lowest=0.0, highest=100.0)
    assert len(placed) == len(values)
    assert all(low + 5.0 <= high + 1e-9 for low, high in pairwise(placed))
    assert all(-1e-9 <= y <= 100 + 1e-9 for y in placed)
    if all(low + 5.0 <= high for low, high in pairwise(values)):
        assert placed == pytest.approx(values)


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.5, 0.5], [0.999, 0.95], [0.31, 0.42], [0.0, 1.0], []])
def test_scales_hold_their_values(values):
    low, high = plots.bounds(values)
    assert 0.0 <= low < high <= 1.0
    assert all(low <= value <= high for value in values)


def test_styles_are_all_different():
    assert len({plots.style_of(number)[:2] for number in range(40)}) == 40


@pytest.mark.parametrize("label", ["<b>", 'id="x" & url(#y)', "$a$", "</svg><script>", "\u6570"])
def test_an_svg_has_ids_of_its_own_and_labels_as_text(label):
    pytest.importorskip("matplotlib")
    texts = []
    for name in ("one", "two"):
        with plots.own_style():
            figure = plots.new_figure(3, 3)
            line = plots.Curve(label, [1, 2], [0.5, 0.6], [0.1, 0.1])
            plots.curves(figure.subplots(), [line], 2, 0.1, [line], (0.0, 1.0))
            texts.append(plots.as_svg(figure, name, f"of {label}"))
    ids = []
    for name, text in zip(("one", "two"), texts, strict=True):
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") == f"of {label}"
        assert f"{label}: 60" in [element.text for element in root.iter() if element.text]
        assert not {"script", "style", "metadata"} & {element.tag.rpartition("}")[2] for element in root.iter()}
        own = [element.get("id") for element in root.iter() if element.get("id")]
        used = re.findall(
            r"url\(#([^)]+)\)", " ".join(v for e in root.iter() for k, v in e.items() if k != "aria-label")
        )
        used += [value[1:] for e in root.iter() for key, value in e.items() if key.endswith("href")]
        assert used and set(used) <= set(own)
        assert all(own_id.startswith(f"{name}-") for own_id in own)
        ids += own
    assert len(ids) == len(set(ids))


def test_a_matrix_has_a_number_in_every_known_cell():
    pytest.importorskip("matplotlib")
    with plots.own_style():
        axes = plots.new_figure(3, 3).subplots()
        plots.accuracy_matrix(axes, np.array([[0.9, np.nan], [0.455, 1.0]]))
    assert sorted(text.get_text() for text in axes.texts) == ["100", "46", "90"]
