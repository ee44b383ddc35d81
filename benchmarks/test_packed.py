"""Prediction of 784-2048-2048-10: a packed network beside torch float32, torch dynamic int8 and ONNX Runtime int8."""

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
