"""Kernels against their plain reference forms: values, gradients, dtypes and odd shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.saved_bytes import saved_bytes
from peft.kernels import dropout, modes
from peft.kernels.hadamard import factors_are_cheaper, hadamard, hadamard_reference, khatri_rao_factors
from peft.kernels.kronecker import add_kronecker, add_kronecker_reference, kronecker_linear
from peft.kernels.linear import linear
from peft.kernels.low_rank import add_low_rank, add_low_rank_reference, low_rank_linear
from peft.kernels.recompute import Memo
from peft.kernels.tucker import tucker


def operands(lead=(2, 3), k=5, d=4, r=2, dtype=torch.float64):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    return make(*lead, d), make(*lead, k), make(r, k), make(d, r)


@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 4), (), (0, 3), (1,)])
def test_low_rank_equals_its_reference(lead):
    y, x, a, b = operands(lead)
    torch.testing.assert_close(add_low_rank(y, x, a, b, 0.7), add_low_rank_reference(y, x, a, b, 0.7))


@pytest.mark.parametrize("few, by_hand", [(30, True), (31, False)])
def test_small_inputs_take_the_plain_operations(few, by_hand, monkeypatch):
    y, x, a, b = operands((6,))
    monkeypatch.setattr(modes, "FEW", few)
    assert (type(add_low_rank(y, x, a, b, 0.7).grad_fn).__name__ == "_LowRankBackward") == by_hand


def test_low_rank_gradients():
    function = lambda *tensors: add_low_rank(*tensors, 1.3)  # noqa: E731
    assert torch.autograd.gradcheck(function, operands())
    assert torch.autograd.gradgradcheck(function, operands())


def test_low_rank_of_non_contiguous_and_mixed_inputs():
    y, x, a, b = operands((3, 4))
    y, x = y.transpose(0, 1), x.transpose(0, 1)
    torch.testing.assert_close(add_low_rank(y, x, a, b, 2.0), add_low_rank_reference(y, x, a, b, 2.0))
    half = add_low_rank(
        y.bfloat16(), x.float(), a.float(), b.float(), 2.0
    )  # a half-precision base under float32 adapters
    torch.testing.assert_close(half.double(), add_low_rank_reference(y, x, a, b, 2.0), atol=0.1, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        y, x, a, b = operands(dtype=torch.float32)
        out = add_low_rank(torch.nn.functional.linear(x, torch.randn(4, 5)), x, a, b, 1.0)
    assert out.dtype == torch.bfloat16


def linear_operands(lead=(2, 3), k=5, d=4, r=2, dtype=torch.float64, bias=True):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    return make(*lead, k), make(d, k).detach(), make(d) if bias else None, make(r, k), make(d, r)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 4), (), (0, 3), (1,)])
def test_linear_with_low_rank_equals_its_reference(lead, bias):
    x, weight, bias, a, b = linear_operands(lead, bias=bias)
    reference = add_low_rank_reference(F.linear(x, weight, bias), x, a, b, 0.7)
    torch.testing.assert_close(low_rank_linear(x, weight, bias, a, b, 0.7), reference)
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, weight, bias, a, b, 0.7), reference)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["xba", "xb", "xa", "ba", "x"])
def test_linear_with_low_rank_gradients(trained, rate):
    x, weight, bias, a, b = linear_operands()
    frozen = {"x": x, "a": a, "b": b}
    leaves = [frozen.pop(name) for name in trained]

    def function(*leaves):
        torch.manual_seed(3)  # the same mask each time
        values = {**frozen, **dict(zip(trained, leaves, strict=True))}
        return low_rank_linear(values["x"], weight, bias, values["a"], values["b"], 1.3, rate)

    for tensor in frozen.values():
        tensor.requires_grad_(False)
    assert torch.autograd.gradcheck(function, leaves)
    if trained != "xb":  # refused, with a reason
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1e-7])
@pytest.mark.parametrize("lead", [(7,), (2, 3), (0, 3)])
@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_factors_wider_than_the_layer_are_added_in_their_dtype_and_rounded_once(narrow, wide, lead, rate):
    x, weight, bias, a, b = linear_operands(lead, k=64, d=48, r=4, dtype=wide)
    x, weight, bias = x.detach().to(narrow).requires_grad_(), weight.to(narrow), bias.detach().to(narrow)

    def run():
        torch.manual_seed(2)
        return low_rank_linear(x, weight, bias, a, b, 0.7, rate)

    found = run()
    torch.manual_seed(2)
    mask = dropout.keep_mask(x.shape, x.device, rate, dropout.draw_seed(), wide) if rate else torch.ones(x.shape)
    kept = x.to(wide) * mask / dropout.kept_share(rate)
    wanted = (F.linear(x, weight, bias).to(wide) + F.linear(F.linear(kept, a), b) * 0.7).to(narrow)
    assert found.dtype == narrow
    same_with_gradients(run, found, wanted, (x, a, b))
    if rate == 0:
        with torch.no_grad():
            torch.testing.assert_close(run(), found)


def same_with_gradients(run, found, wanted, leaves):
    """Values and gradients agree up to some roundings, with and without a graph of the backward pass."""
    close = torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(found, wanted, atol=2 * close, rtol=2 * close)
    probe = torch.randn(found.shape).to(found.dtype)
    theirs = torch.autograd.grad(wanted, leaves, probe)
    for create_graph in (False, True):
        for one, other in zip(
            torch.autograd.grad(run(), leaves, probe, create_graph=create_graph), theirs, strict=True
        ):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, atol=64 * close, rtol=4 * close)


def test_what_a_narrow_layer_keeps_of_its_input_is_narrow():
    x, weight, bias, a, b = linear_operands((50,), k=64, d=48, r=4, dtype=torch.float32)
    x, weight = x.detach().bfloat16().requires_grad_(), weight.bfloat16()
    out = low_rank_linear(x, weight, bias.detach().bfloat16(), a, b, 0.7)
    assert saved_bytes(out, exclude=[weight, a, b]) == x.numel() * 2 + 50 * 4 * 4


def test_a_second_derivative_that_is_not_there_is_refused():
    y, x, a, b = operands()
    a.requires_grad_(False)
    out = add_low_rank(y, x, a, b, 1.0)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), [x, b], create_graph=True)


def test_a_trained_bias_gets_its_gradient_and_a_trained_weight_too():
    x, weight, bias, a, b = linear_operands()
    for trained in (weight.requires_grad_(False), weight.clone().requires_grad_(True)):
        leaves = [t for t in (bias, trained, a) if t.requires_grad]
        found = torch.autograd.grad(low_rank_linear(x, trained, bias, a, b, 0.7).square().sum(), leaves)
        y = add_low_rank_reference(F.linear(x, trained, bias), x, a, b, 0.7)
        torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), leaves))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "compile"])
def test_low_rank_under_transforms(transform):
    x, weight, bias, a, b = linear_operands(dtype=torch.float32)
    function = lambda x: low_rank_linear(x, weight, bias, a, b, 0.7)  # noqa: E731
    expected = function(x)
    if transform == "vmap":
        found = torch.vmap(function)(x)
    elif transform == "jvp":
        found, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, function(torch.ones_like(x)) - bias)
    else:
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_dropout_masks_have_the_rate_and_are_independent(rate):
    shape, cpu = (1001, 999), torch.device("cpu")
    mask = dropout.keep_mask(shape, cpu, rate, 5).double()
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    count = mask.numel()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean().item() - (1 - rate)) <= 5 * deviation / count**0.5 + 1e-5
    assert dropout.kept_share(rate) == pytest.approx(1 - rate, abs=2**-17)
    if rate == 0:
        return
    other = dropout.keep_mask(shape, cpu, rate, 6).double()
    centred, flat = (mask - mask.mean()) / deviation, (mask - mask.mean()).flatten() / deviation
    # Correlations with neighbours in a row (also within and across one 64-bit word), in a column, and with another seed's mask.
    correlations = [(flat[lag:] * flat[:-lag]).mean().item() for lag in (1, 2, 3, 4, 5, 8, 999)]
    correlations += [(centred * (other - other.mean()) / deviation).mean().item()]
    assert max(map(abs, correlations)) < 5 / count**0.5
    per_row = mask.mean(1)
    assert per_row.std().item() == pytest.approx(deviation / 999**0.5, rel=0.15)


def test_memory_of_kernels_is_not_made_of_fake_tensors():
    from torch._subclasses import FakeTensorMode

    cpu, count = torch.device("cpu"), 5_000_000  # more than any test before
    with FakeTensorMode(), torch.no_grad():
        dropout.keep_mask((count,), cpu, 0.5, 9)
    with torch.no_grad():
        assert dropout.keep_mask((count,), cpu, 0.5, 9).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_dropout_masks_repeat_by_seed_and_follow_torchs():
    cpu = torch.device("cpu")
    mask = dropout.keep_mask((7, 3), cpu, 0.5, 9)
    assert torch.equal(mask, dropout.keep_mask((7, 3), cpu, 0.5, 9))
    with torch.no_grad():  # in the workspace, and as float
        assert torch.equal(mask.float(), dropout.keep_mask((7, 3), cpu, 0.5, 9, torch.float32))
        assert not torch.equal(mask, dropout.keep_mask((7, 3), cpu, 0.5, 8))
        assert torch.equal(mask, dropout.keep_mask((7, 3), cpu, 0.5, 9))
    torch.manual_seed(4)
    first = dropout.draw_seed()
    torch.manual_seed(4)
    assert dropout.draw_seed() == first and dropout.draw_seed() != first


def test_compiled_dropout_has_the_rate_and_new_masks_each_time():
    run = torch.compile(lambda x: dropout.drop(x, 0.3), fullgraph=True, backend="aot_eager")
    x = torch.full((501, 333), 2.0, requires_grad=True)
    one, other = run(x), run(x)
    for out in (one, other):
        assert ((out == 0) | ((out - 2 / dropout.kept_share(0.3)).abs() < 1e-5)).all()
        assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    both = ((one == 0) & (other == 0)).float().mean().item()
    assert both == pytest.approx(0.09, abs=0.01)
    one.sum().backward()
    assert torch.equal(x.grad == 0, one == 0)
    torch.manual_seed(3)
    first = run(x)
    torch.manual_seed(3)
    assert torch.equal(run(x), first)


def test_dropout_keeps_the_mean_of_the_low_rank_path():
    torch.manual_seed(0)
    x, weight, _, a, b = linear_operands((4,), dtype=torch.float64)
    base = F.linear(x, weight)
    plain = low_rank_linear(x, weight, None, a, b, 1.0) - base
    mean = sum(low_rank_linear(x, weight, None, a, b, 1.0, 0.3) - base for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, plain, atol=0.12, rtol=0.05)


@pytest.mark.parametrize("lead", [(7,), (2, 3), (), (0, 3)])
def test_linear_equals_its_reference(lead):
    x, _, bias, a, _ = linear_operands(lead, d=2)
    torch.testing.assert_close(linear(x, a, bias, Memo()), F.linear(x, a, bias))


@pytest.mark.parametrize("producer", [lambda h: h, F.gelu], ids=["saved", "recomputed"])
def test_linear_gradients(producer):
    x, _, bias, a, _ = linear_operands(d=2)
    function = lambda x, a, bias: linear(producer(x), a, bias, Memo())  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, a, bias))
    assert torch.autograd.gradgradcheck(function, (x, a, bias))
    kept = linear(producer(x), a, bias, Memo()).grad_fn.saved_tensors[0]
    assert (kept is None) == (producer is F.gelu)


def make(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def hadamard_operands(rows=5, columns=7, r=3, dtype=torch.float64):
    return [make(*shape, dtype=dtype) for shape in ((rows, r), (r, columns)) * 2]


def test_hadamard_equals_its_reference_and_so_do_its_gradients():
    factors = hadamard_operands()
    torch.testing.assert_close(hadamard(*factors), hadamard_reference(*factors))
    assert torch.autograd.gradcheck(hadamard, factors)
    assert torch.autograd.gradgradcheck(hadamard, factors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_khatri_rao_factors_are_those_of_the_hadamard_product(dtype, tolerance):
    factors = hadamard_operands(24, 36, 4, dtype)
    x, y = make(6, 36, dtype=dtype), make(6, 24, dtype=dtype)
    inner, outer = khatri_rao_factors(*factors)
    assert inner.shape == (16, 36) and outer.shape == (24, 16)
    thin, dense = add_low_rank(y, x, inner, outer, 0.5), y + x @ hadamard(*factors).T * 0.5
    torch.testing.assert_close(thin, dense, atol=tolerance * float(dense.abs().max()), rtol=0)
    for one, two in zip(
        torch.autograd.grad(thin.pow(2).sum(), [x, y, *factors]),
        torch.autograd.grad(dense.pow(2).sum(), [x, y, *factors]),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=tolerance * float(two.abs().max()), rtol=0)


def test_the_cost_model_counts_operations():
    assert factors_are_cheaper(1024, 384, 384, 8)  # r² = 64 columns instead of 384
    assert not factors_are_cheaper(1024, 384, 384, 16)
    assert factors_are_cheaper(1, 384, 384, 16)  # for one token it is building the matrix that counts


def test_hadamard_saves_its_factors_alone():
    factors = hadamard_operands()
    assert saved_bytes(hadamard(*factors)) == sum(f.nbytes for f in factors)
    with torch.autocast("cpu", torch.bfloat16):
        product = hadamard(*(f.float() for f in factors))
    product.float().sum().backward()
    assert all(f.grad.isfinite().all() for f in factors)


def kronecker_operands(lead=(2, 3), inner=True, dtype=torch.float64):
    """w1 (3, 2), w2 (4, 5): rows 12, columns 10."""
    y, x, w1 = make(*lead, 12, dtype=dtype), make(*lead, 10, dtype=dtype), make(3, 2, dtype=dtype)
    return (
        y,
        x,
        w1,
        *((make(2, 5, dtype=dtype), make(4, 2, dtype=dtype)) if inner else (None, make(4, 5, dtype=dtype))),
    )


@pytest.mark.parametrize("inner", [True, False], ids=["factored", "whole"])
@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 4), (), (0, 3), (1,)])
def test_kronecker_equals_its_reference(lead, inner):
    y, *others = operands = kronecker_operands(lead, inner)
    expected = add_kronecker_reference(*operands, 0.7)
    torch.testing.assert_close(add_kronecker(*operands, 0.7), expected)
    torch.testing.assert_close(add_kronecker(None, *others, 0.7), expected - y)


@pytest.mark.parametrize("inner", [True, False], ids=["factored", "whole"])
def test_kronecker_gradients(inner):
    _, *others = operands = kronecker_operands((3,), inner)
    assert torch.autograd.gradcheck(lambda *t: add_kronecker(*t, 1.3), operands)
    assert torch.autograd.gradgradcheck(lambda *t: add_kronecker(*t, 1.3), operands)
    assert torch.autograd.gradcheck(lambda *t: add_kronecker(None, *t, 1.3), others)


def test_kronecker_of_non_contiguous_and_mixed_inputs():
    y, x, *factors = kronecker_operands((3, 4))
    y, x = y.transpose(0, 1), x.transpose(0, 1)
    expected = add_kronecker_reference(y, x, *factors, 2.0)
    torch.testing.assert_close(add_kronecker(y, x, *factors, 2.0), expected)
    half = add_kronecker(y.bfloat16(), x.float(), *(f.float() for f in factors), 2.0)
    torch.testing.assert_close(half.double(), expected, atol=0.1, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        out = add_kronecker(y.bfloat16(), x.float(), *(f.float() for f in factors), 2.0)
    assert out.dtype == torch.bfloat16
    out.float().pow(2).sum().backward()
    assert all(f.grad.isfinite().all() for f in factors)


@pytest.mark.parametrize("inner", [True, False], ids=["factored", "whole"])
@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_kronecker_factors_wider_than_the_layer_are_added_in_their_dtype(narrow, wide, inner):
    y, x, *factors = kronecker_operands((5,), inner)
    weight = torch.randn(y.shape[-1], x.shape[-1]).to(narrow)
    x = x.detach().to(narrow).requires_grad_()
    factors = [None if f is None else f.detach().to(wide).requires_grad_() for f in factors]
    run = lambda: kronecker_linear(x, weight, None, *factors, 0.7)  # noqa: E731
    wanted = add_kronecker_reference(F.linear(x, weight).to(wide), x.to(wide), *factors, 0.7).to(narrow)
    assert run().dtype == narrow
    same_with_gradients(run, run(), wanted, [x, *(f for f in factors if f is not None)])


@pytest.mark.parametrize("inner", [True, False], ids=["factored", "whole"])
def test_kronecker_saves_its_input_and_factors_alone(inner):
    y, *others = kronecker_operands((8,), inner)
    saved = saved_bytes(add_kronecker(y, *others, 1.0))
    assert saved == sum(t.nbytes for t in others if t is not None)


def test_tucker_is_the_weight_of_a_chain_of_convolutions():
    core, inputs, outputs = torch.randn(2, 3, 3, 3), torch.randn(3, 5), torch.randn(4, 2)
    x = torch.randn(1, 5, 6, 6)
    weight = (outputs @ tucker(core, inputs)).view(4, 5, 3, 3)
    conv = torch.nn.functional.conv2d
    chain = conv(conv(conv(x, inputs[:, :, None, None]), core), outputs[:, :, None, None])
    torch.testing.assert_close(conv(x, weight), chain, atol=1e-4, rtol=1e-4)
