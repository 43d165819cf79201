"""Schedule, losses, parameter groups: the parts of distillation against their formulas."""

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import student
from torch import nn

from lizard_models.cli import linearize
from lizard_models.cli.options import read_resume
from lizard_models.distill.arguments import RunArguments, total_steps, training_arguments
from lizard_models.distill.losses import IGNORED, distillation_loss, next_tokens, position_losses
from lizard_models.distill.schedule import cosine_schedule, rate_at
from lizard_models.distill.trainer import StageResult, parameter_groups
from lizard_models.recipes import Stage1Config
from lizard_models.runs.linearize_run import Plan


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [rate_at(step, 100, 0.1, 0.1) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    middle = 10 + 89 / 2
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx(0.55, abs=1e-3)
    assert [rate_at(step, 3, 0.0, 0.1) for step in range(3)] == [1.0, pytest.approx(0.55), pytest.approx(0.1)]


def test_every_group_keeps_its_own_peak():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-2, 1e-3)]
    optimizer = torch.optim.AdamW(groups)
    schedule = cosine_schedule(optimizer, 20, 0.1, 0.1)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-3])


@pytest.mark.parametrize(("entries", "counted"), [(1, 1), (9, 1), (19, 1), (20, 2), (27, 2), (30, 3)])
def test_the_final_loss_is_the_mean_of_the_last_tenth(entries, counted):
    losses = [(step, 1.0 / step) for step in range(1, entries + 1)]
    wanted = sum(1.0 / step for step in range(entries - counted + 1, entries + 1)) / counted
    assert StageResult(entries, 1.0, losses).final_loss == pytest.approx(wanted)


def test_the_command_a_plan_and_a_run_train_alike_unless_told():
    """What stands in the help is what a caller from Python gets."""
    told = {name: p.default for name, p in inspect.signature(linearize.command).parameters.items()}
    told["resume"] = read_resume(told["resume"])  # nothing after an option is None there
    told["report_to"] = tuple(filter(None, (told["report_to"] or "").split(",")))  # names with commas between them
    plan, run = ({field.name: field.default for field in dataclasses.fields(kind)} for kind in (Plan, RunArguments))
    shared = told.keys() & run.keys()
    assert {"save_steps", "compile", "resume"} < shared
    for name in shared:
        assert told[name] == plan[name] == run[name], name


def test_only_weights_that_read_the_input_get_the_gate_rate():
    model = student()
    for _, parameter in model.lizard_parameters():
        parameter.requires_grad_(True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    common, reading = parameter_groups(model, 1e-2, 1e-3)
    assert (common["lr"], reading["lr"]) == (1e-2, 1e-3)
    layer = {names[p].partition(".lizard.")[2] for p in reading["params"]}
    assert layer == {"gate.weight", "mix.weight"}
    assert {"gate.bias", "mix.bias"} <= {names[p].partition(".lizard.")[2] for p in common["params"]}
    (only,) = parameter_groups(model, 1e-2, None)
    assert len(only["params"]) == len(common["params"]) + len(reading["params"])


def test_new_parameters_may_have_a_rate_of_their_own_beside_adapters():
    model = student()
    adapted = model.model.layers[0].mlp.up_proj.weight
    for parameter in (adapted, *(p for _, p in model.lizard_parameters())):
        parameter.requires_grad_(True)
    rates = {p: group["lr"] for group in parameter_groups(model, 5e-4, None, 5e-3) for p in group["params"]}
    assert rates.pop(adapted) == 5e-4
    assert set(rates.values()) == {5e-3}
    assert len(parameter_groups(model, 5e-4, 1e-3, 5e-3)) == 3


def test_targets_leave_out_padding_and_ends():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_tokens(ids).tolist() == [[6, 7, 8, IGNORED]]
    left, right = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0]])
    assert next_tokens(ids, left).tolist() == [[IGNORED, 7, 8, IGNORED]]
    assert next_tokens(ids, right).tolist() == [[6, 7, IGNORED, IGNORED]]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_the_chunked_loss_is_the_plain_one(weights):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 2, 11, 8)
    head, teacher_head = nn.Linear(8, 30), nn.Linear(8, 30)
    hidden.requires_grad_(True)
    targets = torch.randint(30, (2, 11))
    targets[0, 3:5] = targets[:, -1] = IGNORED

    def plain() -> torch.Tensor:
        log_student = head(hidden).log_softmax(-1)[targets != IGNORED]
        teacher = teacher_head(teacher_hidden).softmax(-1)[targets != IGNORED]
        entropy = F.nll_loss(log_student, targets[targets != IGNORED])
        divergence = (teacher * (teacher.log() - log_student)).sum(-1).mean()
        return weights[0] * entropy + weights[1] * divergence

    def chunked(chunk: int) -> torch.Tensor:
        return distillation_loss(
            hidden, head, targets, teacher_hidden=teacher_hidden, teacher_head=teacher_head,
            cross_entropy_weight=weights[0], kl_weight=weights[1], chunk=chunk,
        )  # fmt: skip

    wanted = torch.autograd.grad(plain(), (hidden, head.weight))
    for chunk in (1, 4, 512):
        torch.testing.assert_close(chunked(chunk), plain())
        torch.testing.assert_close(torch.autograd.grad(chunked(chunk), (hidden, head.weight)), wanted)


