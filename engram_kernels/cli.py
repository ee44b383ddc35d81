"""The command ``engram-kernels``: train a network on task after task; describe the installation.

Exit codes: 0 done; 1 some runs of a comparison or some of several seeds failed; 2 the user's input can't be used (one
line on stderr says what was got and what is needed); 130 interrupted (what was learned so far is written).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from .continual.data import Dataset
    from .continual.memory import MemoryMeter
    from .continual.methods import Method, MethodConfig
    from .continual.scenarios import Scenario
    from .continual.training import TrainingResult

PROGRAM = "engram-kernels"
MODEL_FILE = "model.pt"
EXIT_FAILURES = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_WAIT_SECONDS = 30.0  # for a run of a comparison that was killed to leave its folder to the one that goes on with it


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like all others of this program."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """All options of the command line."""
    from . import __version__
    from .continual import methods

    parser = _Parser(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a network on one task after another and show what it remembers",
        description="Train a binarized network on a stream of tasks; after each, test it on all of them. "
        "Without options: scikit-learn's digits, two new classes per task, method engram. "
        "Writes metrics.json and report.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = train.add_argument_group("which run")
    group.add_argument(
        "--method", choices=tuple(methods.METHODS), default="engram",
        help="engram: binary, gated, metaplastic; mbnn: metaplastic only; bnn: neither; the others: full precision",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, engrams, sample order and tasks")
    group.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", default=argparse.SUPPRESS,
        help="one run per seed; prints mean and deviation too",
    )  # fmt: skip
    _add_training_options(train)
    group = train.add_argument_group("results")
    group.add_argument(
        "--output", metavar="DIR", default=argparse.SUPPRESS,
        help="where the results go (default: runs/DATASET-SCENARIO-METHOD-seedS); with --seeds, in DIR/seedS",
    )  # fmt: skip
    group.add_argument(
        "--resume", action="store_true",
        help="go on after the last finished task of an interrupted or killed run with the same output and options",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress")
    train.set_defaults(run=_train)

    compare = commands.add_parser(
        "compare",
        help="train several methods side by side and show them on one page",
        description="Train several methods, each run in a process of its own, and write report.html and compare.json. "
        "The same command again goes on with what is not complete.",
        epilog="A method may have options of its own and a label: "
        "--methods mbnn 'dendrites=engram --readout dendritic --segments 50'. All other options are those of train and "
        "hold for every method that has none of its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = compare.add_argument_group("which runs")
    group.add_argument(
        "--methods", nargs="+", default=list(methods.METHODS), metavar="METHOD",
        help="METHOD, 'METHOD --OPTION VALUE...' or 'LABEL=METHOD --OPTION VALUE...'",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", metavar="S", default=[0], help="every method runs with each")
    _add_training_options(compare)
    group = compare.add_argument_group("how the runs are made")
    group.add_argument(
        "--output", metavar="DIR", default=argparse.SUPPRESS,
        help="where the results go (default: runs/compare-DATASET-SCENARIO)",
    )  # fmt: skip
    group.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once; with more than one, each has --threads 1"
    )
    group.add_argument("--quiet", action="store_true", help="no progress")
    compare.set_defaults(run=_compare)

    info = commands.add_parser(
        "info",
        help="versions, instruction set, threads, CUDA and Triton: what a bug report needs",
        description="Print what a bug report needs to say about the installation.",
    )
    info.set_defaults(run=_info)
    return parser


def _add_training_options(train: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options that `train` and every method of `compare` have; returns them."""
    from .continual import data, methods, scenarios, training

    before = len(train._actions)
    group = train.add_argument_group("what")
    group.add_argument(
        "--dataset", nargs="+", default=["digits"], metavar="NAME",
        help=f"{', '.join(data.names())}, or the path of an .npz file with x_train, y_train, x_test, y_test; "
        "with --scenario domain two or more",
    )  # fmt: skip
    group.add_argument(
        "--data-dir", metavar="DIR", default=argparse.SUPPRESS,
        help="where the IDX files are (default: $ENGRAM_DATA_DIR, else ./data)",
    )  # fmt: skip
    group.add_argument(
        "--scenario", choices=scenarios.SCENARIOS, default="class",
        help="class: every task brings new classes; permuted: every task has its own order of the pixels; "
        "rotated: every task turns the images by another angle; domain: every task is another data set with the same "
        "labels",
    )  # fmt: skip
    group.add_argument(
        "--readout", choices=methods.READOUTS, default=argparse.SUPPRESS,
        help="of engram: a binary output layer, dendritic segments, counted prototypes, ridge regression",
    )  # fmt: skip
    group.add_argument("--hidden", type=int, nargs="+", default=[2048, 2048], metavar="N", help="hidden layer widths")
    group.add_argument(
        "--tasks", type=int, metavar="N", default=argparse.SUPPRESS,
        help=f"number of tasks (default: all classes; permuted: {scenarios.DEFAULT_PERMUTED_TASKS}; "
        f"rotated: {scenarios.DEFAULT_ROTATED_TASKS}; domain: always one per data set)",
    )  # fmt: skip
    group.add_argument(
        "--classes-per-task", type=int, metavar="N", default=argparse.SUPPRESS,
        help=f"new classes per task, scenario class (default: {scenarios.DEFAULT_CLASSES_PER_TASK})",
    )  # fmt: skip
    group.add_argument(
        "--shuffle-classes", action="store_true", help="order the classes by the seed instead of by label"
    )
    group.add_argument(
        "--max-degrees", type=float, metavar="X", default=argparse.SUPPRESS,
        help=f"angle of the last task, scenario rotated (default: {scenarios.DEFAULT_MAX_DEGREES})",
    )  # fmt: skip
    group.add_argument(
        "--samples-per-task", type=int, metavar="N", default=argparse.SUPPRESS,
        help="train each task on at most N samples; not with scenario class (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--validation", type=int, metavar="N", default=argparse.SUPPRESS,
        help="test on the last N training samples and train on the rest, to choose hyper-parameters",
    )  # fmt: skip

    group = train.add_argument_group("hyper-parameters (the default depends on method, scenario and dataset)")
    for option, kind, text in (
        ("--epochs", int, "passes over each task"),
        ("--batch-size", int, "samples per step"),
        ("--rate", float, "share of the units recruited per sample, in (0, 1]"),
        ("--temperature", float, "of the engrams' noise; 0: always the most excitable units"),
        ("--ste-window", float, "largest pre-activation that passes gradient (straight-through estimator)"),
        ("--logit-scale", float, "factor on the logits before the softmax"),
        ("--weight-decay", float, "L2 decay of the hidden weights"),
        ("--segments", int, "dendritic segments per class"),
        ("--top-segments", int, "how many of them, the most active ones, speak for their class"),
        ("--conscience", float, "of the local loss: preference for segments that win seldom"),
        ("--cross-entropy-weight", float, "of the batch's cross-entropy beside the local loss"),
        ("--penalty", float, "of the ridge regression, a share of the mean variance"),
        ("--strength", float, "lambda of ewc, c of si, weight of lwf's distillation"),
        ("--decay", float, "of ewc's earlier Fisher information with every task"),
        ("--distillation-temperature", float, "of lwf's softmax"),
        ("--buffer-size", int, "samples that replay keeps"),
    ):
        group.add_argument(
            option, type=kind, metavar="X" if kind is float else "N", default=argparse.SUPPRESS, help=text
        )
    for option, text in (
        (
            "--lr",
            "step size of metaplastic Adam; one value, three (first, between, output layer) or one per weight matrix",
        ),
        ("--metaplasticity", "resistance of large weights to shrinking; one value or several, like --lr"),
        (
            "--weight-bound",
            "largest magnitude of a hidden weight, which bounds its consolidation; one value or several, like --lr",
        ),
    ):
        group.add_argument(option, type=float, nargs="+", metavar="X", default=argparse.SUPPRESS, help=text)
    group.add_argument(
        "--loss", choices=methods.LOSS_NAMES, default=argparse.SUPPRESS,
        help="cross-entropy over all classes, over those present in the batch, or a dendritic read-out's local loss",
    )  # fmt: skip
    group.add_argument(
        "--train-hidden", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="train the hidden layers, or keep them as initialised",
    )  # fmt: skip
    group.add_argument(
        "--balanced", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="start hidden units with as many +1 as -1",
    )  # fmt: skip

    group = train.add_argument_group("memory (default: float32 throughout)")
    group.add_argument(
        "--state-dtype", choices=methods.STATE_DTYPES, default=argparse.SUPPRESS, help="of the optimizer's moments"
    )
    group.add_argument(
        "--weight-dtype", choices=methods.WEIGHT_DTYPES, default=argparse.SUPPRESS, help="of the hidden weights"
    )
    group.add_argument(
        "--fuse-backward", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="update hidden weights within the backward pass, so that no whole gradient exists",
    )  # fmt: skip

    group = train.add_argument_group("how")
    group.add_argument(
        "--evaluation", choices=training.EVALUATIONS, default="all",
        help="after each task test on all, on those seen so far, or on the new one (and on all at the end)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, metavar="N", default=argparse.SUPPRESS, help="CPU threads (default: torch's)"
    )
    group.add_argument("--save-model", action="store_true", help="also write the trained weights, model.pt")
    return train._actions[before:]


def main(arguments: Sequence[str] | None = None, *, for_comparison: bool = False) -> int:
    """Run the command line; returns the exit code (argparse itself exits with 0 or 2).

    ``for_comparison`` is True in a process that `compare` began, see :func:`train_for_comparison`.
    """
    from .continual.streams import standard_streams

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with standard_streams() as (stdout, _):
        code = _run(arguments, for_comparison)
        stdout.flush()
        if stdout.failure is not None:
            print(f"{PROGRAM}: error: standard output can't be written ({stdout.failure})", file=sys.stderr)
            code = code or EXIT_USER_ERROR
        return code


def train_for_comparison(arguments: Sequence[str]) -> int:
    """``train`` in a process that `compare` began: it ends with that, and speaks to it in UTF-8.

    What it may resume and can't read it begins anew, since nobody is there to ask.
    """
    from .continual.compare import end_with_parent

    end_with_parent()
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    return main(["train", *arguments], for_comparison=True)


def _run(arguments: list[str], for_comparison: bool) -> int:
    from .continual.streams import readable

    options = build_parser().parse_args(arguments)
    options.command_line = readable(shlex.join([PROGRAM, *arguments]))
    options.for_comparison = for_comparison
    try:
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if (message := _message(error)) is None:
            raise
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR


def _message(error: Exception) -> str | None:
    """What to tell of an error that the user can do something about; None for a fault of this program."""
    from .continual.extras import MissingExtraError
    from .continual.methods import TrainingError

    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        return "not enough memory: " + _one_line(error)
    if isinstance(error, (ValueError, OSError, TrainingError, MissingExtraError)):
        return _one_line(error)
    return None


def _warn(message: str) -> None:
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


class _Plan(NamedTuple):
    """What the options of ``train`` ask for, all of it checked."""

    datasets: list[Dataset]
    data_name: str
    scenario: Scenario  # of the first seed
    arguments: dict[str, Any]  # of training.run, besides data sets and seed
    seeds: list[int]
    config: dict[str, Any]  # for metrics.json; the seed is each run's own
    output: Path
    method_config: MethodConfig
    epochs_chosen: bool  # for the number of steps, against the method's default

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.scenario.num_classes

    def folder(self, seed: int, output: Path | None = None) -> Path:
        """Where a seed's results go, below ``output`` if not below the one planned."""
        output = self.output if output is None else output
        return output / f"seed{seed}" if len(self.seeds) > 1 else output

    def config_of(self, seed: int) -> dict[str, Any]:
        """Every option that a seed's numbers follow from."""
        return {**self.config, "seed": seed}


def _plan(options: argparse.Namespace) -> _Plan:
    """Everything that can be wrong is looked at here, before the first minute of training.

    Raises:
        ValueError: names the option, what it got and what it needs.
    """
    from .continual import data, scenarios
    from .continual.methods import METHODS, check_build, method_config

    given = vars(options)
    seeds: list[int] = given.get("seeds") or [options.seed]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected different seeds, got {' '.join(map(str, seeds))}")
    for seed in seeds:
        scenarios.seeded_generator(seed, "check")
    if (threads := given.get("threads")) is not None and threads < 1:
        raise ValueError(f"threads: expected an integer >= 1, got {threads}")
    overrides: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := given[field.name], list) and len(value) > 1
        else value[0] if isinstance(value, list) else value
        for preset in METHODS.values()
        for field in dataclasses.fields(preset.config)
        if field.name in given
    }  # fmt: skip
    tasks: dict[str, Any] = {
        name: given.get(name)
        for name in ("tasks", "classes_per_task", "shuffle_classes", "max_degrees", "samples_per_task")
    }
    datasets = [data.load(name, given.get("data_dir")) for name in options.dataset]
    if (validation := given.get("validation")) is not None:
        datasets = [data.hold_out(dataset, validation) for dataset in datasets]
    data_name = data.joined_name(datasets)
    default = method_config(options.method, options.scenario, data_name, **overrides)
    check_build(options.method, default, options.hidden)
    scenario = scenarios.make_scenario(options.scenario, datasets, seed=seeds[0], **tasks)
    samples = scenarios.task_samples(options.scenario, datasets, tasks["classes_per_task"])
    config = method_config(options.method, options.scenario, data_name, task_samples=samples, **overrides)
    several = "s" if len(seeds) > 1 else ""
    name = f"{data_name}-{options.scenario}-{options.method}-seed{several}{'-'.join(map(str, seeds))}"
    return _Plan(
        datasets=datasets,
        data_name=data_name,
        scenario=scenario,
        arguments={
            "scenario": options.scenario,
            "method": options.method,
            "hidden": options.hidden,
            "evaluation": options.evaluation,
            **tasks,
            **overrides,
        },
        seeds=seeds,
        config={
            "dataset": options.dataset if len(datasets) > 1 else options.dataset[0],
            "data_dir": given.get("data_dir"),
            "scenario": options.scenario,
            "tasks": len(scenario),
            "classes_per_task": len(scenario.test_stream[0].classes),
            "shuffle_classes": options.shuffle_classes,
            "max_degrees": given.get("max_degrees", scenarios.DEFAULT_MAX_DEGREES)
            if options.scenario == "rotated"
            else None,
            "samples_per_task": given.get("samples_per_task"),
            "validation": validation,
            "evaluation": options.evaluation,
            "method": options.method,
            "hidden": options.hidden,
            **dataclasses.asdict(config),
        },
        output=Path(given.get("output", Path("runs") / name)),
        method_config=config,
        epochs_chosen=config.epochs != default.epochs,
    )


