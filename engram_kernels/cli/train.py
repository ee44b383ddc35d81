"""`engram-kernels train`: one method on a stream of tasks."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..continual import folders, plots, processes, report, training
from ..continual.checkpoint import Checkpoint
from ..continual.memory import MemoryMeter
from ..continual.methods import ENOUGH_STEPS, METHODS, Method, steps_of
from ..continual.progress import NoProgress, default_progress
from ..continual.streams import terminal_width
from ..continual.training import TrainingResult
from ..files import DamagedFileError, replacing, sweep
from .console import EXIT_FAILURES, EXIT_INTERRUPTED, PROGRAM, Parser, message_of, one_line, print_error, warn
from .options import Plan, add_training_options, plan_of

_WAIT_SECONDS = 30.0  # for a run of a comparison that was killed to leave its folder to the one that goes on with it


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a network on one task after another and show what it remembers",
        description="Train a binarized network on a stream of tasks; after each, test it on all of them. "
        "Without options: scikit-learn's digits, two new classes per task, method engram. "
        "Writes metrics.json and report.png. "
        "torchrun --nproc-per-node N -m engram_kernels.cli train ... shares each batch among N processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--method", choices=tuple(METHODS), default="engram",
        help="engram: binary, gated, metaplastic; mbnn: metaplastic only; bnn: neither; classifier: counted, binary; "
        "the others: full precision",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, engrams, sample order and tasks")
    group.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", default=argparse.SUPPRESS,
        help="one run per seed; prints mean and deviation too",
    )  # fmt: skip
    add_training_options(parser)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output", metavar="DIR", default=argparse.SUPPRESS,
        help="where the results go (default: runs/DATASET-SCENARIO-METHOD-seedS); with --seeds, in DIR/seedS",
    )  # fmt: skip
    group.add_argument(
        "--resume", action="store_true",
        help="go on after the last finished task of an interrupted or killed run with the same output and options",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains, with the other processes that torchrun has started, if any; returns the exit code."""
    plan = plan_of(options)
    if "threads" in options:
        torch.set_num_threads(options.threads)
    with processes.joined():
        if processes.rank() > 0:
            return _assist(plan)
        code = _lead(plan, options)
        processes.told_by_the_first()  # that nothing is left to train
        return code


def _assist(plan: Plan) -> int:
    """Trains what the first process says; writes and prints nothing."""
    while (run := processes.told_by_the_first()) is not None:
        seed, folder, resume = run
        checkpoint = Checkpoint(folder, plan.config_of(seed), resume=resume)
        training.run(plan.datasets, seed=seed, checkpoint=checkpoint, **plan.arguments)
    return 0


def _lead(plan: Plan, options: argparse.Namespace) -> int:
    """Trains every seed and writes the results; returns the exit code."""
    output, claim = folders.claim(
        plan.output,
        own="output" in options,
        of=lambda output: {plan.folder(seed, output): plan.config_of(seed) for seed in plan.seeds},
        wait_seconds=_WAIT_SECONDS if options.reports is not None else 0.0,
    )
    with claim:
        if output != plan.output:
            print(f"{plan.output} holds a run with other options, or one in progress: this one goes to {output}")
            plan = plan._replace(output=output)
        runs = _Training(plan, options, can_draw(), MemoryMeter())
        complete = runs.complete()
        _print_plan(plan)
        results: dict[int, TrainingResult] = {}
        failed = False
        for seed in plan.seeds:
            if len(plan.seeds) > 1:
                print(f"\nseed {seed}", flush=True)
            try:
                results[seed] = runs.show(seed, complete[seed]) if seed in complete else runs.train(seed)
            except Exception as error:  # of this seed alone: the others are trained
                if len(plan.seeds) == 1 or processes.size() > 1 or (message := message_of(error)) is None:
                    raise
                print_error(f"{message} (seed {seed})")
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


def _print_plan(plan: Plan) -> None:
    """Prints data, network and number of steps, before the progress on stderr, wherever both go."""
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
    if processes.size() > 1:
        print(f"{processes.size()} processes share each batch")
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


