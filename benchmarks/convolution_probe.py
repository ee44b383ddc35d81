"""Peak resident memory of a training step of convolutions, in a process of its own.

A stack of 3x3 convolutions, each on the outputs of the one before, as between the norms of a residual network. What
counts is what the process comes to hold above what it held after a step of a stack of 8 channels, which loads the
libraries' workspaces: filters, the batch, activations and what is kept of them, gradients, temporaries. With
``--update`` also the moments of an optimizer, which updates: torch's Adam, or MetaplasticAdam with moments of 8 bits
within the backward pass. Run as ``python convolution_probe.py KIND CHANNELS SIZE LAYERS [--update]``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from measure import peak_bytes_of, torch_threads
from torch import nn

import engram_kernels as ek

KINDS = {"signs": ek.BinaryEngramConv2d, "floats": nn.Conv2d}
OPTIMIZERS = {
    "signs": functools.partial(ek.MetaplasticAdam, state_dtype=torch.int8, fuse_backward=True),
    "floats": torch.optim.Adam,
}
BATCH = 32


def train(kind: str, channels: int, size: int, layers: int, update: bool) -> None:
    """A step: forward, backward, perhaps an update. Floats as torch runs them fastest, channels last."""
    stack = nn.Sequential(*(KINDS[kind](channels, channels, 3, padding=1, bias=False) for _ in range(layers)))
    stack = stack.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, channels, size, size).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[kind](stack.parameters()) if update else None
    stack(x.requires_grad_()).square().mean().backward()
    if optimizer is not None:
        optimizer.step()


def peak_bytes_in_fresh_process(kind: str, channels: int, size: int, layers: int, update: bool = False) -> int | None:
    """Measured by this file as a program. Raises: CalledProcessError.

    What is freed goes back to the system: else small tensors that are kept lie in the gaps between large ones, and the
    gaps count.
    """
    command = [sys.executable, __file__, kind, *map(str, (channels, size, layers)), *(["--update"] if update else [])]
    paths = [str(Path(ek.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings)
    return json.loads(done.stdout)


def main() -> None:
    """Prints the bytes, or null where nothing tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    for name in ("channels", "size", "layers"):
        parser.add_argument(name, type=int)
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    with torch_threads(2):
        train(arguments.kind, 8, 8, 2, arguments.update)
        sizes = (arguments.channels, arguments.size, arguments.layers, arguments.update)
        print(json.dumps(peak_bytes_of(lambda: train(arguments.kind, *sizes))))


if __name__ == "__main__":
    main()