def test_kl_to_itself_is_zero_and_weighs_no_padding():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 6, 8), nn.Linear(8, 30)
    targets = torch.tensor([[1, 2, 3, IGNORED, IGNORED, IGNORED]])
    other = hidden.clone()
    other[:, 3:] += 10.0  # differs at padding alone
    loss = distillation_loss(
        hidden, head, targets, teacher_hidden=other, teacher_head=head, cross_entropy_weight=0.0, kl_weight=1.0
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_losses_refuse_what_they_cannot_do():
    hidden, head = torch.zeros(1, 2, 8), nn.Linear(8, 30)
    with pytest.raises(ValueError, match="kl_weight=1.0 needs teacher_hidden"):
        distillation_loss(hidden, head, torch.tensor([[1, IGNORED]]), kl_weight=1.0)
    with pytest.raises(ValueError, match="no position counts"):
        distillation_loss(hidden, head, torch.full((1, 2), IGNORED))


@pytest.mark.parametrize("trains", [True, False])
def test_full_logits_never_exist(trains):
    """The largest tensor of a forward and backward is one chunk's logits."""
    hidden, head = torch.randn(1, 1024, 8, requires_grad=True), nn.Linear(8, 1000).requires_grad_(trains)
    targets = torch.randint(1000, (1, 1024))
    largest = 0
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        distillation_loss(
            hidden, head, targets, teacher_hidden=hidden.detach(), teacher_head=head, kl_weight=1.0, chunk=64
        ).backward()
        position_losses(hidden, head, targets, chunk=64)
    assert largest <= 64 * 1000


def test_position_losses_are_cross_entropies():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(2, 7, 8), nn.Linear(8, 30), torch.randint(30, (2, 7))
    targets[1, 2] = IGNORED
    losses = position_losses(hidden, head, targets, chunk=3)
    wanted = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    torch.testing.assert_close(losses, wanted)
    assert losses[1, 2] == 0


def test_steps_and_batches(tmp_path):
    recipe = Stage1Config(epochs=2.0, batch_size=8)
    assert total_steps(recipe, [None] * 21) == 6  # type: ignore[arg-type]
    assert total_steps(Stage1Config(epochs=None, max_steps=3), iter([])) == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_steps must be given"):
        total_steps(recipe, iter([]))  # type: ignore[arg-type]
    run = RunArguments(output_dir=tmp_path, device="cpu", micro_batch_size=2)
    arguments = training_arguments(recipe, run, 6)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 4)
    assert training_arguments(Stage1Config(max_grad_norm=0.3), run, 6).max_grad_norm == 0.3
    with pytest.raises(ValueError, match="batch_size=8 is not a multiple of micro_batch_size=3"):
        training_arguments(recipe, RunArguments(output_dir=tmp_path, device="cpu", micro_batch_size=3), 6)
