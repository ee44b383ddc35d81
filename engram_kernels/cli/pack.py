"""`engram-kernels pack`: a trained network as one small file of bits."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ..continual.trained import TrainedModel, model_file
from ..encoding import InputEncoding, SampleStandardisation
from ..packed import pack
from .console import Parser

PACKED_FILE = "packed.safetensors"


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "pack",
        help="a trained network as one small file of bits",
        description="Write the network of a training run as sign bits and thresholds, with its labels: a 32nd of its "
        "weights. The command predict reads the file, and so does engram_kernels.load_packed.",
    )
    parser.add_argument(
        "run_folder", metavar="RUN", help="the folder of a run with --save-model, its model.pt or its checkpoint.pt"
    )
    parser.add_argument("--out", metavar="PATH", default=argparse.SUPPRESS, help=f"default: {PACKED_FILE} in RUN")
    parser.add_argument(
        "--learning", action="store_true", help="keep what a ridge read-out needs to go on learning, K\u00b2 numbers"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Packs; returns the exit code."""
    path = Path(options.run_folder)
    source = model_file(path) if path.is_dir() else path
    out = Path(vars(options).get("out", source.parent / PACKED_FILE))
    trained = TrainedModel.load(source)
    try:
        packed = pack(
            nn.Sequential(*_input_of(trained), trained.model),
            labels=trained.data["labels"],
            learning=options.learning,
        )
    except TypeError as error:
        raise ValueError(f"model: expected a binarized network in {source}, got another one ({error})") from None
    packed.save(out)
    print(f"wrote {out} ({out.stat().st_size:,} bytes; the weights took {source.stat().st_size:,})")
    return 0


def _input_of(trained: TrainedModel) -> list[nn.Module]:
    """What the run did with samples before the network saw them."""
    data = trained.data
    if not data["encoded"]:
        return []
    if data["scale"] is None:
        return [SampleStandardisation(data["features"])]
    encoding = InputEncoding(data["features"])
    encoding.mean, encoding.scale = torch.as_tensor(data["offset"]), torch.as_tensor(data["scale"])
    return [encoding]
