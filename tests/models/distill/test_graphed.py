"""A step as a CUDA graph: what of it shows without a GPU. benchmarks/gpu/train_step.py compares the rest on one."""

from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import student, tokens

from lizard_models.distill import RunArguments, stage2, train_stage2
from lizard_models.distill import graphed as graphed_module
from lizard_models.distill.graphed import GraphedForward, _HandOut, graphed
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.distill.trainer import StageResult
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
    seen = []
    made.register_forward_pre_hook(lambda module, args: seen.append(dict(module.named_parameters())))
    with graphed(made):
        captured = made.forward._capture(ids, parameters)
        assert not made.forward.capturing
    for read in seen:  # others with the same values, whose nodes for gradients are of the capture's stream
        assert all(read[name] is not p and read[name].data_ptr() == p.data_ptr() for name, p in parameters.items())
    assert len(seen) == graphed_module.WARM_UP + 1
    assert captured.loss.item() == loss.item()
    for a, b in zip(captured.gradients, wanted, strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None and p.requires_grad for p in parameters.values())


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; what is made of it does not."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_a_graph_is_captured_once_for_a_shape_and_replayed_where_gradients_are_asked(monkeypatch):
    """The fake graph runs nothing: what is launched again are the numbers of the capture."""
    made, ids = objective(), tokens(2, 40)
    parameters = [p for p in made.parameters() if p.requires_grad]
    loss = made(ids)["loss"]
    wanted = torch.autograd.grad(loss, parameters)
    for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    calls, on_gpu = [], ids.as_subclass(OnGpu)
    plain = made.forward
    made.forward = lambda *args: calls.append(1) or plain(*args)
    with graphed(made):
        for launches in (1, 2):
            made.zero_grad()
            found = made(on_gpu)["loss"]
            found.backward()
            assert len(calls) == graphed_module.WARM_UP + 1 and found.item() == loss.item()
            assert torch.cuda.CUDAGraph.return_value.replay.call_count == launches
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, wanted, strict=True))
        calls.clear()
        with torch.no_grad():
            made(on_gpu)
        made(on_gpu, torch.ones(2, 40, dtype=torch.long))
        assert len(calls) == 2  # these ask the objective itself


def test_a_graph_is_refused_where_it_would_change_the_numbers(tmp_path):
    run = RunArguments(output_dir=tmp_path, device="cpu", cuda_graph=True)
    with pytest.raises(ValueError, match=r"cuda_graph: got it with lora_dropout=0\.1"):
        train_stage2(student(), [], run, Stage2Config(lora_dropout=0.1))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_layers_that_are_read_again_in_a_graph_read_no_generator(tmp_path, monkeypatch, cuda_graph):
    """Which a capture forbids; layers that may draw numbers draw the same again elsewhere."""
    run = RunArguments(output_dir=tmp_path, device="cpu", gradient_checkpointing=True, cuda_graph=cuda_graph)
    read, state = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: read.append(1) or state())
    seen = []

    def trained(objective, *args, **kwargs):
        read.clear()
        objective.train()(tokens(1, 40))["loss"].backward()
        seen.append(len(read))
        return StageResult(1, 0.0)

    monkeypatch.setattr(stage2, "run_stage", trained)
    model = student()
    train_stage2(model, [], run, Stage2Config())
    assert (seen[0] == 0) == cuda_graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which captures")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_step_has_the_plain_steps_numbers(checkpointing):
    model = student().to("cuda", torch.bfloat16).requires_grad_(False)
    names = {name for name, _ in model.stage_parameters()}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    made = LanguageModelling(
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])), Stage2Config(kl_weight=1.0)
    )
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    made.train()
    parameters = [p for p in made.parameters() if p.requires_grad]
    batches = [tokens(2, 40, seed=seed).to("cuda") for seed in (1, 2)]
    found = []
    for captured in (False, True):
        with graphed(made, captured):
            for ids in batches:
                loss = made(ids)["loss"]
                found.append([loss, *torch.autograd.grad(loss, parameters)])
    for plain, ours in zip(found[:2], found[2:], strict=True):
        for one, other in zip(plain, ours, strict=True):
            assert (one - other).norm() <= 1e-3 * one.norm() + 1e-9
