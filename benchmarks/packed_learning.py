"""What 8-bit state costs a dendritic read-out that learns in a packed model: MNIST, two digits at a time, one pass."""

import argparse
import statistics

import torch

import engram_kernels as ek
from engram_kernels.continual import class_scenario, load


def train(seed, dataset, units):
    """Accuracies of the read-out with float32 state and of its packed twin, which sees the same batches."""
    torch.manual_seed(seed)
    scenario = class_scenario(load(dataset))
    batches = [list(task.batches(100)) for task in scenario.train_stream]
    first = batches[0][0][0].flatten(1)
    model = ek.EngramMLP((first.shape[1], units, 10), readout="dendritic")
    model.encoding(first.float())  # the mean and the deviation of the inputs
    model.eval()
    optimizer = ek.MetaplasticAdam([model.readout.weight])
    packed = ek.pack(model, learning=optimizer)
    for x, y in (batch for of_task in batches for batch in of_task):
        model.readout.train()
        with torch.no_grad():
            features = model.features(x)
        optimizer.zero_grad()
        model.readout.local_loss(model.readout.activations(features), y).backward()
        optimizer.step()
        packed.partial_fit(x, y)
    model.eval()
    test = [batch for task in scenario.test_stream for batch in task.batches(500)]
    return tuple(torch.cat([m(x).argmax(1) == y for x, y in test]).float().mean().item() for m in (model, packed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--units", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results = [train(seed, options.dataset, options.units) for seed in range(options.seeds)]
    for name, accuracies in zip(("float32 state", "8-bit state"), zip(*results, strict=True), strict=True):
        each = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
        print(f"{name}: {statistics.mean(accuracies):.2%} ({each})")
