"""Kernels that build the changed weight, that scale features, and that keep their output: against plain references."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.saved_bytes import saved_by_node
from peft import IA3Config, LoraConfig, get_peft_model
from peft.helpers import recompute_inputs
from peft.kernels import modes
from peft.kernels.dropout import draw_seed, keep_mask, kept_share
from peft.kernels.hadamard import Hadamard, hadamard_reference, hadamard_stacked
from peft.kernels.kronecker import Kronecker, kronecker_stacked
from peft.kernels.linear import Source, linear
from peft.kernels.low_rank import LowRank, low_rank_linear
from peft.kernels.magnitude import Magnitude, magnitude_linear
from peft.kernels.recompute import Memo
from peft.kernels.reweighted import may_reweight, reweighted_linear
from peft.kernels.scaling import scaled_linear
from peft.kernels.workspace import workspace

ROWS, COLUMNS, R, SCALE = 6, 8, 2, 0.7


def make(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def magnitude_reference(weight, a, b, m):
    changed = weight + SCALE * b @ a
    return m[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()  # the norm counts as a constant


RULES = {  # rule, shapes of its factors, and the weight it makes as its paper writes it
    "low-rank": (LowRank, [(R, COLUMNS), (ROWS, R)], lambda w, a, b: w + SCALE * b @ a),
    "hadamard": (Hadamard, [(ROWS, R), (R, COLUMNS)] * 2, lambda w, *f: w + SCALE * hadamard_reference(*f)),
    "hadamard of a high rank": (
        Hadamard,
        [(ROWS, 5), (5, COLUMNS)] * 2,
        lambda w, *f: w + SCALE * hadamard_reference(*f),
    ),
    "kronecker": (Kronecker, [(3, 2), (2, R), (R, 4)], lambda w, w1, o, i: w + SCALE * torch.kron(w1, o @ i)),
    "whole kronecker": (Kronecker, [(3, 2), (2, 4)], lambda w, w1, w2: w + SCALE * torch.kron(w1, w2)),
    "magnitude": (Magnitude, [(R, COLUMNS), (ROWS, R), (ROWS,)], magnitude_reference),
}
every_rule = pytest.mark.parametrize("name", list(RULES))


def operands(name, lead=(5, 3), dtype=torch.float64, transposed=False):
    rule, shapes, reference = RULES[name]
    weight = torch.randn(COLUMNS, ROWS, dtype=dtype).t() if transposed else torch.randn(ROWS, COLUMNS, dtype=dtype)
    factors = [make(*shape, dtype=dtype) for shape in shapes]
    return rule(SCALE), make(*lead, COLUMNS, dtype=dtype), weight, make(ROWS, dtype=dtype), factors, reference


@every_rule
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("producer", [lambda x: x, F.gelu], ids=["saved", "recomputed"])
def test_a_reweighted_layer_equals_its_reference_and_so_do_its_gradients(name, transposed, producer):
    rule, x, weight, bias, factors, reference = operands(name, transposed=transposed)
    leaves, memo = [x, bias, *factors], Memo()
    expected = F.linear(producer(x), reference(weight, *factors), bias)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    for _ in range(2):  # the first step watches what becomes of the output
        found = reweighted_linear(rule, producer(x), weight, bias, factors, memo)
        assert type(found.grad_fn).__name__ == "_ReweightedBackward"
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), leaves), expected_gradients)
    with torch.no_grad():
        assert torch.equal(reweighted_linear(rule, producer(x), weight, bias, factors), found)


@every_rule
@pytest.mark.parametrize("bias", [True, False], ids=["", "without bias"])
def test_second_derivatives_of_reweighted_layers(name, bias):
    rule, x, weight, offset, factors, _ = operands(name, lead=(4,))
    function = lambda x, *factors: reweighted_linear(rule, x, weight, offset if bias else None, factors)  # noqa: E731
    if name != "magnitude":  # whose norm is a constant by definition, which a numerical gradient cannot know
        assert torch.autograd.gradcheck(function, (x, *factors))
    if name not in ("magnitude", "hadamard of a high rank"):
        assert torch.autograd.gradgradcheck(function, (x, *factors))


def test_second_derivatives_with_magnitudes_are_those_of_the_formula():
    rule, x, weight, bias, factors, reference = operands("magnitude")
    leaves, memo = [x, *factors], Memo()

    def second(function):
        first = torch.autograd.grad(function().sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    # In both the norm is a constant of the first derivative; the second sees it as the reference's graph does.
    expected = second(lambda: F.linear(x, reference(weight, *factors), bias))
    for _ in range(2):
        found = second(lambda: reweighted_linear(rule, x, weight, bias, factors, memo))
        torch.testing.assert_close(found, expected)


# -- magnitudes without the changed weight -----------------------------------------------------------------------------


def unbuilt_reference(x, weight, bias, a, b, m, mask=None):
    norms = (weight + SCALE * b @ a).norm(dim=1).detach()
    update = F.linear(F.linear(x if mask is None else x * mask, a), b) * SCALE
    return (F.linear(x, weight) + update) * (m / norms) + (0 if bias is None else bias)


@pytest.mark.parametrize("bias", [True, False], ids=["", "without bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("producer", [lambda x: x, F.gelu], ids=["saved", "recomputed"])
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["", "dropout"])
def test_magnitudes_over_products_equal_the_formula_with_all_gradients(bias, transposed, producer, rate):
    _, x, weight, offset, factors, _ = operands("magnitude", transposed=transposed)
    offset = offset if bias else None
    leaves, memo = [x, *factors, *([offset] if bias else [])], Memo()
    for step in range(3):  # the first step watches what becomes of the output
        torch.manual_seed(step)
        found = magnitude_linear(producer(x), weight, offset, *factors, SCALE, rate, memo)
        torch.manual_seed(step)
        mask = None
        if rate > 0:
            mask = keep_mask(x.shape, x.device, rate, draw_seed(), x.dtype) / kept_share(rate)
            assert {0.0} < set(mask.unique().tolist())
        expected = unbuilt_reference(producer(x), weight, offset, *factors, mask)
        torch.testing.assert_close(found, expected)

        def second(y):
            first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

        create_graph = step == 1
        take = second if create_graph else lambda y: torch.autograd.grad(y.sin().sum(), leaves)
        torch.testing.assert_close(take(found), take(expected))


def test_magnitudes_in_half_precision_are_rounded_once_and_keep_nothing_wide():
    torch.manual_seed(0)
    tokens = torch.randn(64, 32).bfloat16().requires_grad_()
    weight, bias = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16()
    a, b, m = make(4, 32, dtype=torch.float32), make(48, 4, dtype=torch.float32), make(48, dtype=torch.float32)
    y = magnitude_linear(tokens, weight, bias, a, b, m, SCALE)
    assert y.dtype == torch.bfloat16
    kept = saved_by_node(y.sum(), exclude=[weight, bias, a, b, m])["_MagnitudeLinearBackward"]
    assert kept == (tokens.numel() + y.numel()) * 2 + (4 * 64 + 48) * 4  # x, y, x aᵀ and norms
    wide = [t.detach().double().requires_grad_() for t in (tokens, a, b, m)]
    expected = unbuilt_reference(wide[0], weight.double(), bias.double(), *wide[1:])
    exact = torch.autograd.grad(expected.square().sum(), wide)
    torch.testing.assert_close(y.double(), expected, atol=4e-2, rtol=1e-2)
    found = torch.autograd.grad(y.float().square().sum(), (tokens, a, b, m))
    for g, e in zip(found, exact, strict=True):
        assert (g.double() - e).norm() < 0.01 * e.norm()


def test_magnitudes_leave_plain_operations_what_is_theirs():
    _, x, weight, bias, factors, _ = operands("magnitude", dtype=torch.float32)
    take = lambda: magnitude_linear(x, weight, bias, *factors, SCALE)  # noqa: E731
    assert take() is not None
    with torch.no_grad():
        assert take() is None
    with torch.autocast("cpu", torch.bfloat16):
        assert take() is None
    weight.requires_grad_()
    assert take() is None


@every_rule
def test_half_precision_autocast_and_trained_weights_keep_their_own_forms(name):
    _, x, weight, _, factors, _ = operands(name, dtype=torch.float32)
    assert may_reweight(x, weight, factors)
    assert not may_reweight(x.bfloat16(), weight.bfloat16(), [f.bfloat16() for f in factors])
    assert not may_reweight(x, weight, [f.double() for f in factors])
    assert not may_reweight(x, weight.requires_grad_(), factors)
    weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_reweight(x, weight, factors)


@pytest.mark.parametrize("tokens, reweighted", [(6, False), (7, True)])
def test_few_tokens_take_the_low_rank_product_and_many_the_changed_weight(tokens, reweighted):
    x, weight, a, b = make(tokens, COLUMNS), torch.randn(ROWS, COLUMNS).double(), make(R, COLUMNS), make(ROWS, R)
    out = low_rank_linear(x, weight, None, a, b, SCALE)
    assert type(out.grad_fn).__name__ == ("_ReweightedBackward" if reweighted else "_LowRankBackward")
    torch.testing.assert_close(out, F.linear(x, weight + SCALE * b @ a))
    dropped = low_rank_linear(x, weight, None, a, b, SCALE, 0.5)
    assert type(dropped.grad_fn).__name__ == "_LowRankBackward"


def test_an_update_of_zero_leaves_the_product_as_it_is_bit_for_bit():
    for weight in (torch.randn(64, 32), torch.randn(32, 64).t()):
        x, a, b = torch.randn(100, 32), torch.randn(4, 32), torch.zeros(64, 4)
        with torch.no_grad():
            assert torch.equal(reweighted_linear(LowRank(2.0), x, weight, None, (a, b)), F.linear(x, weight))


# -- memory that is used again ---------------------------------------------------------------------------------------


def test_workspaces_belong_to_one_thread_and_no_graph():
    like = torch.randn(4, 6)
    assert workspace(0, like) is None  # a graph is recorded
    with torch.no_grad():
        first = workspace(0, like)
        assert first.data_ptr() == workspace(0, like).data_ptr() != workspace(1, like).data_ptr()
        assert workspace(0, like.t()).stride() == like.t().stride()
        assert workspace(0, torch.empty(1 << 23)).data_ptr() != workspace(0, torch.empty(1 << 23)).data_ptr()
        with torch.inference_mode():
            workspace(2, like)
        workspace(2, like).zero_()
        others = []

        def other():
            with torch.no_grad():
                others.append(workspace(0, like))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert others[0].data_ptr() != first.data_ptr()


# -- scaled features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_input", [True, False], ids=["input", "output"])
@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scaled_layers_equal_the_formula_and_so_do_their_gradients(of_input, tokens, dtype):
    x, weight = make(2, tokens, COLUMNS, dtype=dtype), torch.randn(ROWS, COLUMNS, dtype=dtype)
    bias, scale = make(ROWS, dtype=dtype), make(COLUMNS if of_input else ROWS, dtype=torch.float64)
    if dtype != torch.float64:
        scale = scale.detach().float().requires_grad_()
    leaves, memo = [x, bias, scale], Memo()
    wide = [t.double() for t in (x, weight, bias, scale)]
    expected = F.linear(wide[0] * wide[3], wide[1], wide[2]) if of_input else F.linear(*wide[:3]) * wide[3]
    expected_gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    for _ in range(2):
        found = scaled_linear(x, weight, bias, scale, memo, of_input=of_input)
        gradients = torch.autograd.grad(found.double().sin().sum(), leaves)
        for one, two in zip((found, *gradients), (expected, *expected_gradients), strict=True):
            assert (one.double() - two.double()).norm() <= tolerance * two.double().norm()


def test_a_scale_of_zero_still_gets_its_gradient():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    scale = model.base_model.model[0].ia3_l["default"]
    x = torch.randn(5, 4)
    with torch.no_grad():
        scale[1] = 0.0
    for _ in range(2):
        scale.grad = None
        model(x).sum().backward()
    assert scale.grad[1].abs() > 0.0


def test_second_derivatives_of_a_scaled_output_are_refused_and_to_be_had():
    x, weight, scale = make(5, COLUMNS), torch.randn(ROWS, COLUMNS).double(), make(ROWS)
    out = scaled_linear(x, weight, None, scale, Memo(), of_input=False)
    with pytest.raises(RuntimeError, match="recompute_inputs"):
        torch.autograd.grad(out.sum(), [x, scale], create_graph=True)
    with recompute_inputs(False):
        assert scaled_linear(x, weight, None, scale, Memo(), of_input=False) is None
    function = lambda x, scale: scaled_linear(x, weight, None, scale, Memo(), of_input=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, make(COLUMNS)))
    assert torch.autograd.gradgradcheck(function, (x, make(COLUMNS)))


# -- outputs that are kept -------------------------------------------------------------------------------------------

KEEPING = {
    "dora": lambda: LoraConfig(target_modules=["layer"], r=2, use_dora=True, init_lora_weights=False),
    "ia3": lambda: IA3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False),
}


class Net(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = self.layer(F.gelu(x))
        if self.change:
            y += 1.0
        return F.gelu(y)


@pytest.mark.parametrize("method", list(KEEPING))
@pytest.mark.parametrize("change", [False, True], ids=["", "changed in place"])
def test_an_output_is_kept_only_where_nothing_changes_it(method, change):
    model = get_peft_model(Net(change), KEEPING[method]())
    layer = model.base_model.model.layer
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(24, 16, requires_grad=True)
    plain = copy_with_plain_operations(model, x, trained)
    for _ in range(3):
        out = model(x)
        kept = saved_by_node(out, model.parameters())
        gradients = torch.autograd.grad(out.sum(), trained)
        for one, two in zip(gradients, plain, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert layer.memo.output_stays is not change
    # GELU keeps the output in any case: the layer's node adds nothing of an activation's size, or a copy.
    assert (sum(kept.values()) >= 3 * x.nbytes) == change


def copy_with_plain_operations(model, x, trained):
    few, modes.FEW = modes.FEW, 1 << 60
    try:
        with recompute_inputs(False), torch.autocast("cpu", enabled=False):
            model.base_model.model.layer.cast_input_dtype_enabled = True
            y = model.base_model.model.layer
            gelu = F.gelu(x)
            inner = y.adapted(gelu, y.base_layer(gelu))
            return torch.autograd.grad(F.gelu(inner + 1.0 if model.base_model.model.change else inner).sum(), trained)
    finally:
        modes.FEW = few


# -- several adapters at once ----------------------------------------------------------------------------------------


def test_stacked_products_are_those_of_each_adapter():
    x = torch.randn(3, 5, COLUMNS)
    factors = [torch.randn(3, *shape) for shape in RULES["hadamard"][1]]
    w1_a, w1_b, w2_a, w2_b = factors
    found = hadamard_stacked(x, w1_a, w1_b, w2_a.mT.contiguous(), w2_b)
    expected = torch.stack([x[i] @ hadamard_reference(*(f[i] for f in factors)).T for i in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    w1, w2 = torch.randn(3, 3, 2), torch.randn(3, 2, 4)
    expected = torch.stack([x[i] @ torch.kron(w1[i], w2[i]).T for i in range(3)])
    torch.testing.assert_close(kronecker_stacked(x, w1, w2), expected, atol=1e-4, rtol=1e-4)


# -- what a frozen layer makes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["", "without bias"])
def test_what_a_frozen_layer_makes_of_a_recomputed_input_is_made_again(bias):
    frozen = nn.Linear(8, 8, bias=bias, dtype=torch.float64).requires_grad_(False)
    h, weight, offset = make(5, 8), make(3, 8), make(3)
    for producer, kept in ((F.gelu, False), (torch.tanh, True)):  # tanh is not in the table of producers
        memo = Memo()

        def function(h, weight, offset, producer=producer, memo=memo):
            x = producer(h)
            return linear(frozen(x), weight, offset, memo, Source(x, frozen.weight, frozen.bias))

        assert torch.autograd.gradcheck(function, (h, weight, offset))
        assert torch.autograd.gradgradcheck(function, (h, weight, offset))
        assert (function(h, weight, offset).grad_fn.saved_tensors[0] is not None) == kept


def test_a_source_that_gives_something_else_is_not_believed():
    frozen = nn.Linear(8, 8).requires_grad_(False)
    h, weight, offset = (make(*shape, dtype=torch.float32) for shape in ((5, 8), (3, 8), (3,)))
    x, memo = F.gelu(h), Memo()
    out = linear(frozen(x) + 1.0, weight, offset, memo, Source(x, frozen.weight, frozen.bias))
    assert memo.repeats is False and out.grad_fn.saved_tensors[0] is not None