def _train(options: argparse.Namespace) -> int:
    import torch

    from .continual import folders, report
    from .continual.memory import MemoryMeter

    plan = _plan(options)
    if "threads" in options:
        torch.set_num_threads(options.threads)
    output, claim = folders.claim(
        plan.output,
        own="output" in options,
        of=lambda output: {plan.folder(seed, output): plan.config_of(seed) for seed in plan.seeds},
        wait_seconds=_WAIT_SECONDS if options.for_comparison else 0.0,
    )
    with claim:
        if output != plan.output:
            print(f"{plan.output} holds a run with other options, or one in progress: this one goes to {output}")
            plan = plan._replace(output=output)
        run = _TrainRun(plan, options, _can_draw(), MemoryMeter())
        complete = run.complete()
        _print_what_runs(plan)
        results: dict[int, TrainingResult] = {}
        failed = False
        for seed in plan.seeds:
            if len(plan.seeds) > 1:
                print(f"\nseed {seed}", flush=True)
            try:
                results[seed] = run.show(seed, complete[seed]) if seed in complete else run.train(seed)
            except Exception as error:  # the other seeds are not to blame
                if len(plan.seeds) == 1 or (message := _message(error)) is None:
                    raise
                print(f"{PROGRAM}: error: {message} (seed {seed})", file=sys.stderr, flush=True)
                failed = True
                continue
            if not results[seed].completed:
                print(
                    f"{PROGRAM}: interrupted; the files hold what was learned so far, and --resume goes on from it",
                    file=sys.stderr,
                )
                break
        finished = {seed: result for seed, result in results.items() if result.completed}
        if len(plan.seeds) > 1 and finished:
            content = report.summarize_seeds(list(finished), list(finished.values()))
            print(f"\n{report.seeds_table(content)}\n", flush=True)
            print(f"wrote {report.write_metrics(plan.output, content, 'summary.json')}")
    if len(finished) < len(results):
        return EXIT_INTERRUPTED
    return EXIT_FAILURES if failed else 0


