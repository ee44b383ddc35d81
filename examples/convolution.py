"""A small convolutional network of signs beside its float twin: the same layers, the same epochs.

    pip install "engram-kernels[train]"
    python examples/convolution.py --dataset fashion-mnist --data-dir data --epochs 3
    python examples/convolution.py --dataset digits

The twin has ReLUs where the network has signs. The first layer takes the images as they come, the last one is real in
both; all before it is packed into bits at the end, and predicts the same.
"""

import argparse
import time
from functools import partial

import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.continual import load

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dataset", default="digits")
parser.add_argument("--data-dir", help="default: $ENGRAM_DATA_DIR, else data")
parser.add_argument("--samples", type=int, help="of the training data; default: all")
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()


def network(binary: bool, side: int, classes: int) -> nn.Sequential:
    """Images of side x side -> classes."""
    convolution, linear = (ek.BinaryEngramConv2d, ek.BinaryEngramLinear) if binary else (nn.Conv2d, nn.Linear)
    layers, real = [nn.Unflatten(1, (1, side, side))], {"binary_input": False} if binary else {}
    for inputs, outputs, size, settings in [(1, 32, 5, real), (32, 32, 3, {}), (32, 64, 3, {})]:
        layers += [convolution(inputs, outputs, size, padding=size // 2, bias=False, **settings)]
        pool, activation = nn.MaxPool2d(2) if size == 3 else nn.Identity(), nn.Identity() if binary else nn.ReLU()
        layers += [pool, nn.BatchNorm2d(outputs), activation]
    layers += [nn.Flatten(), linear(64 * (side // 4) ** 2, 512, bias=False), nn.BatchNorm1d(512)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(512, classes))


data = load(options.dataset, options.data_dir)
x, y, largest = data.x_train[: options.samples], data.y_train[: options.samples], float(data.x_train.max())
for binary in (False, True):
    torch.manual_seed(0)
    model = network(binary, data.sample_shape[0], len(data.classes))
    optimizer = (partial(ek.MetaplasticAdam, metaplasticity=0.0) if binary else torch.optim.Adam)(model.parameters())
    steps, step, start = options.epochs * (len(x) // 100), 1e-2 if binary else 5e-3, time.perf_counter()
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, step, total_steps=steps, cycle_momentum=False)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x))[: len(x) // 100 * 100].split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows] if binary else x[rows] / largest), y[rows]).backward()
            optimizer.step()
            rate.step()
    seconds, model, test = time.perf_counter() - start, model.eval(), data.x_test if binary else data.x_test / largest
    with torch.no_grad():
        answers = torch.cat([model(images).argmax(1) for images in test.split(500)])
    print(f"{'signs' if binary else 'floats'}: {(answers == data.y_test).float().mean():.1%} right, {seconds:.0f} s")
print(f"packed: {(model[-2:](ek.pack(model[:-2])(test)).argmax(1) == answers).float().mean():.1%} as the model says")
