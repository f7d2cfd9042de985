"""Kinds of layers: the matrix of a weight, products in the layer's own geometry, and what cannot be adapted or merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from peft import LoraConfig, get_peft_model
from peft.core.kinds import kind_of
from settings import randomise

GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 2, "padding_mode": "circular", "groups": 2},
    "reflect": {"padding": "same", "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "depthwise": {"groups": 4, "dilation": 2, "padding": 1},
}
CONVS = pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda c: c.__name__)
EACH = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def layer_and_input(conv, geometry, batch=(2,)):
    layer = conv(4, 8, 3, **geometry)
    return layer, torch.randn(*batch, 4, *(7,) * len(layer.kernel_size))


@CONVS
@EACH
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batch", "single"])
def test_a_product_is_what_the_layer_gives_without_its_bias(conv, geometry, batch):
    if conv is nn.Conv3d and geometry.get("padding_mode") == "reflect" and not batch:
        pytest.skip("torch itself has no reflection padding of unbatched volumes")
    layer, x = layer_and_input(conv, geometry, batch)
    kind = kind_of(layer)
    matrix = kind.to_matrix(layer, layer.weight)
    assert tuple(matrix.shape) == kind.shape(layer)
    assert torch.equal(kind.from_matrix(layer, matrix), layer.weight)
    with_bias = kind.product(layer, x, matrix) + kind.channels(layer, layer.bias)
    torch.testing.assert_close(with_bias, layer(x))


@CONVS
@EACH
def test_scaled_columns_scale_the_input(conv, geometry):
    layer, x = layer_and_input(conv, geometry)
    kind, scale = kind_of(layer), torch.randn(4)
    matrix = kind.to_matrix(layer, layer.weight)
    scaled = kind.product(layer, x * kind.channels(layer, scale), matrix)
    torch.testing.assert_close(kind.product(layer, x, matrix * kind.columns(layer, scale)), scaled)


@CONVS
@EACH
def test_a_product_mixed_is_that_of_the_combined_matrix(conv, geometry):
    layer, x = layer_and_input(conv, geometry)
    kind = kind_of(layer)
    inner, outer = (torch.randn(shape).flatten(1) for shape in kind.factor_shapes(layer, 4))
    mixed = kind.mix(layer, kind.product(layer, x, inner), outer)
    torch.testing.assert_close(kind.product(layer, x, kind.combine(layer, outer, inner)), mixed, atol=1e-4, rtol=1e-4)


@CONVS
@EACH
def test_factors_are_convolutions_that_can_be_called(conv, geometry):
    layer, x = layer_and_input(conv, geometry)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=4)).eval()
    randomise(model)
    adapted = model.base_model.model[0]
    a, b = adapted.lora_A["default"], adapted.lora_B["default"]
    assert isinstance(a, conv) and isinstance(b, conv)
    expected = layer(x) + b(a(x)) * adapted.scaling["default"]
    torch.testing.assert_close(model(x), expected)
    if layer.groups > 1:
        with pytest.raises(ValueError, match="A reads all input channels of a grouped convolution"):
            model.merge_adapter()
    else:
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_rank_that_the_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="Cannot adapt '0': .* 4 groups, .* rank 6"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), LoraConfig(target_modules=["0"], r=6))


def test_a_weight_that_is_computed_is_adapted_but_not_merged():
    layer = weight_norm(nn.Conv1d(4, 6, 3))
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))
    randomise(model)
    x = torch.randn(2, 4, 5)
    assert (model(x) - layer(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="its weight is computed from other parameters"):
        model.merge_adapter()


def test_rows_of_an_input_without_a_batch_are_not_mistaken_for_one():
    model = get_peft_model(nn.Sequential(nn.Conv1d(2, 3, 1)), LoraConfig(target_modules=["0"])).eval()
    with pytest.raises(
        ValueError, match="Conv1d got an input of shape .2, 5., whose first dimension is that of the ch"
    ):
        model(torch.randn(2, 5), adapter_names=["default", "__base__"])


def test_transposed_convolutions_are_refused():
    with pytest.raises(ValueError, match="is a ConvTranspose2d, which cannot be adapted"):
        get_peft_model(nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), LoraConfig(target_modules=["0"]))