def _print_what_runs(plan: _Plan) -> None:
    """What is trained on what, and in how many steps, before the progress on stderr, wherever both go."""
    from .continual.methods import ENOUGH_STEPS, steps_of

    config, scenario, datasets = plan.method_config, plan.scenario, plan.datasets
    cap = "" if (samples := plan.config["samples_per_task"]) is None else f" (at most {samples} per task)"
    kind = "test" if plan.config["validation"] is None else "validation"
    print(
        f"{plan.data_name}: {sum(len(dataset.y_train) for dataset in datasets)} training{cap} and "
        f"{sum(len(dataset.y_test) for dataset in datasets)} {kind} samples "
        f"of {scenario.features} features, {scenario.num_classes} classes; {plan.config['scenario']} scenario of "
        f"{len(scenario)} tasks; method {plan.config['method']}; "
        f"network {'-'.join(map(str, [scenario.features, *plan.config['hidden'], scenario.num_classes]))}"
    )
    if config.takes_steps:
        steps = [config.epochs * steps_of(config, len(experience)) for experience in scenario.train_stream]
        span = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
        epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
        chosen = f" (chosen for {ENOUGH_STEPS} steps or more; --epochs sets it)" if plan.epochs_chosen else ""
        print(f"training: {epochs}{chosen}, {span} steps a task of up to {config.batch_size} samples each")
        if min(steps) < ENOUGH_STEPS // 2:
            print(
                f"few steps: learning a task takes about {ENOUGH_STEPS}; more samples, more --epochs or a smaller "
                "--batch-size give more"
            )
    sys.stdout.flush()


