"""Tokens to take back: always the last 128, and drafts of any length."""

import copy
import gc

import pytest
import torch
from tiny import last_read_again, student, tokens


@torch.no_grad()
@pytest.mark.parametrize("steps", [127, 129, 257, 300])
def test_the_last_128_of_any_number_of_steps_can_be_taken_back(steps):
    model, ids = student(num_hidden_layers=1), tokens(1, 12 + steps)
    cache = model(ids[:, :12]).past_key_values
    cache.activate_past_recording()
    for step in range(12, 12 + steps):
        model(ids[:, step : step + 1], past_key_values=cache)
    with pytest.raises(ValueError, match=f"only the last {min(steps, 128)} tokens are remembered"):
        cache.crop(-129)
    back = min(steps, 128)
    for count in (2, back):
        twin = cache.copy()
        twin.crop(-count)
        assert twin.get_seq_length() == 12 + steps - count
        found = model(ids[:, -count:], past_key_values=twin).logits
        torch.testing.assert_close(found, model(ids).logits[:, -count:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pieces_of_any_size_leave_the_last_128():
    model, ids = student(softmax_layers=(1,)), tokens(2, 700)
    cache, at, whole = model.new_cache(), 0, model(ids).logits
    cache.activate_past_recording()
    for size in (100, 100, 100, 128, 1, 150, 40):
        model(ids[:, at : at + size], past_key_values=cache)
        at += size
    cache.crop(-128)
    found = model(ids[:, at - 128 :], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, at - 128 :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_of_a_model_that_is_gone_can_be_taken_back():
    """A cache goes on in another model of the same weights, as after loading them again."""
    model, ids = student(softmax_layers=(1,)), tokens(1, 20)
    other, cache = copy.deepcopy(model), model.new_cache()
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    del model
    gc.collect()
    cache.crop(-3)
    found = other(ids[:, 17:], past_key_values=cache).logits
    torch.testing.assert_close(found, other(ids).logits[:, 17:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("drafted", [128, 150])
def test_long_drafts_write_what_greedy_decoding_writes(drafted):
    model, text = student(num_hidden_layers=1), tokens(1, 20).repeat(1, 12)
    settings = dict(max_new_tokens=6, do_sample=False)
    wanted = model.generate(text, **settings)
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=drafted, **settings), wanted)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assistants_draft_more_than_128_tokens(schedule):
    model, text = student(num_hidden_layers=1), tokens(1, 12)
    draft = copy.deepcopy(model)  # right for a while, so that there are few rounds
    draft.lm_head.weight += 0.003 * torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    draft.generation_config.num_assistant_tokens = 140
    draft.generation_config.num_assistant_tokens_schedule = schedule
    draft.generation_config.assistant_confidence_threshold = 0
    settings = dict(max_new_tokens=145, do_sample=False)
    wanted = model.generate(text, **settings)
    assert torch.equal(model.generate(text, assistant_model=draft, **settings), wanted)


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(softmax_layers=(1,)), dict(family="gemma3_text", softmax_layers=(1,))])
@pytest.mark.parametrize("static", [True, False])
def test_nothing_can_be_taken_back_from_any_cache(options, static):
    model, ids = student(**options), tokens(1, 30)
    cache = model(ids[:, :20], past_key_values=model.new_cache(static=static, max_cache_len=40)).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 20
    later = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 20:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (1,)])
@pytest.mark.parametrize("padding", [0, 3])
def test_drafts_go_on_from_a_cache(kept, padding):
    """Transformers reads the whole text again on top of it, a teacher's too."""
    model, text = student(softmax_layers=kept), tokens(1, 10).repeat(1, 2)
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), text], 1)
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    settings = dict(max_new_tokens=8, do_sample=False)
    wanted = model.generate(text, **settings)[:, 20:]
    drafts = dict(prompt_lookup_num_tokens=3), dict(assistant_model=student(seed=5))
    for have in (padding + 1, padding + 12, padding + 19):
        for draft in drafts:
            cache = model(ids[:, :have], attention_mask=mask[:, :have]).past_key_values
            given = dict(attention_mask=mask, past_key_values=cache, **draft, **settings)
            assert torch.equal(model.generate(ids, **given)[:, -8:], wanted)
    cache = model(text[:, :12]).past_key_values
    with pytest.raises(ValueError, match="input_ids has 8 tokens, and past_key_values has seen 12: drafts"):
        model.generate(**cache.inputs_for(text[:, 12:]), prompt_lookup_num_tokens=3, **settings)
    assert cache.get_seq_length() == 12 and not cache.lizard_layers()[0].record_past


