import pytest
import torch
from torch import nn

import engram_kernels as ek


def model():
    return nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 5, bias=False)), nn.Linear(5, 3))


def test_linear_layers_become_binary_and_keep_their_parameters():
    plain = model()
    parameters = dict(plain.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    converted = ek.convert(plain)
    assert converted is plain and not any(isinstance(m, nn.Linear) for m in converted.modules())
    for name, p in converted.named_parameters():
        assert p is parameters[name] and torch.equal(p, before[name])
    converted(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(converted[2].weight, before["2.weight"])
    ek.MetaplasticAdam(converted.parameters())


def test_a_predicate_chooses_and_settings_go_to_the_layers():
    names = []

    def hidden(name, layer):
        names.append((name, layer.in_features))
        return name == "1.1"

    converted = ek.convert(model().eval(), hidden, engram=ek.StochasticEngram(0.5))
    assert names == [("0", 8), ("1.1", 6), ("2", 5)]
    assert [type(m) for m in (converted[0], converted[1][1], converted[2])] == [
        nn.Linear,
        ek.BinaryEngramLinear,
        nn.Linear,
    ]
    assert converted[1][1].engram.rate == 0.5 and not converted[1][1].training and converted[1][1].bias is None


def test_what_it_computes_is_the_layer_with_that_checkpoint():
    linear = nn.Linear(70, 9)
    layer = ek.BinaryEngramLinear(70, 9)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(4, 70)
    assert torch.equal(ek.convert(linear)(x), layer(x))


def test_a_shared_layer_stays_one():
    shared = nn.Linear(5, 5)
    converted = ek.convert(nn.ModuleDict({"one": shared, "other": shared}))
    assert converted["one"] is converted["other"] and isinstance(converted["one"], ek.BinaryEngramLinear)


def test_nothing_to_replace_is_an_error():
    with pytest.raises(ValueError, match="model: expected an nn.Linear or nn.Conv2d to replace, got none"):
        ek.convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="got none for which"):
        ek.convert(model(), lambda name, layer: False)
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
        ek.convert(nn.Linear(3, 4, dtype=torch.float64))
