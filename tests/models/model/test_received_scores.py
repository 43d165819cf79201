"""Models whose scores read what keys receive in their window: saved, moved, cropped and padded as all others."""

import pytest
import torch
from tiny import last_read_again, student, tokens
from transformers import AutoModelForCausalLM

from lizard_layers import tensors_of
from lizard_models import load_state, save_state
from lizard_models.runs.memory import lizard_bytes


def reading(**attention):
    """A student whose choice of keys depends on what they receive, its measures as after a stage 0."""
    choices = dict(kept_keys=5, score_dim=12, score_received=True, score_stride=2)
    model = student(attention=choices | attention)
    draw = torch.Generator().manual_seed(7)
    for attention in model.lizard_attentions():
        term = attention.lizard.key_score.received
        with torch.no_grad():
            term.mean.copy_(torch.randn(term.mean.shape, generator=draw) - 2)
            term.deviation.copy_(0.5 + torch.rand(term.mean.shape, generator=draw))
            term.outer_weight.mul_(20)
    return model


def positions_of(cache):
    return [layer.state.attention.kept_positions.sort(1)[0] for layer in cache.lizard_layers()]


@torch.no_grad()
def test_pieces_steps_and_crops_equal_one_shot():
    model, ids = reading(positions="clamped", position_limit=24, position_step=10), tokens(2, 50)
    whole = model(ids, use_cache=False).logits
    for sizes in ([1] * 50, [3, 17, 1, 29]):
        cache = model.new_cache()
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-4)
        assert cache.state_bytes() == 2 * lizard_bytes(model.config, 1, torch.float32)
    for read, sizes in ((20, [9]), (30, [4, 5]), (30, [1] * 9)):
        cache = model.new_cache()
        cache.activate_past_recording()
        model(ids[:, :read], past_key_values=cache)
        for piece in tokens(2, 9, seed=5).split(sizes, dim=1):
            model(piece, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-9)
        logits = model(ids[[1, 0], read:], past_key_values=cache).logits
        torch.testing.assert_close(logits, whole[[1, 0], read:], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_what_is_read_again_sees_anchors_where_they_were():
    """More steps than are remembered, past the limit of positions: those before become the state to start from."""
    model, ids = reading(positions="clamped", position_limit=24, position_step=10), tokens(1, 190)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(last_read_again(model, ids), whole[:, 150:], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_what_is_received_chooses_keys():
    model, ids = reading(), tokens(2, 50)
    before = positions_of(model(ids).past_key_values)
    for attention in model.lizard_attentions():
        attention.lizard.key_score.received.outer_weight.zero_()
    after = positions_of(model(ids).past_key_values)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_padded_rows_are_read_as_alone():
    model, ids = reading(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    padded = model(ids, attention_mask=mask).logits[0, 13:]
    torch.testing.assert_close(padded, model(ids[:1, 13:]).logits[0], rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_and_states_carry_what_stage_0_set(tmp_path, dtype):
    model, ids = reading().to(dtype), tokens(1, 40)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    scores = [[a.lizard.key_score.state_dict() for a in m.lizard_attentions()] for m in (model, loaded)]
    for mine, theirs in zip(*scores, strict=True):
        assert {t.dtype for t in theirs.values()} == {torch.float32}
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    cache = model(ids).past_key_values
    chosen = positions_of(cache), positions_of(loaded(ids).past_key_values)
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))
    save_state(tmp_path / "text.state", model, cache)
    held = load_state(tmp_path / "text.state", loaded)
    for layer, other in zip(held.lizard_layers(), cache.lizard_layers(), strict=True):
        found, wanted = tensors_of(layer.state), tensors_of(other.state)
        assert found.keys() == wanted.keys() and "score.ring" in found
        assert all(torch.equal(found[name], wanted[name]) for name in found)
