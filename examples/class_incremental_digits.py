"""Learn scikit-learn's digits two classes at a time, with each of the three read-outs; keep no sample.

    pip install "engram-kernels[train]"
    python examples/class_incremental_digits.py

The hidden layer is binary, random and never trained. A read-out learns which hidden units each class excites most. The
table shows, after every task, the accuracy on the test digits of all classes seen so far.
"""

import torch
from torch import Tensor, nn

import engram_kernels as ek
from engram_kernels.continual import class_scenario, evaluate, load

HIDDEN, CLASSES = 2048, 10


def network(readout: nn.Module) -> ek.EngramMLP:
    """64 pixels -> 2048 fixed binary units -> a read-out for 10 classes."""
    return ek.EngramMLP((64, HIDDEN, CLASSES), train_hidden=False, balanced=True, readout=readout)


def count(model: ek.EngramMLP, x: Tensor, y: Tensor) -> None:
    """One batch for a counted read-out: there is nothing to optimise, and the order of the batches does not matter."""
    model.readout.observe(model.features(x), y)


class Trainer:
    """One batch for a trained read-out: the local loss moves segments of the batch's classes and no others."""

    def __init__(self, model: ek.EngramMLP) -> None:
        self.optimizer = ek.MetaplasticAdam(model.readout.parameters(), lr=5e-3, metaplasticity=5.0)

    def __call__(self, model: ek.EngramMLP, x: Tensor, y: Tensor) -> None:
        """Takes one step."""
        loss = model.readout.local_loss(model.readout.activations(model.features(x)), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


torch.manual_seed(0)
scenario = class_scenario(load("digits"))
engram = ek.StochasticEngram(rate=0.1, temperature=0)  # the 10 % most excitable units, without noise
ridge, prototypes = (network(kind(HIDDEN, CLASSES, engram=engram)) for kind in (ek.RidgeReadout, ek.PrototypeReadout))
dendritic = network(ek.DendriticReadout(HIDDEN, CLASSES, segments=20, engram=engram))
learners = {"ridge": (ridge, count, 1), "prototypes": (prototypes, count, 1)}
learners["dendritic"] = (dendritic, Trainer(dendritic), 5)  # the last number: passes over each task

for name, (model, learn, epochs) in learners.items():
    for task, experience in enumerate(scenario.train_stream):
        model.train()
        for _ in range(epochs):
            for x, y in experience.batches(16, torch.Generator().manual_seed(task)):
                learn(model, x, y)
        seen = [evaluate(model.eval(), test) for test in scenario.test_stream[: task + 1]]
        print(f"{name:<12} after task {task + 1}: {sum(seen) / len(seen):6.1%}")
