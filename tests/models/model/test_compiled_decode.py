"""The decode step as one graph: traced once, equal to eager steps, in the memory the state has."""

import pytest
import torch
from tiny import student, teacher, tokens
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig
from transformers.cache_utils import StaticLayer

from lizard_layers import tensors_of
from lizard_models.model.padding import new_columns

CLAMPED = {"positions": "clamped", "position_limit": 24, "position_step": 10}


class Backend:
    """``aot_eager``, which runs what inductor would compile, and how many graphs were asked of it."""

    def __init__(self, name: str = "aot_eager") -> None:
        self.graphs, self.run = 0, lookup_backend(name)
        torch.compiler.reset()

    def __deepcopy__(self, memo):
        return self  # generate copies its settings

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.run(graph, inputs)

    def config(self) -> CompileConfig:
        """For ``generate``."""
        config = CompileConfig(fullgraph=True, mode=None, backend=self)
        config._compile_all_devices = True  # transformers' own switch for its tests on CPUs
        return config


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 2, "softmax_layers": (1,)},
        {"num_hidden_layers": 1, "attention": CLAMPED},
        {"num_hidden_layers": 1, "attention": CLAMPED | {"kept_keys": 5}},
        {"num_hidden_layers": 1, "attention": CLAMPED | {"kept_keys": [5, 0]}},
    ],
)
def test_the_step_is_one_graph_for_every_position(options):
    model, ids = student(**options), tokens(2, 32)
    whole = model(ids, use_cache=False).logits
    cache, backend = model.new_cache(static=True, max_cache_len=40), Backend()
    step = torch.compile(model, fullgraph=True, backend=backend)
    logits = [model(ids[:, :10], past_key_values=cache).logits]
    addresses = [t.data_ptr() for layer in cache.lizard_layers() for t in tensors_of(layer.state).values()]
    for t in range(10, 30):
        logits.append(step(ids[:, t : t + 1], past_key_values=cache).logits)
    assert backend.graphs == 1
    assert cache.get_seq_length() == 30
    logits.append(model(ids[:, 30:], past_key_values=cache).logits)  # eager again, and a snapshot of it
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    assert [t.data_ptr() for layer in cache.lizard_layers() for t in tensors_of(layer.state).values()] == addresses
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
    found = model.generate(ids, **settings, cache_implementation="static", compile_config=backend.config())
    assert torch.equal(found, wanted) and backend.graphs == 1


@pytest.mark.parametrize("kept", [(), (1,)])
def test_a_prompt_in_pieces_is_not_compiled(kept):
    """Pieces of 4, 4 and 1 tokens are three lengths less one; the step alone is a graph, as after a whole prompt."""
    model, ids = student(num_hidden_layers=1 + len(kept), softmax_layers=kept), tokens(2, 9)
    settings = dict(max_new_tokens=4, do_sample=False, cache_implementation="static")
    backend = Backend("eager")
    wanted = model.generate(ids, **settings, compile_config=backend.config())
    graphs = backend.graphs
    found = model.generate(ids, **settings, compile_config=backend.config(), prefill_chunk_size=4)
    assert torch.equal(found, wanted) and backend.graphs == graphs == 1


def test_generate_compiles_a_hybrid_as_often_as_its_teacher():
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0  # a mask that grows would be another shape at every step

    def generated(model, new, **options):
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)

    def graphs(model, backend):
        counts, options = [], dict(cache_implementation="static", compile_config=backend.config())
        for new in (6, 6, 12, 6):
            assert torch.equal(generated(model, new, **options), generated(model, new))
            counts.append(backend.graphs)
        return counts

    size = dict(num_hidden_layers=2)
    model = student(**size, softmax_layers=(1,))
    wanted = graphs(teacher(**size), Backend("eager"))
    backend = Backend("eager")
    assert graphs(model, backend) == wanted == [1, 1, 2, 2]

    cache = model.new_cache(static=True, max_cache_len=20)  # a second turn, padded too, in a cache of that length
    first = generated(model, 4, past_key_values=cache, compile_config=backend.config())
    text = torch.cat([first, tokens(2, 3, seed=5)], 1)
    whole = torch.cat([mask, mask.new_ones(2, 7)], 1)
    turn = dict(attention_mask=whole, max_new_tokens=4, do_sample=False)
    second = model.generate(text, **turn, past_key_values=cache, compile_config=backend.config())
    assert torch.equal(second, model.generate(text, **turn)) and backend.graphs == wanted[-1]


@torch.no_grad()
def test_a_mask_as_wide_as_a_static_cache_is_read_up_to_the_new_tokens(monkeypatch):
    model, ids, mask = student(num_hidden_layers=2, softmax_layers=(1,)), tokens(2, 12), torch.ones(2, 20).bool()
    mask[0, :4] = mask[0, 8] = False
    wanted = model(ids, attention_mask=mask[:, :12], use_cache=False).logits
    cache = model.new_cache(static=True, max_cache_len=20)
    for a, b in ((0, 7), (7, 12)):
        read = model(ids[:, a:b], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(read[:, -1], wanted[:, b - 1], rtol=1e-4, atol=1e-4)
    assert cache.positions().tolist() == [7, 12]
    monkeypatch.setattr("lizard_models.model.cache.is_graphed", lambda _: True)
    kept, first = cache.place_in_mask(mask, 3)  # in a graph, whose shapes stay, the columns are looked up
    assert kept is mask and first is cache.seen.on_device
    assert torch.equal(new_columns(mask, 3, first), mask[:, 12:15])
    assert torch.equal(new_columns(mask, 3, 7), mask[:, 7:10])


def test_a_static_cache_of_kept_layers_needs_a_length():
    with pytest.raises(ValueError, match="max_cache_len: got None"):
        student(softmax_layers=(1,)).new_cache(static=True)
    cache = student(softmax_layers=(1,)).new_cache(static=True, max_cache_len=9)
    cache.activate_past_recording()
    crops = StaticLayer.is_croppable  # since 5.24
    with pytest.raises(ValueError, match="last 0 tokens are remembered" if crops else "StaticLayer cannot be cropped"):
        cache.crop(-1)


@torch.no_grad()
@pytest.mark.skipif(not StaticLayer.is_croppable, reason="transformers before 5.24 cannot crop static caches")
def test_a_static_cache_of_kept_layers_takes_tokens_back():
    model, ids = student(softmax_layers=(1,)), tokens(2, 14)
    cache = model.new_cache(static=True, max_cache_len=20)
    model(ids[:, :9], past_key_values=cache)
    cache.activate_past_recording()
    model(tokens(2, 4, seed=5), past_key_values=cache)
    cache.crop(-4)
    found = torch.cat([model(part, past_key_values=cache).logits for part in ids[:, 9:].split(1, 1)], 1)
    torch.testing.assert_close(found, model(ids).logits[:, 9:], rtol=1e-4, atol=1e-5)
