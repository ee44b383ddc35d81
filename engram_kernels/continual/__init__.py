"""Continual learning: data, scenarios, methods, training, metrics, report. `run` does it all."""

from .data import Dataset, hold_out, load
from .methods import METHODS, MethodConfig, TrainingError, method_config
from .metrics import average_accuracy, backward_transfer, forgetting, forward_transfer, task_forgetting
from .scenarios import (
    Experience,
    Joint,
    Permutation,
    Rotation,
    Scenario,
    class_scenario,
    domain_scenario,
    make_scenario,
    permuted_scenario,
    rotated_scenario,
)
from .training import TrainingResult, evaluate, run, train

__all__ = [
    "METHODS",
    "Dataset",
    "Experience",
    "Joint",
    "MethodConfig",
    "Permutation",
    "Rotation",
    "Scenario",
    "TrainingError",
    "TrainingResult",
    "average_accuracy",
    "backward_transfer",
    "class_scenario",
    "domain_scenario",
    "evaluate",
    "forgetting",
    "forward_transfer",
    "hold_out",
    "load",
    "make_scenario",
    "method_config",
    "permuted_scenario",
    "rotated_scenario",
    "run",
    "task_forgetting",
    "train",
]
