"""Learn scikit-learn's digits two classes at a time, with each of the three read-outs; keep no sample.

    pip install "engram-kernels[train]"
    python examples/class_incremental_digits.py

The hidden layer is binary, random and never trained. A read-out learns which hidden units each class excites most. The
table shows, after every task, the accuracy on the test digits of all classes seen so far.
"""

import torch

import engram_kernels as ek
from engram_kernels.continual import class_scenario, evaluate, load

scenario = class_scenario(load("digits"))
for readout, epochs in (("ridge", 1), ("prototype", 1), ("dendritic", 5)):
    torch.manual_seed(0)
    model = ek.EngramMLP((64, 2048, 10), readout=readout)
    trained = readout == "dendritic"  # the others count: nothing to optimise, and the order of samples does not matter
    optimizer = ek.MetaplasticAdam(model.parameters(), lr=5e-3, metaplasticity=5.0) if trained else None
    for task, experience in enumerate(scenario.train_stream):
        model.train()
        for _ in range(epochs):
            for x, y in experience.batches(16, torch.Generator().manual_seed(task)):
                if optimizer is None:
                    model.observe(x, y)
                else:  # the loss moves segments of the batch's classes and no others
                    optimizer.zero_grad()
                    model.loss(x, y).backward()
                    optimizer.step()
        seen = [evaluate(model.eval(), test) for test in scenario.test_stream[: task + 1]]
        print(f"{readout:<10} after task {task + 1}: {sum(seen) / len(seen):6.1%}")
