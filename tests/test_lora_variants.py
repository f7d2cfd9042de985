"""LoRA's variants: DoRA, a bias of B's, and starts that are read off the weight, with what becomes of the base model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from benchmarks.saved_bytes import saved_by_node
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import DoraCaching
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from settings import logits, randomise
from test_layers import Net


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapted(layer: nn.Module, seed: int = 0, **options):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["layer"], **options)
    config.fan_in_fan_out = isinstance(layer, Conv1D)
    return get_peft_model(One(copy.deepcopy(layer)), config)


def make(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Linear(6, 5), torch.randn(4, 6)
    if kind == "no-bias":
        return nn.Linear(6, 5, bias=False), torch.randn(2, 3, 6)
    if kind == "conv1d-of-transformers":
        layer = Conv1D(5, 6)
        nn.init.normal_(layer.bias)
        return layer, torch.randn(4, 6)
    if kind == "embedding":
        return nn.Embedding(9, 5), torch.randint(0, 9, (2, 4))
    return nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"), torch.randn(2, 4, 5, 5)


KINDS = pytest.mark.parametrize("kind", ["linear", "no-bias", "conv1d-of-transformers", "embedding", "conv2d"])


def apply(layer: nn.Module, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """What the layer gives with another weight, a matrix of (out_features, …)."""
    weight = matrix.T if isinstance(layer, (Conv1D, nn.Embedding)) else matrix.view_as(layer.weight)
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


# -- DoRA ------------------------------------------------------------------------------------------------------------


@KINDS
def test_dora_is_the_papers_formula_with_the_norm_as_a_constant(kind):
    """Equation 5 on the weight itself, and the gradients of equation 11."""
    plain, x = make(kind)
    model = adapted(plain, r=2, lora_alpha=6, use_dora=True)
    randomise(model, scale=0.5)
    layer = model.base_model.model.layer
    own = [p for p in model.parameters() if p.requires_grad]
    found = model(x)
    (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    gradients = [p.grad for p in own]

    weight = layer.kind.to_matrix(plain, plain.weight.detach())
    direction = weight + layer.change("default")
    magnitude = layer.lora_magnitude_vector["default"].weight.view(-1, 1)
    rows = magnitude * direction / direction.detach().norm(dim=1, keepdim=True)
    expected = apply(plain, x, rows)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * torch.arange(expected.numel()).view_as(expected)).sum(), own)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.kind.from_matrix(plain, (rows - weight)))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapter", "same-dtype"])
def test_a_fresh_dora_adapter_is_the_identity_bit_for_bit(kind, dtype, autocast):
    plain, x = make(kind)
    plain, x = plain.to(dtype), x.to(dtype) if x.is_floating_point() else x
    model = get_peft_model(
        One(copy.deepcopy(plain)),
        LoraConfig(target_modules=["layer"], r=2, use_dora=True, fan_in_fan_out=isinstance(plain, Conv1D)),
        autocast_adapter_dtype=autocast,
    )
    assert torch.equal(model(x), plain(x))
    magnitude = model.base_model.model.layer.lora_magnitude_vector["default"].weight
    assert magnitude.dtype == (torch.float32 if autocast else dtype)


def test_a_row_of_zeros_stays_one():
    """As that of a padding token: its norm is no number to divide by."""
    plain = nn.Linear(6, 5)
    with torch.no_grad():
        plain.weight[2] = 0
    x = torch.randn(4, 6)
    model = adapted(plain, r=2, use_dora=True)
    assert torch.equal(model(x), plain(x))
    randomise(model, scale=0.5)
    with torch.no_grad():
        model.base_model.model.layer.lora_B["default"].weight[2] = 0
    out = model(x)
    assert torch.equal(out[:, 2], plain(x)[:, 2])
    out.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_doras_random_start_takes_the_norm_of_the_changed_weight():
    plain, x = make("linear")
    model = adapted(plain, r=2, use_dora=True, init_lora_weights=False)
    layer = model.base_model.model.layer
    torch.testing.assert_close(model(x), plain(x) + x @ layer.change("default").T)


def test_dora_keeps_nothing_of_the_weights_size_for_backward():
    rows, size = 3, 64
    model = adapted(nn.Linear(size, size), r=2, use_dora=True)
    for _ in range(2):  # in the first step it watches what becomes of its output
        y = model(torch.randn(rows, size, requires_grad=True))
        kept = saved_by_node(y, [model.base_model.model.layer.base_layer.weight])
        y.sum().backward()
    # x, the output, and what has a value for each feature or is of rank r.
    assert sum(kept.values()) < (2 * rows * size + 8 * size) * 4
    assert size * size * 4 > 4 * sum(kept.values())


def test_dora_and_plain_lora_share_a_layer():
    base = tiny.LLAMA
    config = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base.build(), LoraConfig(use_dora=True, **config)).eval()
    model.add_adapter("plain", LoraConfig(r=4, **config))
    randomise(model, "default", 1)
    randomise(model, "plain", 2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.needs_weight("default"), layer.needs_weight("plain")) == (True, False)
    assert set(layer.lora_magnitude_vector) == {"default"}
    alone = {}
    for name in ("default", "plain"):
        model.set_adapter(name)
        alone[name] = logits(model, base)
    mixed = logits(model, base, adapter_names=["plain", "default", "plain", "default"])
    torch.testing.assert_close(mixed[0::2], alone["plain"][0::2])
    torch.testing.assert_close(mixed[1::2], alone["default"][1::2])
    model.base_model.merge_adapter(["plain"], keep_original=False)
    model.unmerge_adapter()  # the plain one can be subtracted
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, base), alone["default"], atol=1e-5, rtol=1e-4)


def count_norms(monkeypatch) -> list[int]:
    """A list of one number: how many matrices' rows were measured since."""
    found, plain = [0], torch.linalg.vector_norm

    def counted(*args, **kwargs):
        found[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "vector_norm", counted)
    return found


