"""The cache: constant size from the first token, the same logits however the prompt arrives, what it refuses."""

import copy

import pytest
import torch
from tiny import student, tokens
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lizard_layers import empty_state, state_bytes
from lizard_models import LizardCache
from lizard_models.layer_configs import attention_config

PRESETS = ["recommended", "paper", "paper_literal", "lolcats", "liger", "window_only"]


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_in_pieces_and_steps_equals_one_shot(preset):
    model, ids = student(preset), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ([40], [1] * 40, [3, 17, 1, 19], [8, 8, 24]):
        cache, pieces = model.new_cache(), []
        for piece in ids.split(sizes, dim=1):
            pieces.append(model(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kept", [(0,), (1, 2)])
def test_kept_softmax_layers_share_the_cache(family, kept):
    model, ids = student(family=family, softmax_layers=kept), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ([1] * 40, [3, 17, 1, 19]):
        cache = model.new_cache()
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], 1)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert [isinstance(layer, DynamicLayer) for layer in cache.layers] == [i in kept for i in range(3)]


@torch.no_grad()
def test_kept_sliding_window_layers_share_the_cache():
    model, ids = student(family="mistral", sliding_window=12, softmax_layers=(1,)), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ([1] * 40, [3, 17, 1, 19]):
        cache = model.new_cache()
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], 1)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert isinstance(cache.layers[1], DynamicSlidingWindowLayer)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_size_is_constant_from_the_first_token(preset):
    model, cache = student(preset), None
    ids = tokens(2, 30)
    sizes = set()
    for t in range(30):
        cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        sizes.add(cache.state_bytes())
    assert sizes == {3 * state_bytes(empty_state(attention_config(model.config), 2))}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "right"])
def test_padded_prompts_leave_the_state_of_single_runs(layout):
    model = student()
    rows = [tokens(1, length, seed=length)[0] for length in (20, 11, 3)]
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(20 - len(row), 20) if layout == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, 1
    cache = model(ids, attention_mask=mask).past_key_values
    for b, row in enumerate(rows):
        alone = model(row[None]).past_key_values
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            for a, s in zip(ours.state, theirs.state, strict=True):
                if a is not None:
                    torch.testing.assert_close(a[b : b + 1], s, rtol=1e-4, atol=1e-4)
    assert cache.layers[0].state.position.tolist() == [20, 11, 3]
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_a_cached_prompt_with_padding_goes_on():
    model = student()
    ids, mask = tokens(2, 25), torch.ones(2, 25, dtype=torch.long)
    mask[0, :6] = 0
    cache = model(ids[:, :15], attention_mask=mask[:, :15]).past_key_values
    later = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    alone = model(ids[:1, 6:]).logits[:, 9:]
    torch.testing.assert_close(later[:1], alone, rtol=1e-4, atol=1e-4)
    assert cache.positions().tolist() == [19, 25]
    cache = model(ids[:, :15], attention_mask=mask[:, :15]).past_key_values
    without_mask = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(without_mask, later)


@torch.no_grad()
def test_a_snapshot_is_independent():
    model, ids = student(), tokens(1, 30)
    cache = model(ids[:, :20]).past_key_values
    snapshot = copy.deepcopy(cache)
    first = model(ids[:, 20:], past_key_values=cache).logits
    again = model(ids[:, 20:], past_key_values=snapshot).logits
    assert torch.equal(first, again)


@torch.no_grad()
def test_rows_can_be_reordered_repeated_and_dropped():
    model, ids = student(), tokens(3, 20)
    step = tokens(4, 1, seed=5)

    def after(change) -> torch.Tensor:
        cache = model(ids).past_key_values
        change(cache)
        rows = cache.layers[0].state.position.shape[0]
        return model(step[:rows], past_key_values=cache).logits

    def directly(order) -> torch.Tensor:
        cache = model(ids[order]).past_key_values
        return model(step[: len(order)], past_key_values=cache).logits

    for change, order in [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: (c.batch_select_indices(torch.tensor([0, 2])), c.batch_repeat_interleave(2)), [0, 0, 2, 2]),
    ]:
        torch.testing.assert_close(after(change), directly(order), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reset_forgets():
    model, ids = student(), tokens(1, 20)
    cache = model(ids).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_what_it_cannot_do_is_refused_by_name():
    model = student()
    cache = model(tokens(1, 9)).past_key_values
    assert isinstance(cache, LizardCache) and not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match="cannot be cropped: .* copy.deepcopy"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="keeps a state, not keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="offloading is not supported"):
        cache.offload(0, only_non_sliding=False)
