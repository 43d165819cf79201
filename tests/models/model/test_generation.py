"""``generate``: every way of decoding gives what full forward passes give, in any batch."""

import pytest
import torch
from tiny import student, teacher, tokens

PRESETS = ["plain", "paper", "paper_literal", "lolcats", "liger", "window_only"]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def alone(row: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}


def greedy_by_full_forwards(model, row: torch.Tensor, steps: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(steps):
            row = torch.cat([row, model(row[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return row


@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_equals_full_forward_passes(preset):
    model, row = student(preset), tokens(1, 13)[0]
    out = model.generate(**alone(row), max_new_tokens=15, do_sample=False)
    assert torch.equal(out[0], greedy_by_full_forwards(model, row, 15))


@pytest.mark.parametrize("kept", [(), (1,)])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_left_padded_batches_equal_single_runs(family, kept):
    model = student(family=family, softmax_layers=kept)
    rows = [tokens(1, length, seed=length)[0] for length in (21, 13, 4, 1)]
    together = model.generate(**left_padded(rows), max_new_tokens=12, do_sample=False)
    for b, row in enumerate(rows):
        assert torch.equal(together[b, -12:], model.generate(**alone(row), max_new_tokens=12, do_sample=False)[0, -12:])


def test_sampling_repeats_under_a_seed():
    model, row = student(), tokens(1, 9)[0]
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(**alone(row), max_new_tokens=12, do_sample=True, num_return_sequences=3))
    assert torch.equal(*draws) and draws[0].unique(dim=0).shape[0] == 3


def test_beam_search_equals_beam_search_without_a_cache():
    model = student()
    rows = [tokens(1, length, seed=length)[0] for length in (11, 6)]
    settings = dict(max_new_tokens=10, do_sample=False, num_beams=3)
    with_cache = model.generate(**left_padded(rows), **settings)
    assert torch.equal(with_cache, model.generate(**left_padded(rows), **settings, use_cache=False))


def test_embeddings_in_place_of_ids():
    model, ids = student(), tokens(2, 12)
    settings = dict(max_new_tokens=4, do_sample=False)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert torch.equal(found, model.generate(ids, **settings)[:, 12:])


def test_prefill_in_chunks():
    model, row = student(), tokens(1, 29)[0]
    settings = dict(max_new_tokens=8, do_sample=False)
    chunked = model.generate(**alone(row), **settings, prefill_chunk_size=7)
    assert torch.equal(chunked, model.generate(**alone(row), **settings))


def test_a_conversation_goes_on_from_its_cache():
    model, row = student(), tokens(1, 12)[0]
    first = model.generate(**alone(row), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences[0], tokens(1, 5, seed=9)[0]])
    settings = dict(max_new_tokens=6, do_sample=False)
    goes_on = model.generate(**alone(longer), **settings, past_key_values=first.past_key_values)
    assert torch.equal(goes_on, model.generate(**alone(longer), **settings))


def test_generation_goes_past_the_teachers_context():
    model, row = student(max_position_embeddings=24), tokens(1, 20)[0]
    out = model.generate(**alone(row), max_new_tokens=30, do_sample=False)
    assert torch.equal(out[0], greedy_by_full_forwards(model, row, 30))


def test_bfloat16_generates():
    model, row = student().bfloat16(), tokens(1, 20)[0]
    out = model.generate(**alone(row), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    state = out.past_key_values.layers[0].state
    assert state.ring_k.dtype == torch.bfloat16 and state.s.dtype == torch.float32


@pytest.mark.parametrize("kept", [(), (1,)])
@pytest.mark.parametrize("length", [1, 9, 150])
def test_prompt_lookup_writes_what_greedy_decoding_writes(kept, length):
    model, row = student(softmax_layers=kept), tokens(1, length)[0]
    settings = dict(max_new_tokens=20, do_sample=False)
    wanted = model.generate(**alone(row), **settings)
    assert torch.equal(model.generate(**alone(row), **settings, prompt_lookup_num_tokens=4), wanted)


def test_assisted_generation_writes_what_greedy_decoding_writes():
    model, row, other = student(), tokens(1, 9)[0], student(seed=5)
    settings = dict(max_new_tokens=8, do_sample=False)
    wanted = model.generate(**alone(row), **settings)
    for assistant in (teacher(), student(), other):  # one that keeps keys, one that is always right, one that is not
        assert torch.equal(model.generate(**alone(row), **settings, assistant_model=assistant), wanted)
    taught = teacher().generate(**alone(row), **settings)
    assert torch.equal(teacher().generate(**alone(row), **settings, assistant_model=model), taught)


def test_assisted_generation_leaves_the_state_of_the_text():
    model, row = student(), tokens(1, 9)[0]
    out = model.generate(
        **alone(row), max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3, return_dict_in_generate=True
    )
    seen = out.past_key_values.get_seq_length()
    state, wanted = (
        cache.layers[2].state for cache in (out.past_key_values, model(out.sequences[:, :seen]).past_key_values)
    )
    for a, b in zip(state, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_contrastive_search_wants_remote_code_by_name():
    with pytest.raises(ValueError, match="Contrastive Search requires `trust_remote_code=True`"):
        student().generate(**alone(tokens(1, 9)[0]), max_new_tokens=4, penalty_alpha=0.6, top_k=4)


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
def test_the_cache_makes_the_moves_of_contrastive_search(sequential):
    """Candidates beside each other in the batch, or one after the other and taken back."""
    model, ids = student(), tokens(1, 12)
    output = model(ids)
    cache, candidates = output.past_key_values, output.logits[0, -1].topk(3).indices
    if sequential:
        cache.activate_past_recording()
        logits = []
        for token in candidates:
            logits.append(model(token.view(1, 1), past_key_values=cache).logits)
            cache.crop(-1)
        logits = torch.cat(logits)
        model(candidates[1].view(1, 1), past_key_values=cache)
    else:
        cache.batch_repeat_interleave(3)
        logits = model(candidates.view(3, 1), past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([1]))
    longer = torch.cat([ids.expand(3, -1), candidates.view(3, 1)], 1)
    torch.testing.assert_close(logits, model(longer).logits[:, -1:], rtol=1e-4, atol=1e-4)
    step = tokens(1, 1, seed=8)
    wanted = model(torch.cat([longer[1:2], step], 1)).logits[:, -1:]
    torch.testing.assert_close(model(step, past_key_values=cache).logits, wanted, rtol=1e-4, atol=1e-4)


def test_caches_of_other_kinds_are_refused_by_name():
    for kind in ("offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation='{kind}'"):
            student().generate(**alone(tokens(1, 9)[0]), max_new_tokens=4, cache_implementation=kind)


def test_new_tokens_alone_need_a_mask_of_the_whole_text():
    model, ids = student(), tokens(1, 9)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="input_ids has 3 tokens, but past_key_values has seen 9"):
        model.generate(tokens(1, 3), past_key_values=cache, max_new_tokens=2)
    more = tokens(1, 3, seed=4)
    settings = dict(max_new_tokens=6, do_sample=False)
    found = model.generate(**cache.inputs_for(more), **settings)
    assert torch.equal(found[:, 3:], model.generate(torch.cat([ids, more], 1), **settings)[:, 12:])
