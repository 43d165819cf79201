"""Continuous batching wants pages of keys and values, which a Lizard has not: refused by name."""

import pytest
import torch
from tiny import student, teacher, tokens
from transformers import GenerationConfig
from transformers.cli.serving.utils import GenerationState, Modality

REMEDY = "call generate with a padded batch"


@torch.no_grad()
def test_continuous_batching_is_refused_by_name():
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    with pytest.raises(ValueError, match="generate_batch.*" + REMEDY):
        model.generate_batch(inputs=ids.tolist(), generation_config=settings)
    with pytest.raises(ValueError, match='cache_implementation="paged".*' + REMEDY):
        model.generate(ids, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(AttributeError, match="init_continuous_batching.*" + REMEDY):
        model.init_continuous_batching(settings)
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        model.no_such_thing  # noqa: B018
    with pytest.raises(ValueError, match="continuous_batching_context_manager.*" + REMEDY):
        model.continuous_batching_context_manager(settings)
    settings.cache_implementation = "paged"
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, generation_config=settings)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["student", "distill"])
@pytest.mark.parametrize("kept", [(), (0,)])
def test_a_paged_batch_is_refused(mode, kept):
    model = student(num_hidden_layers=2, softmax_layers=kept)
    model.set_attention_mode(mode)
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    for part in (model, model.model):
        with pytest.raises(ValueError, match="cache: got a object, wanted past_key_values"):
            part(tokens(1, 14), position_ids=positions, cache=object(), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (0,)])
def test_paged_attention_is_refused_by_name(kept):
    model = student(num_hidden_layers=2, softmax_layers=kept)
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager'.*wanted \"sdpa\""):
        model(tokens(1, 9))
    model.set_attn_implementation("eager")
    assert model(tokens(1, 9)).logits.shape[1] == 9


def test_the_server_falls_back_to_one_text_at_a_time():
    """As it does for a model of another library that cannot; for the teacher it batches."""
    state, model = GenerationState(continuous_batching=True), student(num_hidden_layers=1)
    assert not state.use_continuous_batching(model, Modality.LLM)
    assert state.use_continuous_batching(teacher(num_hidden_layers=1), Modality.LLM)
    model.set_attention_mode("teacher")
    assert state.use_continuous_batching(model, Modality.LLM)
