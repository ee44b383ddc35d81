"""Peak resident memory of a training step in a process of its own: ``python memory_probe.py NAME HIDDEN``.

What counts is everything that the process comes to hold above what it held after its imports and two steps of a network
of 16 hidden units, which load the compiler, the thread pools and the libraries' workspaces: weights, their signs and
copies, moments, gradients, activations, temporaries, and the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch._inductor.compile_fx  # what the compiled baseline imports is nobody's memory
from measure import peak_bytes_of, torch_threads
from steps import BATCH, NAMES, batch, make_step, sizes_of

import engram_kernels as ek

STEPS = 3  # the first makes the moments; from the second on nothing new is made


def peak_bytes(name: str, hidden: int, device: str = "cpu", samples: int = BATCH, **options) -> int | None:
    """Of so many steps and the building of the network, in this process."""

    def train(size: int, steps: int):
        step = make_step(name, sizes_of(size), device=device, **options)  # initialised in place, as users do
        for _ in range(steps):
            step(*batch(device, samples))
        return step

    train(16, 2)
    return peak_bytes_of(lambda: train(hidden, STEPS), device)


def peak_bytes_in_fresh_process(
    name: str, hidden: int, threads: int = 2, device: str = "cpu", rate: float | None = None, samples: int = BATCH
) -> int | None:
    """The same, measured by this file as a program. Raises: RuntimeError with the last line that it wrote."""
    command = [sys.executable, __file__, name, str(hidden), "--threads", str(threads), "--device", device]
    command += ["--samples", str(samples)] + ([] if rate is None else ["--rate", str(rate)])
    paths = [str(Path(ek.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"memory of {name}, H = {hidden}: {lines[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("hidden", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--samples", type=int, default=BATCH)
    arguments = parser.parse_args()
    options = {} if arguments.rate is None else {"rate": arguments.rate}
    with torch_threads(arguments.threads):
        torch.manual_seed(0)
        print(json.dumps(peak_bytes(arguments.name, arguments.hidden, arguments.device, arguments.samples, **options)))


if __name__ == "__main__":
    main()