@KINDS
@torch.no_grad()
def test_inside_dora_caching_norms_are_measured_once_and_again_after_a_change(kind, monkeypatch):
    layer, x = make(kind)
    model = adapted(layer, use_dora=True, r=2).eval()
    randomise(model)
    measured = count_norms(monkeypatch)
    with DoraCaching() as outer:
        assert outer.enabled
        torch.testing.assert_close(model(x), plainly(model, x))
        before = measured[0]
        model(x)
        assert measured[0] == before
        for change in (rescale, lambda m: m.base_model.model.layer.get_base_layer().weight.mul_(2)):
            change(model)
            torch.testing.assert_close(model(x), plainly(model, x))
        with outer(False):
            before = measured[0]
            model(x), model(x)
            assert measured[0] == before + 2
        model.train()
        before = measured[0]
        model(x), model(x)
        assert measured[0] == before + 2
    before = measured[0]
    model.eval()(x), model(x)
    assert measured[0] == before + 2


def plainly(model, x, **arguments):
    with DoraCaching(enabled=False):
        return model(x, **arguments)


def rescale(model):
    model.base_model.model.layer.scaling["default"] *= 3


@torch.no_grad()
def test_inside_dora_caching_mixed_batches_measure_norms_once(monkeypatch):
    layer, _ = make("linear")
    x = torch.randn(4, 7, 6)
    model = adapted(layer, use_dora=True, r=2)
    model.add_adapter("plain", LoraConfig(target_modules=["layer"], r=3))
    model.add_adapter("other", LoraConfig(target_modules=["layer"], r=3, use_dora=True))
    randomise(model)
    model.eval()
    names = ["default", "other", "plain", "default"]
    wanted = model(x, adapter_names=names)
    measured = count_norms(monkeypatch)
    with DoraCaching():
        for _ in range(3):
            torch.testing.assert_close(model(x, adapter_names=names), wanted)
        assert measured[0] == 1
        model(x, adapter_names=["other", "default", "plain", "__base__"])  # other groups have other norms
        for slot in ("lora_A", "lora_magnitude_vector"):
            getattr(model.base_model.model.layer, slot)["other"].weight.mul_(2)
            torch.testing.assert_close(model(x, adapter_names=names), plainly(model, x, adapter_names=names))


