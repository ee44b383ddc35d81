"""Put binary layers into a network of your own, and see what metaplasticity keeps.

    pip install "engram-kernels[train]"
    python examples/own_network.py

Five tasks show scikit-learn's digits, each with the pixels in another order. The same network learns them one after the
other twice: with plain Adam (metaplasticity 0), and with hidden weights that resist being overwritten. Step size and
metaplasticity were chosen by looking at these very numbers, so they show the effect and rank nothing: a smaller step
size alone keeps more, too.
"""

import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.continual import evaluate, load, permuted_scenario

UNITS, RATE, EPOCHS = 1024, 0.1, 3


def network() -> nn.Sequential:
    """64 real pixels -> 1024 binary units, of which each sample recruits a tenth -> 10 classes."""
    engram = ek.StochasticEngram(rate=RATE, temperature=0.1)
    return nn.Sequential(
        ek.BinaryEngramLinear(64, UNITS, bias=False, binary_input=False),  # the first layer takes real inputs
        nn.LayerNorm(UNITS, elementwise_affine=False),
        ek.BinaryEngramLinear(UNITS, 10, bias=False, engram=engram, ste_window=float("inf")),
    )


scenario = permuted_scenario(load("digits"), tasks=5)
for metaplasticity in (0.0, 30.0):
    torch.manual_seed(0)
    model = network()
    optimizer = ek.MetaplasticAdam(model.parameters(), lr=7e-4, metaplasticity=metaplasticity)
    order = torch.Generator().manual_seed(0)
    for experience in scenario.train_stream:
        model.train()
        for _ in range(EPOCHS):
            for x, y in experience.batches(16, order):
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    accuracies = [evaluate(model.eval(), experience) for experience in scenario.test_stream]
    each = " ".join(f"{accuracy:4.0%}" for accuracy in accuracies)
    print(f"metaplasticity {metaplasticity:4.0f}: mean {sum(accuracies) / 5:.1%}, tasks in order {each}")
