"""A small convolutional network of signs beside its float twin: the same layers, the same epochs.

    pip install "engram-kernels[train]"
    python examples/convolution.py --dataset fashion-mnist --data-dir data
    python examples/convolution.py --dataset digits

Both have a convolution of real-valued images and two more, each with a BatchNorm behind it. Between them the binary
network has signs where the twin has ReLUs; its hidden weights learn by MetaplasticAdam.
"""

import argparse
import time

import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.continual import load

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dataset", default="digits")
parser.add_argument("--data-dir", default="data")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--channels", type=int, default=32)
options = parser.parse_args()


def network(binary: bool, side: int, classes: int) -> nn.Sequential:
    """Images of side x side -> classes."""
    c, layers = options.channels, [nn.Unflatten(1, (1, side, side))]
    for i, (inputs, outputs, stride) in enumerate([(1, c, 1), (c, c, 2), (c, 2 * c, 2)]):
        layer, settings = (ek.BinaryEngramConv2d, {"binary_input": i > 0}) if binary else (nn.Conv2d, {})
        layers += [layer(inputs, outputs, 3, stride, padding=1, bias=False, **settings), nn.BatchNorm2d(outputs)]
        layers += [] if binary and i < 2 else [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, classes))


data = load(options.dataset, options.data_dir)
x, y, largest = data.x_train, data.y_train, float(data.x_train.max())
for binary in (False, True):
    torch.manual_seed(0)
    model = network(binary, data.sample_shape[0], len(data.classes))
    optimizer = (ek.MetaplasticAdam if binary else torch.optim.Adam)(model.parameters())
    steps, largest_step = options.epochs * (len(x) // 100), 1e-2 if binary else 5e-3
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, largest_step, total_steps=steps, cycle_momentum=False)
    start = time.perf_counter()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x))[: len(x) // 100 * 100].split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows] / largest), y[rows]).backward()
            optimizer.step()
            rate.step()
    seconds, model = time.perf_counter() - start, model.eval()
    with torch.no_grad():
        answers = torch.cat([model(images / largest).argmax(1) for images in data.x_test.split(500)])
    print(f"{'signs' if binary else 'floats'}: {(answers == data.y_test).float().mean():.1%} right, {seconds:.0f} s")
