"""Readings of the attention's error against their formulas."""

import pytest
import torch
from tiny import student, tokens

from lizard_models.evaluation import attention_errors
from lizard_models.model.layer_loss import output_error
from lizard_models.recipes import Stage1Config


def outputs(model, ids):
    """Heads [L, B, T, H, D] of student and teacher, every layer on the teacher's stream."""
    students, targets = [], []
    for attention in model.lizard_attentions():
        attention.lizard.register_forward_hook(lambda m, i, o: students.append(o[0]))
        attention.o_proj.register_forward_pre_hook(lambda m, i: targets.append(i[0]))
    model.set_attention_mode("distill", Stage1Config(target="heads"))
    with torch.no_grad():
        model(input_ids=ids)
    return torch.stack(students), torch.stack(targets).view_as(torch.stack(students))


def test_every_reading_is_its_formula():
    ids = tokens(3, 140)
    found = attention_errors(student(), ids)
    got, wanted = (t.double() for t in outputs(student(), ids))
    error, target = (got - wanted).square(), wanted.square()
    heads = error.sum((1, 2, 4)) / target.sum((1, 2, 4))
    weights = torch.stack([a.o_proj.weight.double() for a in student().lizard_attentions()])
    after = [
        torch.einsum("lbtd,led->lbte", t.flatten(3), weights).square().sum((1, 2, 3)) for t in (got - wanted, wanted)
    ]
    assert found.readings() == pytest.approx(
        {
            "head mean": heads.mean().item(),
            "head median": heads.median().item(),
            "head geometric": heads.prod().item() ** (1 / heads.numel()),
            "layer pooled": (error.sum((1, 2, 3, 4)) / target.sum((1, 2, 3, 4))).mean().item(),
            "pooled": (error.sum() / target.sum()).item(),
            "token mean": (error.sum(-1) / target.sum(-1)).mean().item(),
            "output mean": (after[0] / after[1]).mean().item(),
            "output pooled": (after[0].sum() / after[1].sum()).item(),
            "root": heads.sqrt().mean().item(),
        },
        rel=1e-4,
    )
    assert found.edges == (0, 128, 140) and found.tokens.tolist() == [384, 36]
    late = (error[:, :, 128:].sum((1, 2, 4)) / target[:, :, 128:].sum((1, 2, 4))).mean().item()
    assert found.by_position()[1] == pytest.approx(late, rel=1e-4)
    torch.testing.assert_close(found.per_head(), heads, rtol=1e-4, atol=0)


def test_the_head_mean_is_what_stage_1_trains_and_the_mode_is_put_back():
    model, ids = student(), tokens(2, 40)
    found = attention_errors(model, ids, batch_size=2)
    assert model.mode == "student" and model.lizard_attentions()[0].mode == "student"
    model.set_attention_mode("distill", Stage1Config(error="relative"))
    with torch.no_grad():
        loss = model(input_ids=ids).loss.item()
    assert found.readings()["head mean"] == pytest.approx(loss, rel=1e-5)
    assert set(found.to_dict()) == {"readings", "edges", "by_position", "by_layer", "by_head"}


@pytest.mark.parametrize("kind", ["relative", "mse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_error_and_gradient_against_float64(kind, dtype, padded):
    torch.manual_seed(0)
    target = torch.randn(2, 7, 3, 5).to(dtype)
    got = (target + 0.1 * torch.randn(2, 7, 3, 5)).to(dtype).requires_grad_()
    target[:, :, 1] = 0.0 if kind == "mse" else target[:, :, 1]
    mask = torch.ones(2, 7, dtype=torch.bool) if padded else None
    exact = got.detach().double().requires_grad_()
    squares = (exact - target.double()).square()
    wanted = squares.mean()
    if kind == "relative":
        wanted = (squares.sum((0, 1, 3)) / target.double().square().sum((0, 1, 3))).mean()
    error = output_error(got, target, kind, mask)
    (gradient,) = torch.autograd.grad(3 * error, got)
    assert error.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(error.double(), wanted, rtol=1e-5, atol=0)
    (reference,) = torch.autograd.grad(3 * wanted, exact)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-5 if dtype != torch.bfloat16 else 5e-3, atol=1e-9)


def test_a_target_of_zeros_gives_no_error_to_itself():
    assert output_error(torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 3), "relative").item() == 0.0
