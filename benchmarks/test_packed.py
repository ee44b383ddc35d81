"""Prediction by packed networks: 784-2048-2048-10 beside torch float32, torch dynamic int8 and ONNX Runtime int8.

And three convolutions and two layers on images of 28x28, beside torch float32.
"""

import functools
import io

import pytest
import torch
from torch import nn

import engram_kernels as ek


def float_network():
    """The float twin: batch normalisation folded into its layers, as one would deploy it."""
    layers = [nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)]
    return nn.Sequential(*layers).eval()


def packed_network(engram):
    sizes = (784, 2048, 2048, 10)
    return ek.pack(ek.EngramMLP(sizes, readout="linear", engram=engram))


def onnx_int8(threads, folder):
    """ONNX Runtime's dynamic quantisation of the float twin."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    exported = io.BytesIO()
    torch.onnx.export(
        float_network(), (torch.zeros(1, 784),), exported, dynamo=False, input_names=["x"],
        dynamic_axes={"x": {0: "samples"}},
    )  # fmt: skip
    (folder / "float.onnx").write_bytes(exported.getvalue())
    quantization.quantize_dynamic(folder / "float.onnx", folder / "int8.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # waiting threads would take the processor from the others that are measured in turns
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(folder / "int8.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("engram", [None, 0.1], ids=["no engram", "engram 0.1"])
@pytest.mark.parametrize("batch", [1, 256])
def test_packed_prediction(side_by_side, target, threads, batch, engram, tmp_path):
    if target.device != "cpu":
        pytest.skip("packed networks are measured on the CPU")
    x = torch.randint(256, (batch, 784), dtype=torch.uint8)
    floats = x.float() / 255
    twin = float_network()
    int8 = torch.ao.quantization.quantize_dynamic(float_network(), {nn.Linear}, dtype=torch.qint8)
    session = onnx_int8(threads, tmp_path)

    def call(model, x):
        with torch.inference_mode():
            return model(x)

    side_by_side(
        f"predict 784-2048-2048-10, batch {batch}" + ("" if engram is None else f", engram rate {engram}"),
        target,
        functools.partial(call, packed_network(engram), x),
        {
            "torch float32": functools.partial(call, twin, floats),
            "torch dynamic int8": functools.partial(call, int8, floats),
            "ONNX Runtime int8": functools.partial(session.run, None, {"x": floats.numpy()}),
        },
        peak=False,
    )


def convolutions(channels, binary):
    """Three convolutions and two layers; the float twin has its batch normalisation folded in, as above."""
    convolution, linear = (ek.BinaryEngramConv2d, ek.BinaryEngramLinear) if binary else (nn.Conv2d, nn.Linear)

    def normalised(norm, units):
        return norm(units) if binary else nn.ReLU()

    hidden, c = 512, channels
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        convolution(1, c, 5, padding=2, **({"binary_input": False} if binary else {})),
        normalised(nn.BatchNorm2d, c),
        convolution(c, c, 3, padding=1),
        nn.MaxPool2d(2),
        normalised(nn.BatchNorm2d, c),
        convolution(c, 2 * c, 3, padding=1),
        nn.MaxPool2d(2),
        normalised(nn.BatchNorm2d, 2 * c),
        nn.Flatten(),
        linear(2 * c * 49, hidden),
        normalised(nn.BatchNorm1d, hidden),
        linear(hidden, 10),
    ).eval()


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("channels", [32, 64])
def test_packed_convolutions(side_by_side, target, threads, channels, batch):
    if target.device != "cpu":
        pytest.skip("packed networks are measured on the CPU")
    x = torch.randint(256, (batch, 784), dtype=torch.uint8)
    floats = x.float() / 255
    twin = convolutions(channels, binary=False).to(memory_format=torch.channels_last)
    packed = ek.pack(convolutions(channels, binary=True))

    def call(model, x):
        with torch.inference_mode():
            return model(x)

    side_by_side(
        f"predict convolutions of {channels}, {channels}, {2 * channels} channels, batch {batch}",
        target,
        functools.partial(call, packed, x),
        {"torch float32": functools.partial(call, twin, floats)},
        peak=False,
    )