def keeping(kept_past, received, layers=2):
    """A student of few kept keys whose texts soon go past its context."""
    choices = dict(
        kept_keys=5, score_dim=12, score_received=received, score_stride=2, coverage="left", kept_past=kept_past,
        positions="clamped", position_limit=24, position_step=10,
    )  # fmt: skip
    return student(num_hidden_layers=layers, attention=choices)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("received", [True, False])
@pytest.mark.parametrize("kept_past", ["moved", "dropped"])
def test_what_is_read_again_past_the_context_drops_keys_again(kept_past, received):
    """A block past position_limit drops keys for good, also where what was read in it is read a second time."""
    model, ids, other = keeping(kept_past, received), tokens(2, 50), tokens(2, 9, seed=5)
    whole = model(ids, use_cache=False).logits
    for read, stays, sizes in ((20, 0, [9]), (30, 9, [4, 5]), (40, 12, [1] * 9)):  # stays: recorded, not taken back
        start = model(ids[:, : read - stays]).past_key_values
        start.activate_past_recording()
        model(torch.cat([ids[:, read - stays : read], other[:, : sizes[0]]], 1), past_key_values=start)
        for piece in other[:, sizes[0] :].split(sizes[1:], dim=1):
            model(piece, past_key_values=start)
        for order in ([0, 1], [1, 0]):
            cache = start.copy()
            cache.reorder_cache(torch.tensor(order))
            cache.crop(-9)
            same(model(ids[order, read:], past_key_values=cache).logits, whole[order, read:])
        start.batch_repeat_interleave(2)
        start.crop(-9)
        twice = [0, 0, 1, 1]
        same(model(ids[twice, read:], past_key_values=start).logits, whole[twice, read:])


@torch.no_grad()
@pytest.mark.parametrize("received", [True, False])
def test_rows_of_padding_drop_their_own_keys_again(received):
    model, ids = keeping("dropped", received), tokens(2, 50)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :11] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits[:, 35:]
    cache = model.new_cache()
    cache.activate_past_recording()
    for start, end in ((0, 20), (20, 40)):
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    cache.crop(-5)
    same(model(ids[:, 35:], attention_mask=mask, past_key_values=cache).logits, whole)


@torch.no_grad()
@pytest.mark.parametrize("received", [True, False])
def test_a_state_to_start_from_has_dropped_its_keys(received):
    """More tokens than are remembered, past the context: those before become the state to start from."""
    model, ids = keeping("dropped", received), tokens(1, 190)
    whole = model(ids, use_cache=False).logits
    same(last_read_again(model, ids), whole[:, 150:])


@torch.no_grad()
@pytest.mark.parametrize("received", [True, False])
def test_drafts_past_the_context_leave_what_decoding_leaves(received):
    model, text = keeping("dropped", received), tokens(1, 9).repeat(1, 3)
    settings = dict(max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    wanted = model.generate(text, **settings)
    for draft in (dict(prompt_lookup_num_tokens=4), dict(assistant_model=student(seed=5))):
        found = model.generate(text, **draft, **settings)
        assert torch.equal(found.sequences, wanted.sequences)
        cache = found.past_key_values
        seen, more = cache.get_seq_length(), tokens(1, 5, seed=8)
        cache.crop(0)
        logits = model(more, past_key_values=cache).logits
        same(logits, model(torch.cat([found.sequences[:, :seen], more], 1), use_cache=False).logits[:, -5:])
