"""Caches between devices, modes of torch and releases of transformers: what is written where, and what must stay."""

import pytest
import torch
from tiny import student, tokens
from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import DynamicLayer

from lizard_layers import HybridAttention, map_state
from lizard_models.model.cache_layer import LizardCacheLayer, own_memory
from lizard_ops import AttentionState


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_copy_promises_the_addresses_of_static_layers_alone(static):
    """To torch.compile, whose graphs write to them; those of a layer that grows change with every token."""
    model = student(softmax_layers=(1,), num_hidden_layers=2)
    cache = model.new_cache(static=static, max_cache_len=12)
    model(tokens(1, 8), past_key_values=cache)
    held = [t for t in vars(cache.copy().layers[1]).values() if isinstance(t, Tensor)]
    assert {hasattr(t, "_dynamo_static_input_type") for t in held} == {static}


@torch.no_grad()
def test_every_tensor_moves_to_another_device():
    model = student(softmax_layers=(1,), num_hidden_layers=2)
    cache = model.new_cache().allocate(2)
    model(tokens(2, 8), past_key_values=cache)
    cache.to("meta")
    held = [t for layer in cache.lizard_layers() for t in layer.state if t is not None]
    held += [cache.layers[1].keys, cache.layers[1].values, cache.seen.on_device]
    assert {t.device.type for t in held} == {"meta"} and cache.get_seq_length() == 8


@torch.no_grad()
def test_an_empty_cache_can_be_reordered_and_gone_on_from():
    model, ids = student(softmax_layers=(1,), num_hidden_layers=2), tokens(2, 12)
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
    ):
        cache = model.new_cache()
        change(cache)
        assert torch.equal(model(**cache.inputs_for(ids)).logits, model(ids).logits)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    padded = model(**model.new_cache().inputs_for(ids, mask)).logits
    assert torch.equal(padded, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_only_steps_of_which_gradients_are_recorded_leave_the_state_as_it_was(trains, recorded):
    """The others are one kernel that writes into the state, without a copy of it."""
    model, ids = student(num_hidden_layers=1).requires_grad_(trains), tokens(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
    overwritten = []
    (attention,) = model.lizard_attentions()
    attention.lizard.register_forward_pre_hook(lambda module, args: overwritten.append(args[-1]))
    with torch.set_grad_enabled(recorded):
        model(ids[:, 8:], past_key_values=cache)
    assert overwritten == [not (trains and recorded)]


def test_a_state_has_no_largest_length():
    """Under the names of both generations of transformers' caches, as a layer that grows says it."""
    theirs = DynamicLayer()
    wanted = (theirs.get_max_length if hasattr(theirs, "get_max_length") else theirs.get_max_cache_shape)()
    ours = LizardCacheLayer()
    assert ours.get_max_length() == ours.get_max_cache_shape() == wanted


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_masks_are_those_of_the_kept_layers_whichever_layer_is_named(monkeypatch, static):
    """transformers up to 5.20 name the first layer that does not slide, later ones the first kept."""
    monkeypatch.setattr(masking_utils, "find_first_full_attention_index", lambda cache: 0, raising=False)
    model, ids = student(softmax_layers=(1, 2)), tokens(2, 12)
    cache = model.new_cache(static=static, max_cache_len=12)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    theirs = cache.layers[1].get_mask_sizes(3)
    assert {cache.get_mask_sizes(3, i) for i in range(3)} == {theirs} and theirs[0] >= 12
    assert {int(cache.get_query_offset(i)) for i in range(3)} == {12}


def test_a_new_state_is_kept_without_a_copy_only_where_its_memory_is_nobodys(monkeypatch):
    def state(**fields):
        return AttentionState(position=torch.zeros(2, dtype=torch.int64), **fields)

    x = torch.zeros(2, 3)
    assert own_memory(state(s=torch.ones(2, 3), z=torch.ones(2, 3)), (x, None))
    assert not own_memory(state(s=x), (x, None))  # an input of the layer
    assert not own_memory(state(s=torch.ones(2, 3), z=torch.ones(4, 2).T), ())
    assert not own_memory(state(s=torch.ones(4, 3)[:2]), ())
    assert not own_memory(state(s=x, z=x), ())

    model, ids = student(num_hidden_layers=1), tokens(2, 12)
    wanted = model(ids, use_cache=False).logits
    contiguous = HybridAttention.forward

    def forward(*args, **kwargs):
        o, new = contiguous(*args, **kwargs)
        made.append(new if new is None else map_state(new, torch.Tensor.contiguous))
        return o, made[-1]

    made = []
    monkeypatch.setattr(HybridAttention, "forward", forward)
    for grad, adopted in ((False, True), (True, False)):
        with torch.set_grad_enabled(grad):
            cache = model(ids[:, :9], use_cache=True).past_key_values
            assert (cache.layers[0].state is made[-1]) == adopted
            for t in range(9, 12):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits
                torch.testing.assert_close(logits[:, 0], wanted[:, t], rtol=1e-4, atol=1e-4)
