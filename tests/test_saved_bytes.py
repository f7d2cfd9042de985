"""The benchmark's counter of saved bytes, on graphs whose answer is known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.saved_bytes import saved_by_node, saved_bytes

ROWS, IN, OUT = 4, 8, 16
FLOAT = 4


def _input(requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(ROWS, IN, requires_grad=requires_grad)


def test_trained_linear_saves_its_input_and_its_weight() -> None:
    linear, x = nn.Linear(IN, OUT), _input()
    y = linear(x)
    assert saved_bytes(y) == (ROWS * IN + OUT * IN) * FLOAT
    assert saved_bytes(y, linear.parameters()) == ROWS * IN * FLOAT


def test_frozen_linear_saves_its_weight_alone() -> None:
    linear = nn.Linear(IN, OUT).requires_grad_(False)
    y = linear(_input())
    assert saved_bytes(y) == OUT * IN * FLOAT
    assert saved_bytes(y, linear.parameters()) == 0


def test_gelu_saves_its_input() -> None:
    x = _input()
    assert saved_by_node(F.gelu(x)) == {"GeluBackward0": ROWS * IN * FLOAT}


def test_saved_output_counts() -> None:
    assert saved_bytes(_input().exp()) == ROWS * IN * FLOAT


def test_dtype_counts() -> None:
    assert saved_bytes(F.gelu(_input().to(torch.bfloat16))) == ROWS * IN * 2


def test_shared_input_counts_once() -> None:
    query, key, x = nn.Linear(IN, OUT), nn.Linear(IN, OUT), _input()
    parameters = [*query.parameters(), *key.parameters()]
    assert saved_bytes(query(x) + key(x), parameters) == ROWS * IN * FLOAT
    assert saved_bytes([query(x), key(x)], parameters) == ROWS * IN * FLOAT


def test_a_view_counts_the_whole_storage_once() -> None:
    x = _input()
    base = x.clone()
    assert saved_bytes(F.gelu(base[0])) == ROWS * IN * FLOAT
    assert saved_bytes([F.gelu(base[0]), F.gelu(base.t()), F.gelu(base)]) == ROWS * IN * FLOAT


def test_views_of_an_excluded_tensor_do_not_count() -> None:
    weight = torch.randn(IN, OUT)
    assert saved_bytes(_input() @ weight.t().t()[:, :4], [weight]) == 0


def test_lists_of_saved_tensors_count() -> None:
    index = torch.tensor([0, 1])
    y = _input().index_put((index,), torch.ones(()))
    assert saved_bytes(y) == index.numel() * 8


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep=None):
        ctx.save_for_backward(x, None)
        if keep is not None:
            ctx.keep = {"inside": [keep]}
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad, None


def test_custom_function_counts_what_it_saved() -> None:
    assert saved_by_node(_Square.apply(_input())) == {"_SquareBackward": ROWS * IN * FLOAT}


def test_tensors_on_ctx_do_not_escape_the_count() -> None:
    y = _Square.apply(_input(), torch.zeros(10))
    assert saved_bytes(y) == (ROWS * IN + 10) * FLOAT


def _two_gelus(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.gelu(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_part_keeps_its_input_alone(use_reentrant: bool) -> None:
    x = _input()
    assert saved_bytes(_two_gelus(x)) == 2 * ROWS * IN * FLOAT
    calls = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return _two_gelus(x)

    y = checkpoint(part, x, use_reentrant=use_reentrant, preserve_rng_state=False)
    assert saved_bytes(y) == ROWS * IN * FLOAT
    assert len(calls) == 1, "counting must not recompute"
    y.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_random_state(use_reentrant: bool) -> None:
    y = checkpoint(_two_gelus, _input(), use_reentrant=use_reentrant)
    assert saved_bytes(y) == ROWS * IN * FLOAT + torch.get_rng_state().nbytes


def test_packed_tensors_count_and_hooks_stay_uncalled() -> None:
    def unpack(packed: tuple[torch.Tensor]) -> torch.Tensor:
        raise AssertionError("counting must not unpack")

    x = _input()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor.to(torch.bfloat16),), unpack):
        y = F.gelu(x)
    assert saved_bytes(y) == ROWS * IN * 2


def test_counting_is_repeatable_and_leaves_the_graph_usable() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.GELU(), nn.Dropout(0.5), nn.Linear(OUT, IN))
    counts = []
    for _ in range(2):
        x = _input()
        loss = model(x).sum()
        counts += [saved_bytes(loss, model.parameters()), saved_bytes(loss, model.parameters())]
        loss.backward()
        assert x.grad is not None
    assert len(set(counts)) == 1


@pytest.mark.parametrize("function", [F.gelu, _Square.apply])
def test_freed_graph_raises(function) -> None:
    y = function(_input())
    y.sum().backward()
    with pytest.raises(ValueError, match="already freed"):
        saved_bytes(y)


def test_output_without_graph_raises() -> None:
    with pytest.raises(ValueError, match="no autograd graph"):
        saved_bytes(_input(requires_grad=False))
    with pytest.raises(ValueError, match="no autograd graph"):
        saved_bytes(_input())
