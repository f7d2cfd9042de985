"""Kernels against their plain reference forms: values, gradients, dtypes and odd shapes."""

from __future__ import annotations

import pytest
import torch

from peft.kernels.low_rank import add_low_rank, add_low_rank_reference


def operands(lead=(2, 3), k=5, d=4, r=2, dtype=torch.float64):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    return make(*lead, d), make(*lead, k), make(r, k), make(d, r)


@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 4), (), (0, 3), (1,)])
def test_low_rank_equals_its_reference(lead):
    y, x, a, b = operands(lead)
    torch.testing.assert_close(add_low_rank(y, x, a, b, 0.7), add_low_rank_reference(y, x, a, b, 0.7))


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
