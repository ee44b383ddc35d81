"""Continual learning: data, scenarios, methods, training, metrics, report. `run` does it all."""

from .data import Dataset, load
from .methods import METHODS, MethodConfig, TrainingError, method_config
from .metrics import average_accuracy, backward_transfer, forgetting
from .scenarios import Experience, Scenario, class_scenario, make_scenario, permuted_scenario
from .training import TrainingResult, evaluate, run, train

__all__ = [
    "METHODS",
    "Dataset",
    "Experience",
    "MethodConfig",
    "Scenario",
    "TrainingError",
    "TrainingResult",
    "average_accuracy",
    "backward_transfer",
    "class_scenario",
    "evaluate",
    "forgetting",
    "load",
    "make_scenario",
    "method_config",
    "permuted_scenario",
    "run",
    "train",
]
