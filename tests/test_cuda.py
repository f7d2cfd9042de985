"""What the other tests show on a CPU holds on a GPU: outputs, gradients, dropout, autocast, merging, files, mixed batches, compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.holder import adapted_modules
from peft.core.layer import AdapterLayer
from settings import CASES, IDS, ONE_EACH, ONE_EACH_IDS, own_tensors, randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA or AMD")

every_case = pytest.mark.parametrize(("setting", "base"), CASES, ids=IDS)
every_method = pytest.mark.parametrize(("setting", "base"), ONE_EACH, ids=ONE_EACH_IDS)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
"""A GPU sums in another order, so numbers agree up to rounding."""


@pytest.fixture(autouse=True)
def exact_products():
    """Products of fp32 in fp32: what is compared here is fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(values):
    return {k: v.cuda() for k, v in values.items()}


def logits(model, base, device="cuda", **kwargs):
    inputs = {k: v.to(device) for k, v in base.inputs().items()}
    found = model(**inputs, **kwargs).logits
    return found[:, -inputs["input_ids"].shape[1] :] if found.dim() == 3 else found


def adapted(setting, base, **options):
    model = setting.model(base, **options)
    randomise(model)
    return model


def gradients(model, base, device):
    model.train()
    logits(model, base, device).pow(2).mean().backward()
    found = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@every_case
def test_outputs_and_gradients_are_those_of_a_cpu(setting, base):
    model = adapted(setting, base)
    wanted, slopes = logits(model, base, "cpu").detach(), gradients(model, base, "cpu")
    model.eval().cuda()
    torch.testing.assert_close(logits(model, base).cpu(), wanted, **CLOSE)
    found = gradients(model, base, "cuda")
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        limit = 2e-4 * max(1.0, float(slope.abs().max()))
        torch.testing.assert_close(found[name], slope, atol=limit, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_trains_and_stays_near_fp32(setting, base, dtype):
    model = adapted(setting, base).cuda()
    wanted = logits(model, base).detach()
    with torch.autocast("cuda", dtype):
        found = logits(model, base)
        found.float().pow(2).mean().backward()
    limit = 0.1 * float(wanted.abs().max())
    torch.testing.assert_close(found.float(), wanted, atol=limit, rtol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_method
def test_adapters_are_made_where_the_model_is(setting, base):
    model = get_peft_model(base.build().cuda(), setting.make(base))
    assert {t.device.type for t in own_tensors(model).values()} == {"cuda"}
    model.add_adapter("other", setting.make(base, **setting.second))
    assert {t.device.type for t in own_tensors(model, "other").values()} == {"cuda"}


@every_method
def test_saved_and_loaded_on_a_gpu(setting, base, tmp_path):
    model = adapted(setting, base).cuda()
    wanted = logits(model, base).detach()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base.build().cuda(), tmp_path).eval()
    torch.testing.assert_close(logits(again, base), wanted, **CLOSE)


@every_method
def test_merging_and_undoing_it(setting, base):
    model = adapted(setting, base).cuda()
    reasons = [m.why_no_merge for _, m in adapted_modules(model) if isinstance(m, AdapterLayer)]
    if not reasons or any(reasons):
        pytest.skip("the method cannot be merged")
    wanted = logits(model, base).detach()
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, base), wanted, **CLOSE)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@every_method
def test_mixed_batches_equal_each_row_alone(setting, base):
    model = adapted(setting, base)
    model.add_adapter("other", setting.make(base, **setting.second))
    randomise(model, "other", 2)
    model.cuda()
    names = ["default", "__base__", "other", "default"]
    with torch.no_grad():
        mixed = logits(model, base, adapter_names=names)
        for row, name in enumerate(names):
            alone = logits(model, base, adapter_names=[name] * len(names))
            torch.testing.assert_close(mixed[row], alone[row], **CLOSE)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_rate_and_is_the_same_in_backward(rate):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(256, 64, bias=False)), LoraConfig(r=8, lora_dropout=rate, target_modules=["0"])
    )
    randomise(model)
    model.cuda().train()
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.zero_()
    x = torch.ones(4096, 256, device="cuda", requires_grad=True)
    y = model(x)
    y.sum().backward()
    model.eval()
    wanted = model(torch.ones(1, 256, device="cuda"))
    torch.testing.assert_close(y.mean(0), wanted[0], atol=0.05 * float(wanted.abs().max()), rtol=0)
    # The gradient of a dropped input is zero: the share of zeros is the rate.
    assert abs(float((x.grad == 0).float().mean()) - rate) < 0.01


@pytest.mark.slow
@every_method
def test_compiled_outputs_are_those_of_eager(setting, base):
    model = adapted(setting, base).cuda()
    wanted = logits(model, base).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model)
    torch.testing.assert_close(logits(compiled, base).detach(), wanted, **CLOSE)


@every_method
def test_generation(setting, base):
    if base not in (tiny.LLAMA, tiny.GPT2, tiny.T5):
        pytest.skip("the base of this method's row does not generate")
    model = adapted(setting, base)
    inputs = {k: v for k, v in base.inputs().items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    found = model.cuda().generate(**on_gpu(inputs), **options)
    assert torch.equal(found.cpu(), wanted)
