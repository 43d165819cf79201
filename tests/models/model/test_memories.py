"""Models with a delta memory and a convolution on the keys: all that a cache does, and what they start as."""

import copy

import pytest
import torch
from test_compiled_decode import Backend
from test_ecosystem import DecodeStep, state_tensors
from tiny import read_in_pieces, student, teacher, tokens

from benchmarks.quality.branches import switched_off
from lizard_models import LizardConfig, load_state, save_state
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.runs.cost import run_cost
from lizard_models.runs.memory import lizard_bytes

KINDS = {
    "delta": {"memory": "delta", "beta_init": 0.5},
    "conv": {"key_conv": 4},
    "both": {"memory": "delta", "key_conv": 4, "positions": "clamped", "position_limit": 24, "position_step": 10},
}
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_prompts_up_to_the_window_equal_the_teacher(kind):
    model, ids = student(attention=kind), tokens(2, 12)  # window 8 and four anchors
    torch.testing.assert_close(model(ids).logits, teacher()(ids).logits, **CLOSE)
    longer = tokens(2, 40)
    assert not torch.allclose(model(longer).logits, student()(longer).logits, **CLOSE)


@torch.no_grad()
def test_pieces_steps_and_padding_equal_the_whole(kind):
    model, ids = student(attention=kind), tokens(3, 40)
    whole = model(ids, use_cache=False).logits
    read, cache, size = read_in_pieces(model, ids, 2, 20, 33)
    torch.testing.assert_close(read, whole, **CLOSE)
    assert cache.state_bytes() == size == 3 * lizard_bytes(model.config, 40, torch.float32)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, :7] = 0
    padded = model(ids, attention_mask=mask).past_key_values
    alone = model(ids[:1, 7:]).past_key_values
    for a, b in zip(padded.layers[0].state, alone.layers[0].state, strict=True):
        assert a is None or torch.allclose(a[:1], b, **CLOSE)


@torch.no_grad()
def test_tokens_go_back_rows_move_and_copies_are_apart(kind):
    model, ids = student(attention=kind), tokens(3, 30)
    whole = model(ids, use_cache=False).logits
    cache = model.new_cache()
    cache.activate_past_recording()
    model(torch.cat([ids[:, :20], tokens(3, 4, seed=9)], 1), past_key_values=cache)
    model(tokens(3, 1, seed=8), past_key_values=cache)
    cache.crop(-5)
    kept = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(model(ids[[2, 0, 0], 20:], past_key_values=cache).logits, whole[[2, 0, 0], 20:], **CLOSE)
    torch.testing.assert_close(model(ids[:, 20:], past_key_values=kept).logits, whole[:, 20:], **CLOSE)
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, **CLOSE)


@torch.no_grad()
def test_the_compiled_step_is_one_graph():
    model, ids = student(attention=KINDS["both"], num_hidden_layers=1), tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    cache, backend = model.new_cache(static=True), Backend()
    step = torch.compile(model, fullgraph=True, backend=backend)
    model(ids[:, :10], past_key_values=cache)
    addresses = [t.data_ptr() for t in cache.layers[0].state if t is not None]
    for t in range(10, 24):
        torch.testing.assert_close(step(ids[:, t : t + 1], past_key_values=cache).logits, whole[:, t : t + 1], **CLOSE)
    assert backend.graphs == 1 and [t.data_ptr() for t in cache.layers[0].state if t is not None] == addresses


@torch.no_grad()
def test_the_step_can_be_exported():
    model = student(attention={"memory": "delta", "key_conv": 4}, num_hidden_layers=1)
    cache = model(tokens(1, 20)).past_key_values
    run = torch.export.export(DecodeStep(model, cache), (tokens(1, 1), *state_tensors(cache)), strict=False).module()
    state = state_tensors(cache)
    for seed in range(10):
        token = tokens(1, 1, seed=seed)
        logits, *state = run(token, *state)
        torch.testing.assert_close(logits, model(token, past_key_values=cache).logits, **CLOSE)


@torch.no_grad()
def test_model_and_state_come_back_from_files(kind, tmp_path):
    model, ids, more = student(attention=kind), tokens(1, 30), tokens(1, 5, seed=8)
    cache = model(ids).past_key_values
    save_state(tmp_path / "text.state", model, cache)
    model.save_pretrained(tmp_path / "model")
    back = LizardLlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = load_state(tmp_path / "text.state", back)
    assert torch.equal(back(more, past_key_values=loaded).logits, model(more, past_key_values=cache).logits)
    cache.to("cpu", torch.bfloat16)
    for name, t in cache.layers[0].state._asdict().items():
        wide = name in ("s", "z", "ring_g", "ring_beta")
        assert t is None or t.dtype == (
            torch.float32 if wide else torch.int64 if name == "position" else torch.bfloat16
        )


@torch.no_grad()
def test_branches_can_be_switched_off(kind):
    model, ids = student(attention=kind), tokens(1, 30)
    logits = model(ids).logits
    for branch in ("linear", "window"):
        with switched_off(model, branch):
            assert not torch.allclose(model(ids).logits, logits, **CLOSE)
    assert torch.equal(model(ids).logits, logits)


def test_plans_count_what_the_model_has(kind):
    model, preset = student(attention=kind), LizardConfig.preset("recommended", attention={"window": 8} | kind)
    cost, plain = run_cost(teacher().config, preset), run_cost(teacher().config, LizardConfig.preset("recommended"))
    assert cost.new_parameters == sum(p.numel() for _, p in model.lizard_parameters()) > plain.new_parameters
    full = run_cost(teacher().config, preset.replace(stage2={"trained": "full", "lora_targets": ["q_proj"]}))
    assert full.adapters == 3 * 64 * 64