def test_doras_dropout_leaves_the_frozen_part_alone():
    """With B zero the dropped input has no way to the output, whatever the magnitude."""
    plain, x = make("linear")
    model = adapted(plain, use_dora=True, lora_dropout=0.5).train()
    with torch.no_grad():
        model.base_model.model.layer.lora_magnitude_vector["default"].weight.mul_(2)
    torch.testing.assert_close(model(x), 2 * plain(x) - plain.bias)


def test_dora_refuses_a_weight_that_it_cannot_read():
    with pytest.raises(ValueError, match="Cannot adapt 'first': DoRA takes the norm of the layer's weight"):
        get_peft_model(Net(quantised=True), LoraConfig(target_modules=["first"], use_dora=True))


def test_dora_refuses_what_it_cannot_scale():
    with pytest.raises(ValueError, match="Cannot adapt 'layer': DoRA scales the rows .* grouped convolution"):
        adapted(nn.Conv2d(4, 6, 3, groups=2), r=2, use_dora=True)
    with pytest.raises(ValueError, match="lora_bias=True`.*`use_dora=True"):
        LoraConfig(use_dora=True, lora_bias=True)


def test_dora_over_another_method_scales_what_that_one_made():
    """The norm is that of the weight as the layer below applies it."""
    from toy import DiagScaleConfig

    plain, x = make("linear")
    model = get_peft_model(One(copy.deepcopy(plain)), DiagScaleConfig(target_modules=["layer"]), "scaled")
    randomise(model, "scaled")
    model.add_adapter("dora", LoraConfig(target_modules=["layer"], use_dora=True, r=2))
    randomise(model, "dora", 3)
    model.set_adapter(["scaled", "dora"])
    both = model(x)
    model.merge_adapter(["scaled", "dora"])
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.layer.get_base_layer().weight, plain.weight)
    model.set_adapter("dora")
    alone = model(x)
    model.eval().set_adapter(["scaled", "dora"])
    torch.testing.assert_close(model(x, adapter_names=["dora", "scaled", "dora", "scaled"])[::2], alone[::2])


# -- a bias of B's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d-of-transformers", "conv2d"])
def test_the_bias_of_b_is_added_with_the_adapters_scale_and_merged_into_the_bias(kind):
    plain, x = make(kind)
    model = adapted(plain, r=2, lora_alpha=6, lora_bias=True)
    assert torch.equal(model(x), plain(x))
    randomise(model)
    layer = model.base_model.model.layer
    bias = layer.lora_B["default"].bias
    assert bias.requires_grad and bias.shape == (layer.out_features,)
    weight = layer.kind.to_matrix(plain, plain.weight.detach()) + layer.change("default")
    expected = apply(plain, x, weight) + 3.0 * layer.kind.channels(plain, bias)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(layer.get_base_layer().bias, plain.bias + 3.0 * bias)
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().bias, plain.bias)
    model.base_model.merge_adapter(keep_original=False)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().bias, plain.bias)


def test_a_bias_of_b_without_one_to_merge_it_into_is_refused_before_anything_changes():
    plain, x = make("no-bias")
    model = adapted(plain, r=2, lora_bias=True)
    randomise(model)
    expected = model(x)
    with pytest.raises(ValueError, match="Cannot merge 'default' into '.*layer': it has no bias"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="it has no bias"):
        model.base_model.model.layer.merge()
    assert torch.equal(model(x), expected)


# -- starts ----------------------------------------------------------------------------------------------------------

DECOMPOSING = ("pissa", "pissa_niter_6", "olora")
starts = pytest.mark.parametrize("start", DECOMPOSING)


