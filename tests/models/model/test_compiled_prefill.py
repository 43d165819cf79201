"""The cache of a forward under torch.compile: counted, copied, read on, as one of an eager forward."""

import pytest
import torch
from tiny import student, tokens


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()


@torch.no_grad()
def test_the_cache_of_a_compiled_prefill_is_a_cache():
    """Made by the graph, and given to it."""
    model, ids = student(num_hidden_layers=1), tokens(1, 24)
    forward, wanted = torch.compile(model, backend="eager"), model(ids).logits
    for made in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        cache = forward(ids[:, :20], **made).past_key_values
        assert cache.get_seq_length() == cache.known_length() == 20 and cache.positions().tolist() == [20]
        twin = cache.copy()
        for step, read in ((20, model), (21, forward)):
            logits = read(ids[:, step : step + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits, wanted[:, step : step + 1], rtol=1e-4, atol=1e-4)
        assert (cache.get_seq_length(), twin.get_seq_length()) == (22, 20)
        logits = model(ids[:, 20:], past_key_values=twin).logits
        torch.testing.assert_close(logits, wanted[:, 20:], rtol=1e-4, atol=1e-4)
        assert twin.get_seq_length() == 24
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_chat_with_a_compiled_forward():
    model, ids, more = student(num_hidden_layers=1), tokens(1, 12), tokens(1, 4, 5)
    settings = dict(max_new_tokens=2, do_sample=False)
    first, eager = model.generate(ids, **settings), model.forward
    text = torch.cat([first, more], 1)
    second = model.generate(text, **settings)
    model.forward = torch.compile(eager, backend="eager")
    answer = model.generate(ids, return_dict_in_generate=True, **settings)
    model.forward = eager
    assert torch.equal(answer.sequences, first)
    assert torch.equal(model.generate(text, past_key_values=answer.past_key_values, **settings), second)
