"""Train an engram network with Avalanche's Naive strategy on SplitMNIST: no replay, no penalty, one pass.

    pip install engram-kernels avalanche-lib
    python examples/avalanche_naive.py DIR

DIR is where torchvision keeps MNIST, or downloads it to. The network is that of `engram-kernels train --dataset mnist
--readout dendritic --hidden 2048`: fixed random binary units, and 100 binary segments a class that a local loss trains.
"""

import sys

import torch
from avalanche.benchmarks.classic import SplitMNIST
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin

import engram_kernels as ek


class SegmentNetwork(ek.EngramMLP):
    """An `EngramMLP` that gives the activations of its segments in training, for the local loss, and logits at test."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (M, 1, 28, 28) -> activations (M, classes, segments) in training, logits (M, classes) at test."""
        features = self.features(x.flatten(1))
        return self.readout.activations(features) if self.training else self.readout(features)


def loss_of(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The local loss in training; Avalanche asks for a loss at test too, where cross-entropy will do."""
    return readout.local_loss(output, y) if output.dim() == 3 else torch.nn.functional.cross_entropy(output, y)


torch.manual_seed(0)
benchmark = SplitMNIST(5, fixed_class_order=range(10), dataset_root=sys.argv[1])
readout = ek.DendriticReadout(2048, 10, segments=100, engram=ek.StochasticEngram(rate=0.1, temperature=0))
model = SegmentNetwork((784, 2048, 10), readout=readout)
strategy = Naive(
    model=model,
    optimizer=ek.MetaplasticAdam(readout.parameters(), lr=5e-3, metaplasticity=5.0),
    criterion=loss_of,
    train_mb_size=64,
    train_epochs=1,
    eval_mb_size=1000,
    evaluator=EvaluationPlugin(accuracy_metrics(experience=True, stream=True)),
)
for experience in benchmark.train_stream:
    strategy.train(experience)
results = strategy.eval(benchmark.test_stream)
print(f"average accuracy {results['Top1_Acc_Stream/eval_phase/test_stream/Task000']:.1%}")
