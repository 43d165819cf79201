"""Losses of rows of logits and their gradients, in PyTorch and in Triton, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import row_losses


def make(rows, columns, dtype, teacher):
    torch.manual_seed(rows + columns)
    student = (4 * torch.randn(rows, columns, device=DEVICE)).to(dtype)
    targets = torch.randint(columns, (rows,), device=DEVICE)
    return student, torch.randn_like(student) if teacher else None, targets


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 70), (1, 2049), (3, 1)])
def test_losses_and_gradients_are_those_of_autograd(impl, teacher, dtype, shape):
    student, given, targets = make(*shape, dtype, teacher)
    exact = student.double().requires_grad_()
    log_student = exact.log_softmax(-1)
    wanted = 0.5 * torch.nn.functional.nll_loss(log_student, targets, reduction="none")
    if given is not None:
        log_teacher = given.double().log_softmax(-1)
        wanted = wanted + 2.0 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    (gradient,) = torch.autograd.grad(wanted.sum() * 0.25, exact)
    values = student.clone()
    losses = row_losses(values, given, targets, 0.5, 2.0, 0.25, impl=impl)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, gradient.to(dtype), rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=2e-6)
    kept = student.clone()
    assert torch.equal(row_losses(kept, given, targets, 0.5, 2.0, impl=impl), losses) and torch.equal(kept, student)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_rows_have_no_losses(impl):
    student, _, targets = make(0, 8, torch.float32, False)
    assert row_losses(student, None, targets, 1.0, 0.0, 1.0, impl=impl).shape == (0,)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("student", {"student": torch.zeros(4)}),
        ("student", {"student": torch.zeros(4, 8, dtype=torch.int64)}),
        ("student", {"student": torch.zeros(8, 4).T}),
        ("teacher", {"teacher": torch.zeros(4, 7)}),
        ("targets", {"targets": torch.zeros(4)}),
        ("targets", {"targets": torch.zeros(5, dtype=torch.int64)}),
        ("impl", {"impl": "fast"}),
    ],
)
def test_bad_arguments_are_refused_by_name(name, changes):
    given = {"student": torch.zeros(4, 8), "teacher": None, "targets": torch.zeros(4, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=f"^{name}:"):
        row_losses(**given, cross_entropy_weight=1.0, kl_weight=0.0)
