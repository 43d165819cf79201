"""A step as a CUDA graph: what of it shows without a GPU. benchmarks/gpu/train_step.py compares the rest on one."""

from unittest.mock import MagicMock

import pytest
import torch
from tiny import student, tokens

from lizard_models.distill import RunArguments, train_stage2
from lizard_models.distill.graphed import GraphedForward, _HandOut, graphed
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.recipes import Stage2Config


def objective():
    model = student()
    model.set_attention_mode("distill")
    for _, parameter in model.lizard_parameters():
        parameter.requires_grad_(True)
    return AttentionTransfer(model)


def test_on_a_cpu_the_objective_itself_runs_and_keeps_its_names():
    made, ids = objective(), tokens(2, 40)
    names = [name for name, _ in made.named_parameters()]
    with graphed(made):
        assert [name for name, _ in made.named_parameters()] == names
        inside = made(ids)["loss"]
        assert isinstance(made.forward, GraphedForward)
    assert torch.equal(inside, made(ids)["loss"]) and "forward" not in vars(made)


def test_a_replayed_step_hands_out_loss_and_gradients():
    made, ids = objective(), tokens(2, 40)
    parameters = [p for p in made.parameters() if p.requires_grad]
    loss = made(ids)["loss"]
    wanted = torch.autograd.grad(loss, parameters)
    handed = _HandOut.apply(loss.detach(), list(wanted), *parameters)
    (handed * 0.5).backward()
    assert handed.item() == loss.item()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 0.5 * gradient)


def test_what_is_captured_are_the_objectives_own_numbers(monkeypatch):
    made, ids = objective(), tokens(2, 40)
    parameters = {name: p for name, p in made.named_parameters() if p.requires_grad}
    loss = made(ids)["loss"]
    wanted = torch.autograd.grad(loss, list(parameters.values()))
    for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    with graphed(made):
        captured = made.forward._capture(ids, parameters)
        assert not made.forward.capturing
    assert captured.loss.item() == loss.item()
    for a, b in zip(captured.gradients, wanted, strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None and p.requires_grad for p in parameters.values())


def test_a_graph_is_refused_where_it_would_change_the_numbers(tmp_path):
    run = RunArguments(output_dir=tmp_path, device="cpu", cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph"):
        train_stage2(student(), [], run, Stage2Config(lora_dropout=0.1))
