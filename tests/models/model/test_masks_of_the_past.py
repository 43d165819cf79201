"""A mask must say of cached positions what the states have read of them: they cannot forget a token, or add one."""

import pytest
import torch
from tiny import student, tokens

KEPT = [(), (1,)]
DISAGREES = "attention_mask: got .* real tokens.* but past_key_values has read"


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    "first, then",
    [
        ("1" * 20, "1" * 15 + "0" * 5),  # masked later
        ("0" * 8 + "1" * 12, "1" * 20),  # padding that becomes text
        ("1" * 12 + "0" * 8, "1" * 20),
        ("0" * 8 + "1" * 12, "0" * 9 + "1" * 11),
    ],
)
def test_a_mask_that_disagrees_with_the_cache_is_refused(kept, first, then):
    model, ids, more = student(softmax_layers=kept), tokens(2, 20), tokens(2, 4, 5)
    cache = model(ids, attention_mask=masks(first, "1" * 20)).past_key_values
    before = model(more, attention_mask=masks(first + "1111", "1" * 24), past_key_values=cache.copy()).logits
    with pytest.raises(ValueError, match=DISAGREES + ".*inputs_for"):
        model(more, attention_mask=masks(then + "1111", "1" * 24), past_key_values=cache)
    after = model(more, attention_mask=masks(first + "1111", "1" * 24), past_key_values=cache).logits
    assert torch.equal(before, after)  # the refusal changed nothing
    whole = masks(first + "1111", "1" * 24)
    wanted = model(torch.cat([ids, more], 1), attention_mask=whole).logits[:, -4:]
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_batched_chat_whose_row_ended_early_is_refused():
    model, ids, more = student(num_hidden_layers=2), tokens(2, 20), tokens(2, 5, 9)
    settings = dict(do_sample=False, pad_token_id=0)
    end = int(model.generate(ids, max_new_tokens=12, **settings)[0, 23])
    settings |= dict(eos_token_id=end)
    first = model.generate(ids, max_new_tokens=12, return_dict_in_generate=True, **settings)
    text = torch.cat([first.sequences, more], 1)
    assert (text == 0).any()
    for given in ({"attention_mask": (text != 0).long()}, {}):  # generate makes the same mask where none is given
        with pytest.raises(ValueError, match=DISAGREES):
            model.generate(text, past_key_values=first.past_key_values.copy(), max_new_tokens=6, **given, **settings)
    new = first.past_key_values.copy().inputs_for(more)
    assert model.generate(**new, max_new_tokens=2, **settings).shape == (2, 7)


@torch.no_grad()
def test_kept_softmax_layers_want_to_know_where_the_padding_was():
    model, ids, more = student(softmax_layers=(1,)), tokens(2, 20), tokens(2, 1, 5)
    first = masks("0" * 8 + "1" * 12, "1" * 20)
    cache = model(ids, attention_mask=first).past_key_values
    with pytest.raises(ValueError, match="got None, which says that 20 .* has read 12"):
        model(more, past_key_values=cache.copy())
    moved = masks("1" * 12 + "0" * 8 + "1", "1" * 21)
    for change in (lambda c: c, lambda c: c.copy()):
        with pytest.raises(ValueError, match="other ones"):
            model(more, attention_mask=moved, past_key_values=change(cache))
    cache.batch_select_indices(torch.tensor([1]))
    ids, more = ids[1:], more[1:]  # the row without padding needs no mask
    wanted = model(torch.cat([ids, more], 1)).logits[:, -1:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT)
def test_masks_follow_beams_repeats_and_crops(kept):
    model, ids, more = student(softmax_layers=kept), tokens(2, 20), tokens(2, 3, 5)
    first, rows = masks("0" * 8 + "1" * 12, "1" * 20), torch.tensor([1, 0])
    cache = model(ids, attention_mask=first).past_key_values
    cache.activate_past_recording()
    model(more, attention_mask=torch.cat([first, torch.ones(2, 3)], 1), past_key_values=cache)
    cache.crop(-3)
    cache.reorder_cache(rows)
    cache.batch_repeat_interleave(2)
    again = first[rows].repeat_interleave(2, 0)
    more = more[rows].repeat_interleave(2, 0)
    mask = torch.cat([again, torch.ones(4, 3)], 1)
    found = model(more, attention_mask=mask, past_key_values=cache).logits
    text = torch.cat([ids[rows].repeat_interleave(2, 0), more], 1)
    torch.testing.assert_close(found, model(text, attention_mask=mask).logits[:, -3:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT)
def test_a_forward_that_fails_leaves_what_is_known_of_the_padding(kept):
    model, ids, more = student(softmax_layers=kept), tokens(2, 20), tokens(2, 3, 5)
    first = masks("1" * 20, "1" * 20)
    cache = model(ids, attention_mask=first).past_key_values
    with pytest.raises(IndexError):
        model(more + 97, attention_mask=torch.cat([first, masks("011", "111")], 1), past_key_values=cache)
    assert not cache.padded and cache.mask_of_the_past().shape == (2, 20)
    found = model(more, past_key_values=cache).logits
    torch.testing.assert_close(found, model(torch.cat([ids, more], 1)).logits[:, 20:], rtol=1e-4, atol=1e-4)