class _TrainRun(NamedTuple):
    """What every seed of a ``train`` shares."""

    plan: _Plan
    options: argparse.Namespace
    picture: bool  # whether one can be drawn
    memory: MemoryMeter

    def complete(self) -> dict[int, dict[str, Any]]:
        """The metrics of the seeds that an earlier process has finished, where this one may go on from it.

        Raises:
            DamagedFileError: what lies there is damaged (but for a comparison, which begins it anew).
            ValueError: it lacks the model asked for.
        """
        from .continual.files import DamagedFileError

        found = {}
        for seed in self.plan.seeds if self.options.resume else ():
            try:
                metrics = _complete(self.plan, seed, self.options)
            except DamagedFileError:
                if not self.options.for_comparison:
                    raise
                continue
            if metrics is not None:
                found[seed] = metrics
        return found

    def show(self, seed: int, metrics: dict[str, Any]) -> TrainingResult:
        """What an earlier process has learned, with its picture if that is missing."""
        from .continual import report

        folder = self.plan.folder(seed)
        print(f"{folder} is complete: nothing is left to train", flush=True)
        result = report.result_of(metrics)
        self._print(result)
        if not (folder / report.PICTURE_FILE).exists():
            self._draw(folder, metrics)
        return result

    def train(self, seed: int) -> TrainingResult:
        """Trains, from where an earlier process ended if it may, prints and writes what was learned."""
        from .continual.files import DamagedFileError

        try:
            return self._train(seed, self.options.resume)
        except DamagedFileError as error:
            if not self.options.for_comparison:
                raise
            _warn(f"{error}; it begins anew")
            return self._train(seed, resume=False)

    def _train(self, seed: int, resume: bool) -> TrainingResult:
        from .continual import report
        from .continual.checkpoint import Checkpoint
        from .continual.files import sweep
        from .continual.progress import NoProgress, default_progress
        from .continual.training import run

        plan, folder, config = self.plan, self.plan.folder(seed), self.plan.config_of(seed)
        checkpoint = Checkpoint(folder, config, resume=resume)
        if resume:
            sweep(folder)
            tasks = checkpoint.tasks_completed()
            print(
                f"nothing to resume in {folder}: starting from the beginning"
                if tasks is None
                else f"resuming {folder} after task {tasks} of {len(plan.scenario)}",
                flush=True,
            )
        else:
            checkpoint.remove()
        method, result = run(
            plan.datasets,
            seed=seed,
            progress=NoProgress() if self.options.quiet else default_progress(),
            memory=self.memory,
            checkpoint=checkpoint,
            **plan.arguments,
        )
        metrics = report.metrics_of(result, config, chance=plan.chance)
        self._print(result)
        unsaved = self._save(method, folder / MODEL_FILE, metrics) if self.options.save_model else None
        print(f"wrote {report.write_metrics(folder, metrics)}")
        self._draw(folder, metrics)
        if unsaved is not None:  # the checkpoint stays, so that --resume comes back to it
            raise unsaved
        if result.completed:
            checkpoint.remove()
        return result

    def _save(self, method: Method, path: Path, metrics: dict[str, Any]) -> OSError | None:
        """Writes the weights; an error is for later, since what was learned is worth more."""
        import torch

        from .continual.files import write_atomically

        buffer = io.BytesIO()
        torch.save({"state_dict": method.model.state_dict(), "config": metrics["config"]}, buffer)
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            return error
        print(f"wrote {path}")
        return None

    def _print(self, result: TrainingResult) -> None:
        from .continual import report
        from .continual.streams import terminal_width

        width = terminal_width(sys.stdout)
        table = report.table(result.accuracy_matrix, result.tasks_completed, width)
        print(f"\n{table}\n\n{report.summary(result, width)}\n", flush=True)

    def _draw(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Draws the picture, if it can be drawn; the numbers are worth having without it."""
        from .continual import report

        if not self.picture:
            return
        try:
            print(f"wrote {report.write_picture(folder, metrics, chance=self.plan.chance)}")
        except Exception as error:  # matplotlib has as many kinds as there are surroundings
            _warn(f"{folder / report.PICTURE_FILE} can't be drawn ({_one_line(error)}); its numbers are written")


def _complete(plan: _Plan, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """The metrics of a finished run of a seed; None if there is something to train.

    Raises:
        ValueError: what lies there is damaged, or lacks the model asked for.
    """
    from .continual import report
    from .continual.checkpoint import Checkpoint

    folder = plan.folder(seed)
    if Checkpoint(folder, plan.config_of(seed)).tasks_completed() is not None:
        return None
    metrics = report.read_metrics(folder)
    if metrics is None or not metrics["completed"]:
        return None
    if options.save_model and not (folder / MODEL_FILE).exists():
        raise ValueError(
            f"save_model: {folder} is complete and its model was not saved; without --resume training begins anew"
        )
    return metrics


def _compare(options: argparse.Namespace) -> int:
    from .continual import folders

    if options.jobs < 1:
        raise ValueError(f"jobs: expected an integer >= 1, got {options.jobs}")
    plans = _plans(options)
    first = next(iter(plans.values()))
    planned = Path(vars(options).get("output", Path("runs") / f"compare-{first.dataset}-{options.scenario}"))
    output, claim = folders.claim(planned, own="output" in options, of=lambda output: {output: None})
    with claim:
        if output != planned:
            print(f"{planned} is in use by another comparison: this one goes to {output}")
        return _compare_in(output, plans, options)


def _compare_in(output: Path, plans: dict[str, _MethodPlan], options: argparse.Namespace) -> int:
    import datetime

    from .continual import compare
    from .continual.streams import readable, terminal_width

    first = next(iter(plans.values()))
    configs = {label: {seed: {**plan.config, "seed": seed} for seed in options.seeds} for label, plan in plans.items()}
    runs = [
        compare.Run(
            label=label,
            seed=seed,
            folder=folder / f"seed{seed}",
            arguments=plan.arguments,
            config=configs[label][seed],
            threads=plan.threads,
        )
        for (label, plan), folder in zip(plans.items(), compare.folders(output, configs), strict=True)
        for seed in options.seeds
    ]
    sizes = " or ".join(dict.fromkeys("-".join(map(str, plan.config["hidden"])) for plan in plans.values()))
    about = {
        "dataset": readable(first.dataset),
        "chance": first.chance,
        "seeds": options.seeds,
        "jobs": options.jobs,
        "facts": [
            f"{options.scenario} scenario",
            f"{first.config['tasks']} tasks",
            f"hidden layers {sizes}",
            f"{len(options.seeds)} seed{'s' if len(options.seeds) > 1 else ''}",
        ],
        "command": options.command_line,
        "processor": _processor(),
    }

    def write() -> list[Path]:
        now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
        return compare.write(output, compare.content_of(runs, {**about, "created": now}))

    def rewrite() -> None:
        try:
            write()
        except OSError as error:  # a page that can't be written stops no run
            _warn(_one_line(error))

    write()  # early, so that what can't be written is known, and there is a page to look at
    done = compare.run_all(runs, options.jobs, compare.default_display(options.quiet), rewrite)
    print(compare.table(compare.content_of(runs, about), terminal_width(sys.stdout)), flush=True)
    written = write()
    print("\n" + "\n".join(f"wrote {path}" for path in written))
    if not done:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FAILURES if any(run.status != "complete" for run in runs) else 0


class _MethodPlan(NamedTuple):
    """What a method of `compare` asks for."""

    dataset: str
    chance: float  # of guessing right
    config: dict[str, Any]
    arguments: list[str]  # of train, but for seed, output and threads
    threads: int | None


def _plans(options: argparse.Namespace) -> dict[str, _MethodPlan]:
    """Every method by its label, checked before the first of them runs.

    Raises:
        ValueError: names the method, and the option, what it got and what it needs.
    """
    from .continual.methods import METHODS

    parser = _Parser(prog=f"{PROGRAM} compare", add_help=False, allow_abbrev=False)
    parser.add_argument("method", choices=tuple(METHODS))
    actions = _add_training_options(parser)
    shared = {action.dest for action in actions} & vars(options).keys()
    plans: dict[str, _MethodPlan] = {}
    for text in options.methods:
        named = re.fullmatch(r"\s*((?:(?!--)[^=])+?)\s*=(.*)", text, re.DOTALL)
        label, method = (named[1], named[2]) if named else (text.strip(), text)
        if label in plans:
            raise ValueError(f"methods: expected a label for each, got {label!r} twice")
        try:
            words = shlex.split(method)
        except ValueError as error:
            raise ValueError(f"methods: expected words as in a shell, got {method!r} ({error})") from None
        own = parser.parse_args(words, argparse.Namespace(**{name: getattr(options, name) for name in shared}))
        threads = getattr(own, "threads", 1 if options.jobs > 1 else None)
        arguments = ["--method", own.method]
        for action in actions:
            if action.dest != "threads" and hasattr(own, action.dest):
                arguments += _as_arguments(action, getattr(own, action.dest))
        own.seeds = options.seeds
        try:
            plan = _plan(own)
        except ValueError as error:
            raise ValueError(f"{error} (method {label!r})") from None
        # the data stay behind: a process that only waits for others needs none
        plans[label] = _MethodPlan(plan.data_name, 1 / plan.scenario.num_classes, plan.config, arguments, threads)
    return plans


def _as_arguments(action: argparse.Action, value: Any) -> list[str]:
    """What to write on a command line for an option to have a value; nothing if it has it anyway."""
    if value == action.default:
        return []
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option if value else action.option_strings[1]]
    if action.nargs == 0:
        return [option]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={value}"]


def _can_draw() -> bool:
    """Numbers are worth having without a picture, so a matplotlib that is missing or broken is said and not fatal."""
    from .continual.report import require_matplotlib

    try:
        require_matplotlib()
    except Exception as error:  # of whatever a broken installation raises
        _warn(f"{_one_line(error)}; going on without the picture")
        return False
    return True


def _info(options: argparse.Namespace) -> int:
    """Print the state of the installation; what can't be found out is said, not raised."""
    import torch

    import engram_kernels as ek

    build = ek.ops.build_info()
    extra = ("scikit-learn", "matplotlib", "tqdm")
    environment = {name: value for name, value in os.environ.items() if name.startswith("ENGRAM_")}
    rows: list[tuple[str, str]] = [
        ("engram-kernels", ek.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", str(torch.__version__)),
        *((name, _version(name) or "not installed") for name in ("numpy", "triton")),
        ("system", f"{platform.platform()} {platform.machine()}"),
        ("processor", _processor()),
        ("instruction set", f"{ek.ops.isa()} in use; available: {', '.join(ek.ops.available_isas())}"),
        ("processor flags", ", ".join(_cpu_features()) or "unknown"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        *((f"build: {name}", str(value)) for name, value in sorted(build.items())),
        ("cuda", _cuda_state()),
        ("nvidia driver", _driver()),
        ("triton state", _triton_state()),
        ("extra 'train'", ", ".join(f"{name} {_version(name) or 'missing'}" for name in extra)),
        (
            "environment",
            " ".join(f"{name}={value}" for name, value in environment.items()) or "no ENGRAM_* set",
        ),
    ]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _processor() -> str:
    return _cpu_info().get("model name") or platform.processor() or "unknown"


def _cpu_features() -> list[str]:
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    known = ("avx2", "avx512f", "avx512bw", "avx512_vpopcntdq", "asimd", "sve")
    return [flag for flag in known if flag in flags]


def _cuda_state() -> str:
    import torch

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    built = f"torch is built with CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return f"{built}; no usable device"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return f"{built}; " + ", ".join(
        f"{device.name} (sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB)" for device in devices
    )


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace").splitlines()[0]
        return first.partition(":")[2].strip()
    except (OSError, IndexError):
        return "not found"


def _triton_state() -> str:
    try:
        import triton
    except ImportError as error:
        return f"can't be imported ({_one_line(error)})"
    try:
        target = triton.runtime.driver.active.get_current_target()
        return f"active for {target.backend} {target.arch}"
    except Exception as error:  # what a missing GPU raises differs between Triton's versions
        return f"imports; no active GPU driver ({_one_line(error)})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
