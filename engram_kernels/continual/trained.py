"""Models of training runs, read back to predict the labels of new samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..files import DamagedFileError, reason
from .checkpoint import CHECKPOINT_FILE, check_archive
from .data import as_samples
from .methods import METHODS, build, config_of
from .scenarios import new_samples
from .training import EVALUATION_BATCH


class TrainedModel:
    """The model of a training run, with the labels that its data set has.

    Args:
        model: features or inputs to scores of the classes.
        data: that of `Scenario.data`.
    """

    def __init__(self, model: nn.Module, data: dict[str, Any]) -> None:
        self.model, self.data = model.eval(), data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainedModel:
        """Reads ``model.pt``, or a run's ``checkpoint.pt``, whose model has learned the tasks so far.

        Nothing in the file is unpickled but tensors and plain values.

        Raises:
            DamagedFileError: the file is none of these, or damaged.
            OSError: it can't be read.
        """
        path = Path(path)
        try:
            check_archive(path)
            state = torch.load(path, weights_only=True, map_location="cpu")
            options = state["options"] if "options" in state else state["config"]
            weights = state["method"]["model"] if "method" in state else state["state_dict"]
            data = state["data"]
            # the widths of a network's input and output follow from the samples that it was trained on
            inputs = new_samples(torch.zeros(1, data["features"]), data)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                method = build(
                    options["method"], config_of(options), inputs.features, options["hidden"], len(data["labels"])
                )
            method.model.load_state_dict(weights)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zipfile, pickle and torch have many kinds of errors for damaged files
            raise DamagedFileError(
                f"model: expected the model of a training run in {path}, got a damaged file or one of another version "
                f"({type(error).__name__}: {reason(error).split('. ')[0]})"
            ) from None
        return cls(method.model, data)

    @torch.no_grad()
    def predict(self, samples: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The labels (n,) of samples, real numbers (n, ...).

        Raises: ValueError for samples of another kind or size.
        """
        experience = new_samples(as_samples("samples", samples), self.data)
        classes = [self.model(x).argmax(dim=1) for x, _ in experience.batches(EVALUATION_BATCH)]
        return np.asarray(self.data["labels"])[torch.cat(classes).numpy()]


def model_file(folder: Path) -> Path:
    """The newest file in the folder of a run that holds its model.

    Raises: FileNotFoundError if there is none.
    """
    names = dict.fromkeys([*(preset.config.model_file for preset in METHODS.values()), CHECKPOINT_FILE])
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"model: expected {' or '.join(names)} in {folder}, got none of them; train --save-model writes the model"
        )
    return max(found, key=lambda path: path.stat().st_mtime)
