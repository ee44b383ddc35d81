"""Peak resident memory of a training step of convolutions, in a process of its own: ``python convolution_probe.py KIND``.

A stack of 3x3 convolutions, each on the outputs of the one before, as between the norms of a residual network. What
counts is what the process comes to hold above what it held after a step of a stack of 8 channels, which loads the
libraries' workspaces: filters, the batch, activations and what is kept of them, gradients, temporaries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from measure import peak_bytes_of, torch_threads
from torch import nn

import engram_kernels as ek

KINDS = {"signs": ek.BinaryEngramConv2d, "floats": nn.Conv2d}
BATCH = 32


def train(kind: str, channels: int, size: int, layers: int) -> None:
    """A step: forward, backward, no update. Floats as torch runs them fastest, channels last."""
    stack = nn.Sequential(*(KINDS[kind](channels, channels, 3, padding=1, bias=False) for _ in range(layers)))
    stack = stack.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, channels, size, size).to(memory_format=torch.channels_last)
    stack(x.requires_grad_()).square().mean().backward()


def peak_bytes_in_fresh_process(kind: str, channels: int, size: int, layers: int) -> int | None:
    """Measured by this file as a program. Raises: CalledProcessError."""
    command = [sys.executable, __file__, kind, *map(str, (channels, size, layers))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Prints the bytes, or null where nothing tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    for name in ("channels", "size", "layers"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    with torch_threads(2):
        train(arguments.kind, 8, 8, 2)
        sizes = (arguments.channels, arguments.size, arguments.layers)
        print(json.dumps(peak_bytes_of(lambda: train(arguments.kind, *sizes))))


if __name__ == "__main__":
    main()
