"""The first layer's attention behind a prefix, whose gradients end there, and grouped keys: against the plain form."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from benchmarks.saved_bytes import saved_bytes
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.kernels import modes
from peft.kernels.prefixed_attention import ends_at_prefix, prefixed_attention, takes_groups
from settings import logits, outputs, randomise

BATCH, TOKENS, LENGTH, SIZE = 3, 7, 5, 6
BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward"
LAYERS = 2


def make(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def operands(heads, key_heads, transposed, masked):
    """Queries, a function that puts a prefix in front, prefix keys and values, and a mask."""
    torch.manual_seed(0)
    query = make(BATCH, TOKENS, heads, SIZE).transpose(1, 2)
    query = query if transposed else query.contiguous()
    own = [make(BATCH, key_heads, TOKENS, SIZE) for _ in range(2)]
    prefix = [make(key_heads, LENGTH, SIZE, grad=True) for _ in range(2)]
    mask = None
    if masked:
        mask = torch.zeros(BATCH, 1, TOKENS, LENGTH + TOKENS, dtype=torch.float64)
        hidden = torch.rand(BATCH, 1, TOKENS, TOKENS) < 0.5
        hidden[0, :, 2] = True  # this query sees the prefix alone
        mask[..., LENGTH:].masked_fill_(hidden, torch.finfo(torch.float64).min)

    def both(*prefix):
        return [torch.cat([p.expand(BATCH, -1, -1, -1), o], 2) for p, o in zip(prefix, own, strict=True)]

    return query, both, prefix, mask


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_it_equals_attention_and_so_do_its_gradients(heads, key_heads, transposed, masked):
    query, both, prefix, mask = operands(heads, key_heads, transposed, masked)

    def ours(*prefix):
        with torch.no_grad():
            joined = both(*prefix)
        return prefixed_attention(query, *joined, *prefix, mask, 0.7)

    def plain(*prefix):
        keys, values = (t.repeat_interleave(heads // key_heads, 1) for t in both(*prefix))
        scores = 0.7 * query @ keys.mT
        return ((scores if mask is None else scores + mask).softmax(-1) @ values).transpose(1, 2)

    torch.testing.assert_close(ours(*prefix), plain(*prefix))
    assert ours(*prefix).is_contiguous()
    assert torch.autograd.gradcheck(ours, prefix)
    weights = make(BATCH, TOKENS, heads, SIZE)
    found, expected = (torch.autograd.grad((f(*prefix) * weights).sum(), prefix) for f in (ours, plain))
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_refused():
    query, both, prefix, _ = operands(4, 2, True, False)
    with torch.no_grad():
        joined = both(*prefix)
    first = torch.autograd.grad(prefixed_attention(query, *joined, *prefix).square().sum(), prefix, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_when_gradients_end_at_the_prefix():
    query, both, prefix, _ = operands(4, 2, True, False)
    key, value = both(*prefix)
    key, value = key.detach(), value.detach()
    assert ends_at_prefix(query, key, value, *prefix)
    with torch.no_grad():
        assert not ends_at_prefix(query, key, value, *prefix)
    assert not ends_at_prefix(query, key, value, *(p.detach() for p in prefix))
    assert not ends_at_prefix(query, key.requires_grad_(), value, *prefix)
    assert not ends_at_prefix(query.half(), key.half(), value.half(), *(p.half() for p in prefix))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not ends_at_prefix(query, key.detach(), value, *prefix)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ends_at_prefix(query, key.detach(), value, *prefix)


class Calls(TorchDispatchMode):
    """Counts what is asked of torch's kernels, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def gradients(model, base):
    outputs(model, base.inputs()).pow(2).mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("base", [tiny.BERT, tiny.LLAMA], ids=lambda b: b.name)
@pytest.mark.parametrize("projection", [False, True])
def test_a_models_first_layer_runs_no_backward_pass_over_its_keys(base, projection, monkeypatch):
    options = {"task_type": base.task_type, "num_virtual_tokens": 4, "prefix_projection": projection}
    model = get_peft_model(base.build(), PrefixTuningConfig(encoder_hidden_size=6, **options)).train()
    randomise(model)
    with Calls() as calls:
        found = gradients(model, base)
    assert calls.counts[BACKWARD] == LAYERS - 1
    model.enable_input_require_grads()
    with Calls() as calls:
        gradients(model, base)
    assert calls.counts[BACKWARD] == LAYERS
    model.disable_input_require_grads()
    expected_logits = logits(model, base)
    monkeypatch.setattr(modes, "FEW", 2**60)
    torch.testing.assert_close(logits(model, base), expected_logits)
    torch.testing.assert_close(found, gradients(model, base), atol=1e-6, rtol=1e-4)


def test_layers_below_that_train_get_their_gradients():
    base = tiny.LLAMA
    prefix = PrefixTuningConfig(task_type=base.task_type, num_virtual_tokens=4)
    model = get_peft_model(base.build(), prefix)
    model.add_adapter("lora", LoraConfig(task_type=base.task_type, init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    randomise(model)
    with Calls() as calls:
        found = gradients(model, base)
    assert calls.counts[BACKWARD] == LAYERS
    assert any("layers.0" in name and "lora_A" in name and g.abs().sum() > 0 for name, g in found.items())


def test_grouped_keys_are_not_repeated_behind_a_mask():
    """A causal model needs a mask that shows the prefix; what is saved does not grow by it."""
    base = tiny.LLAMA
    saved = {}
    for count in (0, 4):
        model = base.build()
        model.enable_input_require_grads()
        model.requires_grad_(False)
        if count:
            model = get_peft_model(model, PrefixTuningConfig(task_type=base.task_type, num_virtual_tokens=count))
        out = outputs(model.train(), {"input_ids": base.inputs()["input_ids"]})
        saved[count] = saved_bytes(out, model.parameters())
        rows, tokens = base.inputs()["input_ids"].shape
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    if not takes_groups():
        pytest.skip("this torch repeats grouped keys itself")
    head = config.hidden_size // config.num_attention_heads
    prefix = LAYERS * 2 * rows * 4 * config.num_key_value_heads * head * 4
    mask = tokens * (tokens + 4) * 4
    table = 4 * LAYERS * 2 * config.num_key_value_heads * head * 4
    assert saved[4] - saved[0] <= prefix + mask + table
