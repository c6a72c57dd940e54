"""Dense layers on panels: the layer's own numbers, and only where torch is slow at them."""

import pytest
import torch
from torch import nn

from benchmarks.oracles.expert_layer import relative_error
from loadmaster.kernels.cpu import dense
from loadmaster.kernels.cpu.dense import PanelLinear, use_panels
from loadmaster.kernels.cpu.panel_matrix import panels_available

pytestmark = pytest.mark.skipif(
    not panels_available(torch.bfloat16), reason="this processor fuses no products and sums"
)


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (33, 70), (128, 256), (1100, 17)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_layer_gives_what_it_gave(inputs: int, outputs: int, bias: bool) -> None:
    layer = linear(inputs, outputs, bias=bias)
    x = torch.randn(2, 9, inputs).to(torch.bfloat16)
    want = nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    y = PanelLinear(layer)(x)
    assert y.dtype == torch.bfloat16 and y.shape == want.shape
    assert relative_error(y.flatten(0, 1), want.flatten(0, 1)) <= 1e-2


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    layer = PanelLinear(linear(64, 48, bias=True))
    x = torch.randn(1300, 64).to(torch.bfloat16)
    whole = layer(x)
    for first, last in ((0, 1), (511, 514), (1299, 1300)):
        assert torch.equal(layer(x[first:last]), whole[first:last])
    assert layer(x[:0]).shape == (0, 48)


def test_layers_are_replaced_only_where_torch_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(linear(8, 8, bias=True), nn.ReLU(), nn.Sequential(nn.Linear(8, 4)))

    monkeypatch.setattr(dense, "packed_available", lambda dtype: True)
    assert use_panels(model(), torch.bfloat16) == 0
    monkeypatch.setattr(dense, "packed_available", lambda dtype: False)
    assert use_panels(model(), torch.float32) == 0
    replaced = model().to(torch.bfloat16)
    assert use_panels(replaced, torch.bfloat16) == 2
    assert isinstance(replaced[0], PanelLinear) and isinstance(replaced[2][0], PanelLinear)
    assert replaced[0].weight.dtype == torch.bfloat16       # for code that asks for the type
