"""The decode step as one graph: traced once, equal to eager steps, in the memory the state has."""

import pytest
import torch
from tiny import student, tokens
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig

CLAMPED = {"positions": "clamped", "position_limit": 24, "position_step": 10}


class Backend:
    """``aot_eager``, which runs what inductor would compile, and how many graphs were asked of it."""

    def __init__(self) -> None:
        self.graphs = 0
        torch.compiler.reset()

    def __deepcopy__(self, memo):
        return self  # generate copies its settings

    def __call__(self, graph, inputs):
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_hidden_layers": 2, "softmax_layers": (1,)}, {"num_hidden_layers": 1, "attention": CLAMPED}]
)
def test_the_step_is_one_graph_for_every_position(options):
    model, ids = student(**options), tokens(2, 32)
    whole = model(ids, use_cache=False).logits
    cache, backend = model.new_cache(static=True, max_cache_len=40), Backend()
    step = torch.compile(model, fullgraph=True, backend=backend)
    logits = [model(ids[:, :10], past_key_values=cache).logits]
    addresses = [t.data_ptr() for layer in cache.lizard_layers() for t in layer.state if t is not None]
    for t in range(10, 30):
        logits.append(step(ids[:, t : t + 1], past_key_values=cache).logits)
    assert backend.graphs == 1
    assert cache.get_seq_length() == 30
    logits.append(model(ids[:, 30:], past_key_values=cache).logits)  # eager again, and a snapshot of it
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    assert [t.data_ptr() for layer in cache.lizard_layers() for t in layer.state if t is not None] == addresses
    assert cache.copy().get_seq_length() == cache.get_seq_length() == 32
    cache.reset()
    assert cache.get_seq_length() == 0
    for t in range(3):  # the same graph from the first token of another text
        first = step(ids[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(first, whole[:, t : t + 1], rtol=1e-4, atol=1e-4)
    assert backend.graphs == 1


def test_generate_compiles_its_step():
    model, ids, mask = student(num_hidden_layers=1), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    settings = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    wanted, backend = model.generate(ids, **settings), Backend()
    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True  # transformers' own switch for its tests on CPUs
    found = model.generate(ids, **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(found, wanted) and backend.graphs == 1


def test_a_static_cache_of_kept_layers_needs_a_length():
    with pytest.raises(ValueError, match="max_cache_len: got None"):
        student(softmax_layers=(1,)).new_cache(static=True)
    cache = student(softmax_layers=(1,)).new_cache(static=True, max_cache_len=9)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="StaticLayer cannot be cropped"):
        cache.crop(-1)
