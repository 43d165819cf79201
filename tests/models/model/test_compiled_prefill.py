"""The cache of a forward under torch.compile: counted, copied, read on, as one of an eager forward."""

import pytest
import torch
from tiny import student, tokens


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()


@torch.no_grad()
def test_the_cache_of_a_compiled_forward_is_a_cache():
    """Given to the graph, and made by it, where ``generate`` calls it; then a step of each kind, a copy and a chat."""
    model, ids, settings = student(num_hidden_layers=1), tokens(1, 24), dict(max_new_tokens=2, do_sample=False)
    eager, wanted = model.forward, model(ids).logits
    text = torch.cat([model.generate(ids[:, :20], **settings), tokens(1, 4, 5)], 1)
    chat = model.generate(text, **settings)
    forward = torch.compile(eager, backend="eager")

    given = forward(ids[:, :20], past_key_values=model.new_cache()).past_key_values
    model.forward = forward
    made = model.generate(ids[:, :20], return_dict_in_generate=True, max_new_tokens=1, do_sample=False)
    model.forward = eager
    assert torch.equal(made.sequences, text[:, :21])
    for cache in (given, made.past_key_values):
        assert cache.get_seq_length() == 20 and cache.positions().tolist() == [20]
    twins = given.copy(), made.past_key_values.copy()
    assert torch.equal(model.generate(text, past_key_values=made.past_key_values, **settings), chat)

    assert given.known_length() == 20
    for cache in (given, twins[1]):
        for step, read in ((20, model), (21, forward)):  # with a mask, as where generate calls it
            mask = torch.ones(1, step + 1, dtype=torch.long)
            logits = read(ids[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(logits, wanted[:, step : step + 1], rtol=1e-4, atol=1e-4)
        assert (cache.get_seq_length(), twins[0].get_seq_length()) == (22, 20)
    logits = model(ids[:, 20:], past_key_values=twins[0]).logits
    torch.testing.assert_close(logits, wanted[:, 20:], rtol=1e-4, atol=1e-4)
    assert twins[0].get_seq_length() == 24
    given.reset()
    assert given.get_seq_length() == 0
