"""Models that keep keys by their scores: every move of a cache, and what is said of their memory."""

import copy

import pytest
import torch
from tiny import student, tokens
from transformers import AutoModelForCausalLM

from lizard_layers import LayerState, tensors_of
from lizard_models import load_state, save_state
from lizard_models.runs.memory import lizard_bytes

KEPT = {"kept_keys": 5, "score_dim": 12}


def kept(**attention):
    """A student whose scores read their inputs: those of a fresh one tell keys apart by their likeness alone."""
    return student(attention=KEPT | attention)


@torch.no_grad()
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"gate": "scalar", "coverage": "all", "mix": "sum", "merge_bias": "none"},
        {"gate": "channel", "feature_activation": "exp", "key_map": "query_head"},
        {"coverage": "left", "positions": "clamped", "position_limit": 24, "position_step": 10},
        {"positions": "clamped", "position_limit": 24, "position_step": 10},
    ],
    ids=["plain", "beside all", "channel", "left, clamped", "clamped"],
)
def test_prefill_in_pieces_and_steps_equals_one_shot(choices):
    model, ids = kept(**choices), tokens(2, 50)
    whole = model(ids, use_cache=False).logits
    for sizes in ([50], [1] * 50, [3, 17, 1, 29], [20] + [1] * 30):
        cache = model.new_cache()
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-4)
        assert all(isinstance(layer.state, LayerState) for layer in cache.lizard_layers())
        assert cache.state_bytes() == 2 * lizard_bytes(model.config, 1, torch.float32)
        held = cache.lizard_layers()[0].state.attention.kept_positions
        assert ((held >= 4) & (held < 50 - 8)).all()


@torch.no_grad()
def test_scores_choose_the_keys():
    model, ids = kept(), tokens(1, 40)
    cache = model(ids).past_key_values
    chosen = [layer.state.attention.kept_positions.clone() for layer in cache.lizard_layers()]
    for attention in model.lizard_attentions():
        attention.lizard.key_score.rescale(torch.full((2,), -1.0), torch.zeros(2))  # the worst become the best
    again = model(ids).past_key_values
    for before, layer in zip(chosen, again.lizard_layers(), strict=True):
        assert not torch.equal(before, layer.state.attention.kept_positions)


@torch.no_grad()
@pytest.mark.parametrize(
    "choices", [{}, {"kept_keys": [[5, 0], [0, 0], [2, 7]]}, {"coverage": "left"}], ids=["even", "by head", "left"]
)
def test_rows_move_and_tokens_come_back(choices):
    model, ids = kept(**choices), tokens(3, 60)
    whole = model(ids, use_cache=False).logits
    cache = model.new_cache()
    cache.activate_past_recording()
    model(ids[:, :30], past_key_values=cache)
    model(tokens(3, 9, seed=5), past_key_values=cache)  # displaces keys, which come back
    cache.crop(-9)
    model(ids[:, 30:40], past_key_values=cache)
    cache.crop(0)
    for layer in cache.lizard_layers():
        layer.record_past = False
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    ids = ids[[2, 0, 0]]
    for t in range(40, 46):
        model(ids[:, t : t + 1], past_key_values=cache)
    twin, deep = cache.copy(), copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    for held in (cache, twin, deep):
        logits = model(ids[:, 46:], past_key_values=held).logits
        torch.testing.assert_close(logits, whole[[2, 0, 0], 46:], rtol=1e-4, atol=2e-4)
    cache.reset()
    again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, whole[[2, 0, 0]], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_a_cache_moves_to_another_dtype_and_keeps_what_orders_keys():
    model, ids = kept(), tokens(2, 40)
    cache = model(ids).past_key_values
    before = {n: t.clone() for n, t in tensors_of(cache.lizard_layers()[0].state).items()}
    cache.to(dtype=torch.bfloat16)
    after = tensors_of(cache.lizard_layers()[0].state)
    for name in ("kept_scores", "kept_positions", "ring_scores", "score.key_sum", "score.position"):
        assert torch.equal(after[name], before[name]), name
    for name in ("kept_k", "kept_v", "kept_fk"):
        assert torch.equal(after[name], before[name].bfloat16()), name
    assert after["kept_g"].dtype == after["score.inner"].dtype == torch.float32
    half = model.bfloat16()
    assert half(tokens(2, 3), past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_padded_and_packed_rows_are_read_as_alone():
    model, ids = kept(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    padded = model(ids, attention_mask=mask).logits[0, 13:]
    alone = model(ids[:1, 13:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=2e-4)
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    packed = model(ids[:1], position_ids=positions, use_cache=False).logits
    apart = [model(part, use_cache=False).logits for part in ids[:1].split([17, 23], 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_a_saved_model_keeps_its_scores(tmp_path):
    model, ids = kept(), tokens(1, 40)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(p.requires_grad != (".key_score." in name) for name, p in loaded.named_parameters())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    save_state(tmp_path / "text.state", model, model(ids).past_key_values)
    wanted = model.generate(torch.cat([ids, tokens(1, 3)], 1), max_new_tokens=5, do_sample=False)[:, 43:]
    found = loaded.generate(**load_state(tmp_path / "text.state", loaded).inputs_for(tokens(1, 3)), max_new_tokens=5,
                            do_sample=False)  # fmt: skip
    assert torch.equal(found[:, 3:], wanted)


def test_no_gradient_reaches_the_scores():
    model, ids = kept(), tokens(2, 30)
    model.requires_grad_(True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".key_score." in name), name