class _Training(NamedTuple):
    """All seeds of one ``train``."""

    plan: Plan
    options: argparse.Namespace
    picture: bool  # whether one can be drawn
    memory: MemoryMeter

    def complete(self) -> dict[int, dict[str, Any]]:
        """The metrics of the seeds that an earlier process has finished, where this one may go on from it.

        Raises:
            DamagedFileError: its files are damaged (but for a comparison, which begins it anew).
            ValueError: its model was asked for and not saved.
        """
        found = {}
        for seed in self.plan.seeds if self.options.resume else ():
            try:
                metrics = _complete(self.plan, seed, self.options)
            except DamagedFileError:
                if self.options.reports is None:
                    raise
                continue
            if metrics is not None:
                found[seed] = metrics
        return found

    def show(self, seed: int, metrics: dict[str, Any]) -> TrainingResult:
        """Prints the result of an earlier process, and draws its picture if that is missing."""
        folder = self.plan.folder(seed)
        print(f"{folder} is complete: nothing is left to train", flush=True)
        result = report.result_of(metrics)
        self._print(result)
        if not (folder / plots.PICTURE_FILE).exists():
            self._draw(folder, metrics)
        return result

    def train(self, seed: int) -> TrainingResult:
        """Trains, from where an earlier process ended if it may, prints and writes the result."""
        try:
            return self._train(seed, self.options.resume)
        except DamagedFileError as error:
            if self.options.reports is None:
                raise
            warn(f"{error}; it begins anew")
            return self._train(seed, resume=False)

    def _train(self, seed: int, resume: bool) -> TrainingResult:
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
        processes.told_by_the_first((seed, folder, resume))
        method, result = training.run(
            plan.datasets,
            seed=seed,
            progress=self.options.reports or (NoProgress() if self.options.quiet else default_progress()),
            memory=self.memory,
            checkpoint=checkpoint,
            **plan.arguments,
        )
        metrics = report.metrics_of(result, config, chance=plan.chance)
        self._print(result)
        unsaved = self._save(method, folder, metrics, result.data) if self.options.save_model else None
        print(f"wrote {report.write_metrics(folder, metrics)}")
        self._draw(folder, metrics)
        if unsaved is not None:  # the checkpoint stays, so that --resume comes back to it
            raise unsaved
        if result.completed:
            checkpoint.remove()
        return result

    def _save(self, method: Method, folder: Path, metrics: dict[str, Any], data: dict[str, Any]) -> OSError | None:
        """Writes the model; an error is raised later, since the numbers are worth more."""
        path = folder / method.config.model_file
        try:
            with replacing(path) as partial:
                method.save_model(partial, metrics["config"], data)
        except OSError as error:
            return error
        print(f"wrote {path}, the model: {PROGRAM} predict {shlex.quote(str(path))} FILE")
        return None

    def _print(self, result: TrainingResult) -> None:
        width = terminal_width(sys.stdout)
        table = report.table(result.accuracy_matrix, result.tasks_completed, width)
        print(f"\n{table}\n\n{report.summary(result, width)}\n", flush=True)

    def _draw(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Draws the picture, if it can be drawn; the numbers are worth having without it."""
        if not self.picture:
            return
        try:
            print(f"wrote {plots.write_picture(folder, metrics, chance=self.plan.chance)}")
        except Exception as error:  # matplotlib has as many kinds as there are surroundings
            warn(f"{folder / plots.PICTURE_FILE} can't be drawn ({one_line(error)}); its numbers are written")


def _complete(plan: Plan, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """The metrics of a finished run of a seed; None if there is something to train.

    Raises:
        ValueError: its files are damaged, or lack the model asked for.
    """
    folder = plan.folder(seed)
    if Checkpoint(folder, plan.config_of(seed)).tasks_completed() is not None:
        return None
    metrics = report.read_metrics(folder)
    if metrics is None or not metrics["completed"]:
        return None
    if options.save_model and not (folder / plan.method_config.model_file).exists():
        raise ValueError(
            f"save_model: {folder} is complete and its model was not saved; without --resume training begins anew"
        )
    return metrics


def can_draw() -> bool:
    """Whether matplotlib works; a warning says why not, since the numbers are worth having without a picture."""
    try:
        plots.require_matplotlib()
    except Exception as error:  # of whatever a broken installation raises
        warn(f"{one_line(error)}; going on without the picture")
        return False
    return True
