"""The page: well-formed, alone in the world, complete, and true to the numbers."""

import math
import re
import sys
from html.parser import HTMLParser

import pytest

from engram_kernels.continual import html, report
from engram_kernels.continual.compare import Run, content_of
from engram_kernels.continual.training import TrainingResult

pytest.importorskip("matplotlib")

VOID = {"meta", "line", "rect", "circle", "path", "polyline", "polygon", "stop", "br", "use"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what a reader gets."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def metrics_of(tasks, learned=None, seed=0, drop=0.05, step=1.5, memory=20 * 2**20):
    learned = tasks if learned is None else learned
    rows = [
        [max(0.0, 0.9 + 0.01 * seed - drop * (i - j)) if j <= i else 0.0 for j in range(tasks)] for i in range(learned)
    ]
    result = TrainingResult(
        accuracy_matrix=rows + [[None] * tasks for _ in range(tasks - learned)],
        completed=learned == tasks,
        tasks_completed=learned,
        steps=100 * learned,
        step_milliseconds=step,
        peak_memory_bytes=memory,
        total_memory_bytes=2**28,
    )
    return report.metrics_of(result, {"seed": seed})


def run_of(tmp_path, label, seed=0, status="complete", metrics=None, **config):
    run = Run(label, seed, tmp_path / "runs", ["--method", "engram"], {"method": label, "seed": seed, **config})
    run.status, run.metrics = status, metrics
    return run


def content(runs, **about):
    default = {
        "dataset": "digits", "chance": 0.1, "seeds": sorted({run.seed for run in runs}), "jobs": 1,
        "facts": ["class scenario"], "command": "engram-kernels compare --methods a b",
        "created": "2026-01-02T03:04+00:00", "processor": "a processor",
    }  # fmt: skip
    return content_of(runs, {**default, **about})


def two_methods(tmp_path, tasks=5, seeds=(0, 1)):
    return [
        run_of(tmp_path, label, seed, metrics=metrics_of(tasks, seed=seed, drop=drop, step=step, memory=memory), lr=lr)
        for label, drop, step, memory, lr in (("good", 0.02, 3.0, 40 * 2**20, 0.1), ("bad", 0.1, 1.5, 16 * 2**20, 0.2))
        for seed in seeds
    ]


@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 20, 21, 50])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_page_of_any_size_is_well_formed(tmp_path, tasks, seeds):
    page = Page(html.page(content(two_methods(tmp_path, tasks, seeds))))
    assert len(page.ids) == len(set(page.ids))
    assert all(
        "aria-label" in attributes or "aria-hidden" in attributes for tag, attributes in page.tags if tag == "svg"
    )
    drawings = sum(tag == "svg" for tag, _ in page.tags)
    assert drawings == 2 + 2 + 2, "curves for two widths, two matrices, memory and time"
    for number in (value for _, attributes in page.tags for value in attributes.values() if value):
        assert not re.search(r"\bnan\b|\binf\b", number)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = html.page(content(two_methods(tmp_path)))
    assert set(re.findall(r"https?:[^\"]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert all(a["xlink:href"].startswith(("#", "data:")) for _, a in page.tags if "xlink:href" in a)


def test_every_method_and_number_is_there(tmp_path):
    methods = content(two_methods(tmp_path))
    page = Page(html.page(methods))
    for method in methods["methods"]:
        summary = method["summary"]
        for name, scale in (("average_accuracy", 100), ("backward_transfer", 100), ("forgetting", 100)):
            assert f"{scale * summary[name]['mean']:.1f}".replace("-", "\N{MINUS SIGN}") in page.text
        assert f"{summary['step_milliseconds']['mean']:.2f}" in page.text
        assert f"{summary['peak_memory_bytes']['mean'] / 2**20:.1f}" in page.text
        assert page.text.count(method["label"]) >= 5
    # a ranking, ratios, how sure one may be, and how it was made
    good, bad = page.text.index("1 \u25cf good"), page.text.index("2 \u25a0 bad")
    assert good < bad
    times = "\N{MULTIPLICATION SIGN}"
    for piece in (
        f"2.5{times}", f"2.0{times}", "± 0.7", "over 2 seeds", "engram-kernels compare --methods a b", "a processor",
        "2026-01-02 03:04", "torch", "lr 0.1 0.2",
    ):  # fmt: skip
        assert piece in page.text
    assert "good: 86" in page.text, "at the end of its curve"


def test_the_curve_is_the_mean_of_the_average_so_far(tmp_path):
    page = Page(html.page(content(two_methods(tmp_path))))
    # drop 0.02: (0.90 + 0.88) / 2 with seed 0, one point more with seed 1
    assert "after task 2 89.5 ± 0.7" in page.text


def test_guessing_is_drawn_where_it_is_in_sight(tmp_path):
    for chance, drawn in ((0.85, True), (0.1, False)):
        assert ("guessing</text>" in html.page(content(two_methods(tmp_path), chance=chance))) == drawn


@pytest.mark.parametrize("label", ["<b>bold</b>.npz", '"quoted" & more', "</title><script>alert(1)</script>", "é ∑ 数"])
def test_whatever_users_name_is_text(tmp_path, label):
    runs = [
        run_of(tmp_path, label, metrics=metrics_of(3), hidden=label),
        run_of(tmp_path, f"{label} 2", status="failed"),
    ]
    runs[1].error = label
    runs[1].output.append(label)
    page = Page(html.page(content(runs, dataset=label, command=label, processor=label, facts=[label])))
    assert not {"b>", "script"} & {tag for tag, _ in page.tags}
    assert page.text.count(label) >= 8


def test_one_method_is_compared_with_none(tmp_path):
    page = Page(html.page(content([run_of(tmp_path, "alone", metrics=metrics_of(3))])))
    assert "1 method on digits" in page.text
    assert "best" not in page.text.lower()
    assert "One seed (0): differences may be chance" in page.text


def test_what_failed_or_was_interrupted_is_said(tmp_path):
    runs = [
        run_of(tmp_path, "whole", metrics=metrics_of(4)),
        run_of(tmp_path, "part", status="interrupted", metrics=metrics_of(4, learned=2)),
        run_of(tmp_path, "early", status="interrupted"),
        run_of(tmp_path, "broken", status="failed"),
        run_of(tmp_path, "later", status="waiting"),
    ]
    runs[3].error, runs[3].output = "loss: expected a finite number, got nan", ["Traceback\n", "at the end\n"]
    page = Page(html.page(content(runs)))
    for piece in (
        "part , seed 0 was interrupted after 2 tasks", "early , seed 0 was interrupted;",
        "broken , seed 0 failed: loss: expected a finite number, got nan", "Traceback at the end",
        "later , seed 0 is not run yet", "0/1", "1/1", "(incomplete)",
    ):  # fmt: skip
        assert piece in page.text
    row = page.text.index("after task 3 ")
    assert page.text[row : row + 26] == "after task 3 85.0 \N{EN DASH} after "


def test_a_page_without_any_numbers(tmp_path):
    page = Page(html.page(content([run_of(tmp_path, label, status="waiting") for label in "ab"])))
    assert "a , seed 0 is not run yet" in page.text
    assert "Hyper-parameters" in page.text


def test_numbers_that_are_not_defined(tmp_path):
    """One task: nothing to forget. No steps, and a system that does not tell its memory."""
    runs = [run_of(tmp_path, label, metrics=metrics_of(1, step=math.nan, memory=None)) for label in "ab"]
    page = Page(html.page(content(runs)))
    assert "\N{EN DASH}" in page.text
    assert "Not measured on this system." in page.text
    assert "nan" not in page.text.lower()


def test_many_methods_are_told_apart_without_colours(tmp_path):
    runs = [run_of(tmp_path, f"method {i}", metrics=metrics_of(3, drop=0.01 * i)) for i in range(25)]
    text = html.page(content(runs))
    keys = re.findall(r'class="key" style="color:(#\w+)" aria-hidden="true">(.)<', text)
    assert len(set(keys)) == 25
    assert len({mark for _, mark in keys}) == 5


@pytest.mark.parametrize("evaluation", ["new", "seen"])
def test_streams_that_are_not_tested_on_every_task_each_time(tmp_path, evaluation):
    metrics = metrics_of(5)
    for i, row in enumerate(metrics["accuracy_matrix"][:-1]):
        for j in range(5):
            if j > i or (j < i and evaluation == "new"):
                row[j] = None
    page = Page(html.page(content([run_of(tmp_path, label, metrics=metrics) for label in "ab"])))
    assert ("Accuracy as tasks are learned" in page.text) == (evaluation == "seen")
    matrix = next(a["aria-label"] for tag, a in page.tags if tag == "svg" and "matrix" in a["aria-label"])
    assert "70.0, 75.0, 80.0, 85.0, 90.0 percent" in matrix
    cells = page.text.split().count("85")
    assert cells == 2 if evaluation == "new" else cells > 2, "in the last row alone, or wherever it was measured"
    assert "nan" not in page.text


def test_without_matplotlib_the_page_has_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(html.page(content(two_methods(tmp_path))))
    assert "after task 2 89.5 ± 0.7" in page.text
    assert "Without drawings: the picture report.png needs matplotlib" in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)
