import pytest
import torch
from torch import nn

import engram_kernels as ek


def network():
    return nn.Sequential(
        ek.BinaryEngramLinear(784, 256, binary_input=False, bias=False),
        nn.LayerNorm(256),
        ek.BinaryEngramLinear(256, 10, engram=ek.StochasticEngram(0.1)),
    )


@pytest.mark.parametrize("state_dtype, bits", [(torch.float32, 64), (torch.bfloat16, 32), (torch.int8, 17)])
def test_what_a_training_step_holds_is_what_is_counted(state_dtype, bits):
    model, x = network(), torch.randn(100, 784)
    own = ek.summary(model, x, state_dtype=state_dtype)
    optimizer = ek.MetaplasticAdam(model.parameters(), state_dtype=state_dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model[0](x)
        z = model[2](nn.functional.layer_norm(y.detach(), (256,)).requires_grad_())
    weights = [layer.weight.sign_bits().data_ptr() for layer in (model[0], model[2])]
    assert own.saved_bytes == sum(t.nbytes for t in kept if t.data_ptr() not in weights)
    z.sum().backward()
    model(x).square().sum().backward()
    assert own.gradient_bytes == sum(p.grad.nbytes for p in model.parameters())
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    held = sum(t.nbytes for t in tensors)
    assert own.hidden_bytes == 4 * 256 * 794 and own.sign_bytes == 16 * (256 * 7 + 10 * 2)
    assert abs(own.state_bytes - held) < 0.02 * held and held >= 256 * 794 * bits / 8
    assert own.real_bytes == 4 * (512 + 10)


def test_operations_and_shapes():
    own = ek.summary(network(), torch.randn(100, 784))
    assert [(layer.name, layer.kind) for layer in own.layers] == [
        ("0", "BinaryEngramLinear"), ("1", "LayerNorm"), ("2", "BinaryEngramLinear"),
    ]  # fmt: skip
    assert own.layers[0].real_operations == 100 * 784 * 256 and own.layers[0].binary_operations == 0
    assert own.layers[2].binary_operations == 100 * 256 * 10 and own.layers[2].output == (100, 10)
    assert own.trained == 256 * 784 + 512 + 2560 + 10
    shared = nn.Sequential(layer := ek.BinaryEngramLinear(20, 20), layer)
    assert ek.summary(shared, torch.randn(3, 20)).layers[0].binary_operations == 2 * 3 * 400


@pytest.mark.parametrize("readout", ["dendritic", "prototype", "ridge", "linear"])
def test_networks_print_a_table(readout):
    model = ek.EngramMLP((64, 128, 10), readout=readout)
    x, before = torch.randn(5, 64), torch.get_rng_state()
    text = str(ek.summary(model, x))
    assert torch.equal(torch.get_rng_state(), before) and all(module.training for module in model.modules())
    lines = text.splitlines()
    assert lines[0].startswith("layer") and "layers.0" in text and "training, in all" in lines[-1]
    assert max(map(len, lines)) < 120


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="state_dtype: expected float32, bfloat16 or int8, got torch.float64"):
        ek.summary(network(), torch.randn(2, 784), state_dtype=torch.float64)
    model = network()
    with pytest.raises(RuntimeError, match=r"input: expected shape \(\*, 784\)"):
        ek.summary(model, torch.randn(2, 5))
    assert model.training and not model[0]._forward_hooks
