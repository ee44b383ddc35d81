"""A small convolutional network of signs beside its float twin: the same layers, the same epochs.

    pip install "engram-kernels[train]"
    python examples/convolution.py --dataset fashion-mnist --data-dir data
    python examples/convolution.py --dataset digits

Both have a convolution of real-valued images, then two of signs (of floats), each behind a BatchNorm. Signs take the
place of the twin's ReLUs. Of the binary network every hidden weight learns by MetaplasticAdam.
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
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--channels", type=int, default=64)
options = parser.parse_args()


def network(binary: bool, side: int, classes: int) -> nn.Sequential:
    """Images of side x side -> classes."""
    c, layers = options.channels, [nn.Unflatten(1, (1, side, side))]
    for i, (inputs, outputs, stride) in enumerate([(1, c, 1), (c, c, 2), (c, 2 * c, 2)]):
        settings = dict(stride=stride, padding=1, bias=False)
        if binary:
            layers.append(ek.BinaryEngramConv2d(inputs, outputs, 3, **settings, binary_input=i > 0))
        else:
            layers.append(nn.Conv2d(inputs, outputs, 3, **settings))
        layers.append(nn.BatchNorm2d(outputs))
        layers += [] if binary else [nn.ReLU()]
    layers += [nn.Hardtanh()] if binary else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, classes))


data = load(options.dataset, options.data_dir)
x, y, largest = data.x_train, data.y_train, float(data.x_train.max())
for binary in (False, True):
    torch.manual_seed(0)
    model = network(binary, data.sample_shape[0], len(data.classes))
    optimizer = ek.MetaplasticAdam(model.parameters(), lr=2e-3, metaplasticity=1.35) if binary else None
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = options.epochs * (len(x) // 100)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, cycle_momentum=False)
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
