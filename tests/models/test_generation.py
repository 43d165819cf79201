"""``generate``: every way of decoding gives what full forward passes give, in any batch."""

import pytest
import torch
from tiny import student, teacher, tokens

PRESETS = ["recommended", "paper", "paper_literal", "lolcats", "liger", "window_only"]


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


def test_ways_that_take_tokens_back_are_refused_by_name():
    model, row = student(), tokens(1, 9)[0]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(**alone(row), max_new_tokens=4, assistant_model=teacher())
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(**alone(row), max_new_tokens=4, prompt_lookup_num_tokens=2)
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation='{kind}'"):
            model.generate(**alone(row), max_new_tokens=4, cache_implementation=kind)
