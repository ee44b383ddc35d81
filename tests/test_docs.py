"""README and docs/ hold: their Python runs, what it prints stands below it, their commands are commands of ours.

Blocks of one page run in order and share their names. A ``text`` block holds lines that the block above it prints, in
order; numbers may differ by one (a percent, as a rule), since
processors round differently.
"""

import contextlib
import doctest
import inspect
import io
import operator
import re
import shlex
from pathlib import Path

import pytest
import torch

import engram_kernels as ek
from engram_kernels.cli import build_parser, main
from engram_kernels.continual.methods import METHODS
from engram_kernels.continual.parameters import markdown_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {"docs/tutorial.md", "docs/how-to/compile-and-export.md"}  # trains three networks; waits for a C++ compiler
LANGUAGES = {"c", "python", "sh", "text", "formula"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def pages(paths):
    return [
        pytest.param(path, id=name_of(path), marks=[pytest.mark.slow] if name_of(path) in SLOW else [])
        for path in paths
    ]


# ---- blocks


def run_python(example):
    """Runs a block and keeps what it prints."""
    printed = io.StringIO()
    code = compile("\n" * example.line + example.parsed, example.path, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, example.namespace)
    example.namespace["printed"] = printed.getvalue


def check_shell(example):
    """Checks every command of a block; those of ours that train on digits can run, if their output is told."""
    commands = [
        shlex.split(command, comments=True)
        for line in example.parsed.replace("\\\n", " ").splitlines()
        for command in line.split("&&")
    ]
    for words in filter(None, commands):
        check_command(words)

    def printed():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            for words in commands:
                assert words[0] == "engram-kernels", f"output told of a command that is not run: {words}"
                assert main(words[1:]) == 0
        return printed.getvalue()

    example.namespace["printed"] = printed


def check_command(words):
    """A command of this package parses; another one names files, extras and markers that exist."""
    if words[0] == "engram-kernels":
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                build_parser().parse_args(words[1:])
            except SystemExit as done:
                assert done.code == 0, f"{shlex.join(words)}: {errors.getvalue()}"
    elif words[0] in ("python", "bash") and words[1] != "-m":
        assert (ROOT / words[1]).exists(), f"{shlex.join(words)}: no such file"
    elif words[0] == "pytest":
        for path in words[1:]:
            assert "/" not in path or (ROOT / path.split("::")[0]).exists(), f"{shlex.join(words)}: no {path}"
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"(?:^|\s)(?:\.|engram-kernels)\[([\w,-]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{shlex.join(words)}: no extra {extra}"


def same_but_for_rounding(told, printed):
    if NUMBER.sub("#", told).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(told), NUMBER.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= 1 for one, other in pairs)


def check_output(example):
    """Every line of the block was printed, in order."""
    assert "printed" in example.namespace, "a text block stands below the block that prints it"
    printed = example.namespace.pop("printed")()
    lines = iter(printed.splitlines())
    for told in filter(None, map(str.strip, example.parsed.splitlines())):
        assert any(same_but_for_rounding(told, line.strip()) for line in lines), f"{told!r} is not printed:\n{printed}"


@pytest.mark.parametrize("path", pages(PAGES))
def test_blocks_run_and_print_what_is_told(path, tmp_path, monkeypatch):
    sybil = pytest.importorskip("sybil", reason="sybil is not installed (extra test)")
    from sybil.parsers.markdown import CodeBlockParser

    monkeypatch.chdir(tmp_path)
    parsers = [
        CodeBlockParser(language, evaluator)
        for language, evaluator in (("python", run_python), ("sh", check_shell), ("text", check_output))
    ]
    for example in sybil.Document.parse(str(path), *parsers):
        example.evaluate()


@pytest.mark.parametrize("path", pages(PAGES))
def test_every_block_says_its_language(path):
    fences = re.findall(r"^ *```(.*)$", path.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES and not any(fences[1::2])


@pytest.mark.parametrize("told, printed, same", [
    ("95.0 % right", "95.6 %  right", True), ("95.0 % right", "93.0 % right", False), ("task 1", "job 1", False),
])  # fmt: skip
def test_numbers_may_be_rounded_and_words_may_not_change(told, printed, same):
    assert same_but_for_rounding(told, printed) is same


@pytest.mark.parametrize("command", [
    "engram-kernels train --no-such-option", "python examples/none.py", "pytest tests/none.py", "pip install .[none]",
])  # fmt: skip
def test_a_wrong_command_is_found(command):
    with pytest.raises(AssertionError):
        check_command(shlex.split(command))


# ---- links


def anchors_of(path):
    """Of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", pages([*PAGES, ROOT / "CONTRIBUTING.md"]))
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: no such file"
        assert not heading or heading in anchors_of(target), f"{link}: no such heading"


def test_every_page_is_in_the_navigation_once():
    config = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES[1:]:
        page = path.relative_to(ROOT / "docs").as_posix()
        assert len(re.findall(rf"[ -]{re.escape(page)}$", config, re.MULTILINE)) == 1, page


def test_the_table_of_hyper_parameters_is_that_of_the_configurations():
    configurations = {name: preset.config for name, preset in METHODS.items()}
    assert markdown_table(configurations) in (ROOT / "docs/reference/command-line.md").read_text()


# ---- docstrings


def public_objects():
    """Every public class and function, by its name below ``ek``."""
    names = [name for name in ek.__all__ if inspect.isclass(getattr(ek, name)) or inspect.isfunction(getattr(ek, name))]
    operators = [name for name in dir(ek.ops) if not name.startswith("_") and inspect.isfunction(getattr(ek.ops, name))]
    return names + [f"ops.{name}" for name in operators]


def examples_of(name):
    found = operator.attrgetter(name)(ek)
    return doctest.DocTestParser().get_doctest(
        inspect.getdoc(found) or "", {"torch": torch, "ek": ek, **vars(inspect.getmodule(found))}, f"ek.{name}", None, 0
    )


@pytest.mark.parametrize("name", public_objects())
def test_every_public_name_has_an_example_that_runs(name):
    examples = examples_of(name)
    assert examples.examples, f"ek.{name}: no example (>>>) in its docstring"
    told = io.StringIO()
    assert not doctest.DocTestRunner().run(examples, out=told.write).failed, told.getvalue()