@starts
@pytest.mark.parametrize("kind", ["linear", "conv1d-of-transformers", "embedding"])
def test_a_start_read_off_the_weight_changes_neither_outputs_nor_the_weight(kind, start):
    plain, x = make(kind)
    model = adapted(plain, r=3, lora_alpha=6, init_lora_weights=start)
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    layer = model.base_model.model.layer
    assert torch.equal(layer.base_layer.weight, plain.weight)
    own = {k: t for k, _, t in layer.adapter_tensors("default")}
    a, b = own.values()
    weight = layer.kind.to_matrix(plain, plain.weight.detach())
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close(a.detach(), r[:3])
        torch.testing.assert_close(b.detach(), q[:, :3])
    else:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(2.0 * (b @ a).detach(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(a.detach().pow(2).sum(1), s[:3] / 2.0, atol=1e-3, rtol=1e-3)
    model(x).pow(2).sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in own.values())


@starts
def test_off_deleted_or_unloaded_the_base_model_is_whole(start):
    base = tiny.GPT2
    config = LoraConfig(target_modules=list(base.targets), init_lora_weights=start, fan_in_fan_out=True)
    model = get_peft_model(base.build(), config).eval()
    randomise(model)
    plain = logits(base.build(), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, base), plain)
    model.add_adapter("other", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.set_adapter("other")
    assert torch.equal(logits(model, base), plain)
    model.delete_adapter("default")
    assert torch.equal(logits(model, base), plain)
    assert torch.equal(logits(model.unload(), base), plain)


def trained(start="pissa", base=tiny.LLAMA, **options):
    """A model with a decomposed start, the folder-to-be of its start, and small changes since."""
    config = LoraConfig(target_modules=list(base.targets), task_type=base.task_type, init_lora_weights=start, **options)
    return get_peft_model(base.build(), config).eval()


def move(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, {"use_dora": True}],
    ids=["plain", "rslora", "patterns", "dora"],
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_saved_with_its_start_the_adapter_is_a_plain_one_of_twice_the_rank(start, options, tmp_path):
    base = tiny.LLAMA
    model = trained(start, r=4, lora_alpha=6, **options)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    move(model)
    expected = logits(model, base)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    read = PeftModel.from_pretrained(base.build(), tmp_path / "plain")
    config = read.peft_config["default"]
    assert (config.init_lora_weights, config.r) == (True, 8)
    assert model.peft_config["default"].r == 4
    torch.testing.assert_close(logits(read, base), expected, atol=1e-5, rtol=1e-4)
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    rank = 2 if "rank_pattern" in options else 4
    assert load_file(tmp_path / "plain" / "adapter_model.safetensors")[key].shape == (2 * rank, 32)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_6", "olora"])
def test_saved_as_it_is_the_adapter_finds_its_start_again(start, tmp_path):
    base = tiny.LLAMA
    model = trained(start)
    move(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    read = PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(logits(read, base), logits(model, base))


def test_a_folder_with_another_start_is_refused_and_nothing_is_written(tmp_path):
    model = trained("pissa")
    move(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="does not hold the start of adapter 'default': at .* it differs"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "trained"))
    trained("pissa", r=2).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="does not hold the start .*another shape"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "smaller"))
    assert not (tmp_path / "x").exists()


