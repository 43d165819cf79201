"""The loss under a head that does not train: the numbers of the general path, in PyTorch and in Triton."""

import copy

import pytest
import torch
from torch import nn

from lizard_models.distill.frozen_head import SoftCapped, is_frozen, row_losses
from lizard_models.distill.losses import IGNORED, distillation_loss
from lizard_ops.lm_loss import triton_op as loss_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_are_those_of_a_head_that_trains(weights, cap, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, device=DEVICE, dtype=dtype)
    teacher_hidden = torch.randn_like(hidden)
    linear = nn.Linear(8, 301).to(DEVICE, dtype)
    head = linear if cap is None else SoftCapped(linear, cap)
    targets = torch.randint(301, (2, 9), device=DEVICE)
    targets[0, -1] = targets[1, 4:] = IGNORED
    found = []
    for trains in (True, False):
        student_head = copy.deepcopy(head).requires_grad_(trains)
        assert is_frozen(student_head) is not trains
        leaf = hidden.clone().requires_grad_()
        loss = distillation_loss(
            leaf, student_head, targets, teacher_hidden=teacher_hidden, teacher_head=student_head,
            cross_entropy_weight=weights[0], kl_weight=weights[1], chunk=4,
        )  # fmt: skip
        (0.5 * loss).backward()  # as with two micro batches a step
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].dtype == torch.float32 and not found[1][1][1, 4:].any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [64, 301])
def test_the_kernel_says_the_same_as_pytorch(weights, dtype, columns, monkeypatch):
    monkeypatch.setattr(loss_kernel, "BLOCK", 64)
    torch.manual_seed(1)
    wide = 5 * torch.randn(5, columns + 3, device=DEVICE)
    wide[1, 2], wide[2, :70] = 300.0, float("-inf")  # nearly certain; a first block without a token
    student, teacher = wide[:, :columns].to(dtype), (wide[:, 3:] + torch.randn_like(wide[:, 3:])).to(dtype)
    if weights[1]:  # the divergence to a student that excludes a token is not finite
        student, teacher = (logits.nan_to_num(neginf=-1e4) for logits in (student, teacher))
    else:
        teacher = None
    targets = torch.tensor([0, 2, columns - 2, 5, columns - 1], device=DEVICE)
    if columns == 64:
        student, teacher, targets = student[[0, 1, 3]], None if teacher is None else teacher[[0, 1, 3]], targets[:3]
    exact = student.double().requires_grad_()
    log_student = exact.log_softmax(-1)
    wanted = -weights[0] * log_student.gather(1, targets[:, None])[:, 0]
    if teacher is not None:
        p = teacher.double().softmax(-1)
        wanted = wanted + weights[1] * (torch.special.xlogy(p, p) - p * log_student).sum(-1)
    (gradient,) = torch.autograd.grad(wanted.sum() * 0.25, exact)
    for impl in ("torch", "triton"):
        values = student.clone()
        losses = row_losses(values, teacher, targets, *weights, 0.25, impl)
        torch.testing.assert_close(losses, wanted.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, gradient.to(dtype), rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=2e-6)
        untouched = student.clone()
        assert torch.equal(row_losses(untouched, teacher, targets, *weights, None, impl), losses)
        assert torch.equal(untouched, student)


def test_the_head_runs_once_a_chunk():
    calls = 0

    class Counted(nn.Linear):
        def forward(self, hidden):
            nonlocal calls
            calls += 1
            return super().forward(hidden)

    head = Counted(8, 30).requires_grad_(False)
    hidden = torch.randn(1, 10, 8, requires_grad=True)
    distillation_loss(hidden, head, torch.zeros(1, 10, dtype=torch.long), chunk=4).backward()
    assert calls == 3 and hidden.grad is not None


def test_no_gradient_is_formed_where_none_is_asked_for():
    head = nn.Linear(8, 30).requires_grad_(False)
    hidden = torch.randn(1, 10, 8, requires_grad=True)
    targets = torch.zeros(1, 10, dtype=torch.long)
    with torch.no_grad():
        loss = distillation_loss(hidden, head, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, distillation_loss(hidden, head, targets).detach())
