"""Layer inputs recomputed in the backward pass: the same gradients bit for bit, less kept, and saved wherever that is not sound."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny
from benchmarks.saved_bytes import saved_bytes
from peft import LoraConfig, get_peft_model
from peft.helpers import recompute_inputs
from peft.kernels import recompute
from peft.kernels.low_rank import low_rank_linear
from peft.kernels.recompute import Memo

TOKENS, WIDTH, RANK = 6, 8, 2


def attention_output(h):
    heads = h.view(1, TOKENS, 2, WIDTH // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(heads * 1, heads * 2, heads * 3).transpose(1, 2).reshape(1, TOKENS, WIDTH)


def rms_norm(h, weight):
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def half_rms_norm(h, weight):
    wide = h.to(torch.float32)
    return weight.to(h.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


NORM_WEIGHT = torch.rand(WIDTH) + 0.5
NORM_BIAS = torch.rand(WIDTH)
PRODUCERS = {
    "gelu": lambda h: F.gelu(h),
    "gelu-tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": lambda h: F.silu(h),
    "gated": lambda h: F.silu(h * 2) * (h * 3),
    "layer-norm": lambda h: F.layer_norm(h, (WIDTH,), NORM_WEIGHT, NORM_BIAS, 1e-12),
    "layer-norm-1e-5": lambda h: F.layer_norm(h * 0.01, (WIDTH,), NORM_WEIGHT, NORM_BIAS, 1e-5),
    "layer-norm-dropout": lambda h: F.dropout(F.layer_norm(h, (WIDTH,), NORM_WEIGHT, NORM_BIAS, 1e-12), 0.3),
    "rms-norm": lambda h: rms_norm(h, NORM_WEIGHT),
    "attention": attention_output,
    "rows": lambda h: F.gelu(h).index_select(1, torch.arange(TOKENS - 1)),
}


def run(producer, memo, rate=0.0, dtype=torch.float32, layers=1, seed=0):
    """Loss and, after `backward`, gradients of a source, a producer and low-rank layers that read it."""
    torch.manual_seed(seed)
    source = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight, a, b = (torch.randn(*s, dtype=dtype) for s in ((5, WIDTH), (RANK, WIDTH), (5, RANK)))
    a.requires_grad_(True), b.requires_grad_(True)
    x = producer(source * 1)
    out = sum(low_rank_linear(x, weight, None, a, b, 0.5, rate, memo) for _ in range(layers))
    return out.square().sum(), (source, a, b)


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", PRODUCERS)
def test_the_same_gradients_from_less(name, layers, rate):
    memo = Memo()
    for round_ in range(2):  # the first verifies, the second trusts
        loss, leaves = run(PRODUCERS[name], memo, rate, layers=layers, seed=round_)
        kept = saved_bytes(loss)
        found = gradients(loss, leaves)
        with recompute_inputs(False):
            loss, leaves = run(PRODUCERS[name], memo, rate, layers=layers, seed=round_)
        # Where attention writes its output as its reader wants it, saving it costs nothing in the first place.
        assert kept < saved_bytes(loss) or name == "attention"
        assert all(map(torch.equal, found, gradients(loss, leaves)))
    (way,) = memo.ways.values()
    assert way is not None


@pytest.mark.parametrize("name", ["gelu", "layer-norm", "half-rms-norm"])
def test_half_precision(name):
    producer = {
        **PRODUCERS,
        "layer-norm": lambda h: F.layer_norm(h, (WIDTH,), NORM_WEIGHT.bfloat16(), NORM_BIAS.bfloat16()),
        "half-rms-norm": lambda h: half_rms_norm(h, NORM_WEIGHT.bfloat16()),
    }[name]
    loss, leaves = run(producer, Memo(), dtype=torch.bfloat16)
    kept, found = saved_bytes(loss), gradients(loss, leaves)
    with recompute_inputs(False):
        loss, leaves = run(producer, Memo(), dtype=torch.bfloat16)
    assert kept <= saved_bytes(loss)
    assert all(map(torch.equal, found, gradients(loss, leaves)))


def test_second_derivatives():
    weight, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, WIDTH), (RANK, WIDTH), (5, RANK)))
    memo = Memo()

    def function(h, a, b):
        return low_rank_linear(F.gelu(h), weight, None, a, b, 0.5, 0.0, memo)

    leaves = (torch.randn(3, WIDTH, dtype=torch.float64), a, b)
    leaves = tuple(t.requires_grad_(True) for t in leaves)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert list(memo.ways) == [("GeluBackward0",)]


def test_layers_that_read_one_input_compute_it_once(monkeypatch):
    calls = []
    gelu = F.gelu
    loss, leaves = run(PRODUCERS["gelu"], Memo(), layers=3)
    monkeypatch.setattr(recompute.F, "gelu", lambda *args, **kwargs: calls.append(1) or gelu(*args, **kwargs))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert len(calls) == 1
    again = torch.autograd.grad(loss, leaves)
    assert len(calls) == 2
    assert all(map(torch.equal, first, again))


# -- where it is not sound, the input is saved -----------------------------------------------------------------------------


def operands():
    torch.manual_seed(0)
    source = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    a, b = torch.randn(RANK, WIDTH, requires_grad=True), torch.randn(5, RANK, requires_grad=True)
    return source, torch.randn(5, WIDTH), a, b


def kept_with(make_x):
    """Whether the low-rank layer gave up the input that `make_x` makes, and the gradients."""
    source, weight, a, b = operands()
    x = make_x(source * 1)
    out = low_rank_linear(x, weight, None, a, b, 0.5, 0.0, Memo())
    saved = {t.data_ptr() for t in out.grad_fn.saved_tensors if isinstance(t, torch.Tensor)}
    return x.data_ptr() not in saved, torch.autograd.grad(out.square().sum(), (source, a, b))


def changed_in_place(h):
    x = F.gelu(h)
    with torch.no_grad():
        x.mul_(2)
    return x


def in_a_checkpoint(h):
    return checkpoint(F.gelu, h, use_reentrant=False)


def with_hooks_on_what_is_kept(h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return F.gelu(h)


def a_part_of_a_split(h):
    return (F.gelu(torch.cat([h, h], -1))).split(WIDTH, -1)[1]


def a_norm_without_weight(h):
    return F.layer_norm(h, (WIDTH,))


def too_many_operations(h):
    return F.dropout(F.dropout(F.dropout(F.gelu(h), 0.1), 0.1), 0.1)


def an_unknown_operation(h):
    return h.sin()


def an_epsilon_never_seen(h):
    return F.layer_norm(h * 1e-3, (WIDTH,), NORM_WEIGHT, NORM_BIAS, 0.1234)


@pytest.mark.parametrize(
    "make_x",
    [
        changed_in_place,
        in_a_checkpoint,
        with_hooks_on_what_is_kept,
        a_part_of_a_split,
        a_norm_without_weight,
        too_many_operations,
        an_unknown_operation,
        pytest.param(an_epsilon_never_seen, marks=pytest.mark.filterwarnings("ignore:A layer's input")),
    ],
)
def test_saved_where_recomputing_is_not_sound(make_x):
    gave_up, found = kept_with(make_x)
    assert not gave_up
    with recompute_inputs(False):
        assert all(map(torch.equal, found, kept_with(make_x)[1]))


def test_saved_under_hooks_for_saved_tensors():
    with torch.autograd.graph.save_on_cpu():
        memo = Memo()
        loss, leaves = run(PRODUCERS["gelu"], memo)
    assert not memo.ways
    with recompute_inputs(False):
        assert all(map(torch.equal, gradients(loss, leaves), gradients(*run(PRODUCERS["gelu"], memo))))


def test_saved_under_sharding(monkeypatch):
    from torch.distributed import _composable_state

    monkeypatch.setattr(_composable_state, "_module_state_mapping", {nn.Linear(1, 1): None})
    memo = Memo()
    run(PRODUCERS["gelu"], memo)
    assert not memo.ways


def test_a_way_that_proves_wrong_is_given_up_with_a_warning(monkeypatch):
    memo, gelu = Memo(), F.gelu
    monkeypatch.setattr(recompute.F, "gelu", lambda *args, **kwargs: gelu(*args, **kwargs) + 1e-3)
    with pytest.warns(UserWarning, match="not the same when computed again"):
        run(gelu, memo)
    assert memo.ways == {("GeluBackward0",): None}
    loss, leaves = run(gelu, memo)
    with recompute_inputs(False):
        assert all(map(torch.equal, gradients(loss, leaves), gradients(*run(gelu, memo))))


def small_norm(h, weight, eps):
    return F.layer_norm(h * 0.01, (WIDTH,), weight, NORM_BIAS, eps)


def test_another_norm_is_verified_again():
    memo = Memo()
    other = NORM_WEIGHT.clone()
    for weight, eps in ((NORM_WEIGHT, 1e-12), (other, 1e-3), (NORM_WEIGHT, 1e-12)):
        producer = functools.partial(small_norm, weight=weight, eps=eps)
        loss, leaves = run(producer, memo)
        assert memo.ways["NativeLayerNormBackward0",].eps == eps
        with recompute_inputs(False):
            assert all(map(torch.equal, gradients(loss, leaves), gradients(*run(producer, memo))))


def test_nan_neither_verifies_nor_refutes():
    memo = Memo()
    run(lambda h: F.gelu(h * float("nan")), memo)
    assert not memo.ways
    run(PRODUCERS["gelu"], memo)
    assert memo.ways["GeluBackward0",] is not None


def test_a_source_changed_after_the_forward_pass_is_torchs_own_error():
    source, weight, a, b = operands()
    hidden = source * 1
    out = low_rank_linear(F.gelu(hidden), weight, None, a, b, 0.5, 0.0, Memo())
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_freed_producer_is_an_error_that_names_the_switch():
    source, weight, a, b = operands()
    x = F.gelu(source)
    out = low_rank_linear(x, weight, None, a, b, 0.5, 0.0, Memo())
    x.sum().backward()
    with pytest.raises(RuntimeError, match="recompute_inputs"):
        torch.autograd.grad(out.sum(), [a])


def test_memos_are_not_copied():
    memo = Memo()
    run(PRODUCERS["layer-norm"], memo)
    assert memo.ways and not copy.deepcopy(memo).ways and not pickle.loads(pickle.dumps(memo)).ways


# -- whole models ------------------------------------------------------------------------------------------------------


def trained_like(base, enabled, checkpointing=False, dropout=0.0):
    torch.manual_seed(0)
    model = get_peft_model(
        base.build(), LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    bytes_, grads = 0, {}
    with recompute_inputs(enabled):
        for _ in range(2):
            torch.manual_seed(1)
            model.zero_grad()
            loss = model(**base.inputs()).logits.float().square().mean()
            bytes_ = saved_bytes(loss, model.parameters())
            loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grads[name] = parameter.grad
    return bytes_, grads


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [tiny.BERT, tiny.GPT2, tiny.LLAMA, tiny.T5], ids=str)
def test_models_train_the_same_from_less(base, checkpointing, dropout):
    bytes_, grads = trained_like(base, True, checkpointing, dropout)
    all_bytes, all_grads = trained_like(base, False, checkpointing, dropout)
    assert grads.keys() == all_grads.keys()
    assert all(torch.equal(grads[name], all_grads[name]) for name in grads)
    assert bytes_ < all_bytes or checkpointing
