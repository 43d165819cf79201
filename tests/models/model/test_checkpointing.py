"""Gradient checkpointing and caches: none with gradients, a right one without."""

import pytest
import torch
from tiny import student, tokens

CHECKPOINTED = "gradient checkpointing"


def checkpointed(**options):
    model = student(**options)
    model.gradient_checkpointing_enable()
    return model.train()


def test_training_keeps_no_cache_and_says_so(monkeypatch):
    from lizard_models.model import decoder

    said = []
    monkeypatch.setattr(decoder.logger, "warning_once", said.append)
    model, ids = checkpointed().requires_grad_(True), tokens(1, 20)
    assert model(ids, use_cache=True).past_key_values is None
    assert len(said) == 1 and CHECKPOINTED in said[0]
    assert model(ids).past_key_values is None and len(said) == 1
    with pytest.raises(ValueError, match="past_key_values: layers under gradient checkpointing"):
        model(ids, past_key_values=model.new_cache())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_without_gradients_the_cache_is_right(mode):
    model, ids = checkpointed(), tokens(2, 20)
    model.set_attention_mode(mode)
    settings = dict(max_new_tokens=6, do_sample=False)
    written = model.generate(ids, **settings)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    cache = model(ids[:, :15], use_cache=True).past_key_values
    logits = model(ids[:, 15:], past_key_values=cache).logits
    assert all(part.gradient_checkpointing for part in (model.model, *model.model.layers))
    model.eval()
    assert torch.equal(written, model.generate(ids, **settings)) and torch.equal(embedded, written[:, 20:])
    torch.testing.assert_close(logits, model(ids).logits[:, 15:], rtol=1e-4, atol=1e-4)


def test_layers_checkpointed_in_part_keep_no_cache_either():
    model, ids = student(), tokens(1, 20)
    model.train()
    model.model.layers[1].gradient_checkpointing = True
    model.model.layers[1]._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    assert model(ids, use_cache=True).past_key_values is None