def test_declared_to_be_for_the_rest_file_and_unloaded_model_fit_together(tmp_path):
    """As scripts do it that keep the remaining weights: the adapter is written as a plain one, the model without its part."""
    base = tiny.LLAMA
    model = trained("pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)  # at its start this is no mistake
    move(model)
    expected = logits(model, base)
    with pytest.warns(UserWarning, match="fits only the weights without that part, which unload"):
        model.save_pretrained(tmp_path)
    rest = model.unload()
    assert (logits(rest, base) - logits(base.build(), base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(PeftModel.from_pretrained(rest, tmp_path), base), expected, atol=1e-5, rtol=1e-4)


def test_orthogonal_halves_cancel_and_need_an_even_rank():
    torch.manual_seed(0)
    model = adapted(nn.Linear(60, 50), r=6, init_lora_weights="orthogonal")
    layer = model.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.abs().mean() > 0.01 and b.abs().mean() > 0.01
    assert (b @ a).abs().max() < 1e-6
    x = torch.randn(2, 60)
    torch.testing.assert_close(model(x), layer.base_layer(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has to be even, got r=3"):
        adapted(nn.Linear(6, 5), r=3, init_lora_weights="orthogonal")


@starts
def test_starts_that_cannot_be_are_refused(start):
    with pytest.raises(ValueError, match=r"takes a rank of at most 5 for a weight of shape \(5, 6\), got r=6"):
        adapted(nn.Linear(6, 5), r=6, init_lora_weights=start)
    with pytest.raises(ValueError, match="needs a positive scaling"):
        adapted(nn.Linear(6, 5), r=2, lora_alpha=-1, init_lora_weights=start)
    with pytest.raises(ValueError, match="no single plain float matrix"):
        adapted(nn.Conv2d(4, 6, 3, groups=2), r=2, init_lora_weights=start)
    with torch.device("meta"):
        empty = One(nn.Linear(6, 5))
    with pytest.raises(ValueError, match="which is on the meta device"):
        get_peft_model(empty, LoraConfig(target_modules=["layer"], r=2, init_lora_weights=start))


@pytest.mark.parametrize("start", ["pissa_niter_x", "pissa_niter_", "pisa", 3, None])
def test_unknown_starts_are_refused(start):
    with pytest.raises(ValueError, match="`init_lora_weights` should be"):
        LoraConfig(init_lora_weights=start)


@pytest.mark.parametrize("start", ["eva", "corda", "loftq", "lora_ga", "mica"])
def test_starts_that_need_data_are_not_built(start):
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{start}'"):
        LoraConfig(init_lora_weights=start)


def test_a_start_of_a_conv_is_read_off_the_flattened_kernel():
    torch.manual_seed(0)
    plain, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 6)
    model = adapted(plain, r=4, init_lora_weights="pissa")
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    layer = model.base_model.model.layer
    kept = F.conv2d(F.conv2d(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight)
    u, s, v = torch.linalg.svd(plain.weight.detach().flatten(1), full_matrices=False)
    best = ((u[:, :4] * s[:4]) @ v[:4]).view_as(plain.weight)
    torch.testing.assert_close(layer.scaling["default"] * kept, F.conv2d(x, best), atol=1e-4, rtol=1e-3)


# -- combined and swapped --------------------------------------------------------------------------------------------


def test_an_adapter_with_a_start_is_combined_by_what_it_changes():
    base = tiny.LLAMA
    model = trained("pissa", r=4)
    move(model)
    model.add_adapter("other", LoraConfig(target_modules=list(base.targets), r=2, task_type=base.task_type))
    randomise(model, "other")
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    assert (model.peft_config["both"].init_lora_weights, model.peft_config["both"].r) == (True, 10)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, base)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, base), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_what_is_more_than_a_product_is_not_combined(field):
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("more", LoraConfig(target_modules=["q_proj"], **{field: True}))
    with pytest.raises(ValueError, match=f"Adapters with '{field}' cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "more"], [1.0, 1.0], "both", combination_type="cat")
    assert set(model.peft_config) == {"default", "more"}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("room", [None, 8], ids=["same", "room"])
def test_variants_take_one_anothers_place(options, room, tmp_path):
    base, targets = tiny.LLAMA, ["q_proj", "v_proj"]
    model = get_peft_model(base.build(), LoraConfig(target_modules=targets, r=4, **options)).eval()
    second = get_peft_model(
        base.build(), LoraConfig(target_modules=targets, r=4 if room is None else 6, **options)
    ).eval()
    for each, seed in ((model, 1), (second, 2)):
        randomise(each, seed=seed)
    second.save_pretrained(tmp_path)
    if room is not None:
        prepare_model_for_compiled_hotswap(model, target_rank=room)
    hotswap_adapter(model, str(tmp_path), "default")
    torch.testing.assert_close(logits(model, base), logits(second, base), atol=1e-5, rtol=1e-4)
    for (key, tensor), other in zip(
        get_peft_model_state_dict(model).items(), get_peft_model_state_dict(second).values(), strict=True
    ):
        assert torch.equal(tensor, other), key
