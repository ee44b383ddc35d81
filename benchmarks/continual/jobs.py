"""Runs training commands, each in a process of its own, and keeps what they measured.

A job is a label and the options of one ``engram-kernels train``; it is run once for every seed. Its results are added
to a JSON file as they come, so an interrupted run goes on where it was, and whoever reads a number finds its command.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
KEPT = (
    "average_accuracy", "backward_transfer", "forgetting", "step_milliseconds", "steps", "peak_memory_bytes",
    "train_seconds", "threads", "isa", "versions",
)  # fmt: skip
FULL_MATRIX = 10  # tasks; of longer streams the last row and the diagonal are kept


class Job(NamedTuple):
    """A row of a table: its label, and the options that make it."""

    label: str
    options: str


def run_jobs(
    jobs: Iterable[Job], seeds: Sequence[int], path: Path, *, data_dir: str, processes: int = 1, threads: int = 1
) -> list[dict[str, Any]]:
    """Runs what ``path`` does not hold yet; returns all its rows for these jobs and seeds.

    A job that fails is kept with its message, and is tried again the next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    wanted = [(job, seed) for seed in seeds for job in jobs]
    commands = {command(job.options, seed) for job, seed in wanted}
    if len(commands) != len(wanted):
        raise ValueError("jobs: expected different options, got two jobs with the same ones")
    done = {row["command"] for row in rows if "error" not in row}
    rows = [row for row in rows if "error" not in row or row["command"] not in commands]
    lock = threading.Lock()
    bar = tqdm(total=len(wanted), initial=len(done & commands), unit="run", desc=path.stem)

    def work(job: Job, seed: int) -> None:
        row = {"label": job.label, "seed": seed, "command": command(job.options, seed)}
        row |= _run(row["command"], data_dir, threads)
        with lock:
            rows.append(row)
            path.write_text(json.dumps(rows, indent=0, allow_nan=False) + "\n")
            bar.update()
            outcome = row.get("error") or f"{100 * row['average_accuracy']:.2f} %"
            bar.write(f"{job.label}, seed {seed}: {outcome}")

    with ThreadPoolExecutor(processes) as pool:
        list(
            pool.map(
                lambda each: work(*each), [each for each in wanted if command(each[0].options, each[1]) not in done]
            )
        )
    bar.close()
    return [row for row in rows if row["command"] in commands]


def command(options: str, seed: int) -> str:
    """What a reader types to repeat a run; ``--data-dir`` is theirs to add."""
    return f"engram-kernels train {' '.join(shlex.split(options))} --seed {seed}"


def _run(line: str, data_dir: str, threads: int) -> dict[str, Any]:
    arguments = shlex.split(line)[1:]
    with tempfile.TemporaryDirectory() as output:
        outcome = subprocess.run(
            [sys.executable, "-m", "engram_kernels.cli", *arguments, "--quiet", "--threads", str(threads),
             "--output", output, "--data-dir", data_dir],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        if outcome.returncode:
            return {"error": outcome.stderr.strip().splitlines()[-1] if outcome.stderr.strip() else "failed"}
        metrics = json.loads((Path(output) / "metrics.json").read_text())
    matrix = [[None if a is None else round(a, 4) for a in row] for row in metrics["accuracy_matrix"]]
    accuracy: dict[str, Any] = {"last_row": matrix[-1], "diagonal": [row[i] for i, row in enumerate(matrix)]}
    if len(matrix) <= FULL_MATRIX:
        accuracy = {"accuracy_matrix": matrix}
    return {name: metrics[name] for name in KEPT} | accuracy
