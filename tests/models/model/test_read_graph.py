"""Prompts read from a graph, a tape of operations standing in for CUDA's: bits and states as ever, or a reason."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tape import TapeRecorder
from tiny import student, tokens
from torch import nn

from lizard_layers import tensors_of
from lizard_models.model import decode_graph, read_graph
from lizard_models.model.decode_graph import free_decode_graphs


@pytest.fixture
def recorder(monkeypatch):
    recorder = TapeRecorder(looks=True)
    monkeypatch.setattr("lizard_ops.common.checks.may_read", lambda x: False)  # as on a GPU
    monkeypatch.setattr(read_graph, "recorder_for", lambda device: recorder)
    return recorder


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(read_graph, "tell", lines.append)
    return lines


def read(model, ids, graph=None, **inputs):
    with torch.no_grad():
        return model(ids, decode_graph=graph, **{"use_cache": True} | inputs)


def assert_same_caches(found, wanted):
    assert found.get_seq_length() == wanted.get_seq_length()
    assert torch.equal(found.positions(), wanted.positions())
    for a, b in zip(found.lizard_layers(), wanted.lizard_layers(), strict=True):
        for name, t in tensors_of(b.state).items():
            assert torch.equal(tensors_of(a.state)[name], t) and tensors_of(a.state)[name].dtype == t.dtype, name


def assert_same(found, wanted):
    assert torch.equal(found.logits, wanted.logits)
    assert type(found) is type(wanted) and found.keys() == wanted.keys()
    assert_same_caches(found.past_key_values, wanted.past_key_values)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"logits_to_keep": 1},
        {"attention_mask": torch.ones(2, 9, dtype=torch.long)},
        {"position_ids": torch.arange(20, 29)[None]},
        {"position_ids": torch.arange(9)[None].repeat(2, 1), "attention_mask": torch.ones(2, 9, dtype=torch.long)},
    ],
)
def test_a_shape_that_comes_again_is_read_from_a_graph(recorder, inputs):
    model = student(num_hidden_layers=2)
    for n in range(5):
        ids = tokens(2, 9, seed=n)
        assert_same(read(model, ids, **inputs), read(model, ids, False, **inputs))
        assert (recorder.warm_ups, len(recorder.tapes), recorder.replays) == (n > 0, n > 1, max(0, n - 1))
    for n in range(3):  # one that is warm captures the second of another shape
        assert_same(read(model, tokens(1, 7, seed=n)), read(model, tokens(1, 7, seed=n), False))
        assert len(recorder.tapes) == (1 if n == 0 else 2)


@pytest.mark.parametrize(
    "attention",
    [
        {"kept_keys": 5},
        {"kept_keys": 5, "score_received": True},
        {"mix": "sum", "merge_bias": "none", "num_sinks": 2},
        {"positions": "clamped", "position_limit": 64, "position_step": 10},
    ],
)
def test_pieces_of_one_size_go_on_from_any_cache(recorder, attention):
    recorder.looks = "kept_keys" not in attention  # on a CPU expiries are read
    model = student(num_hidden_layers=2, attention=attention)
    for seed in (1, 2):
        ids, caches = tokens(2, 41, seed=seed), [model.new_cache(), model.new_cache()]
        for piece in ids.split(8, 1):
            outputs = [
                read(model, piece, graph, past_key_values=cache)
                for graph, cache in zip((None, False), caches, strict=True)
            ]
            assert_same(*outputs)
            assert outputs[0].past_key_values is caches[0]
    assert len(recorder.tapes) == 2 and recorder.replays > 4


def test_what_comes_back_is_the_callers(recorder):
    model, found, wanted = student(num_hidden_layers=1), [], []
    for n in range(5):
        found.append(read(model, tokens(2, 9, seed=n)))
    for n in range(5):
        wanted.append(read(model, tokens(2, 9, seed=n), False))
    for a, b in zip(found, wanted, strict=True):  # none has been written to by a later reading
        assert_same(a, b)
    places = [t.data_ptr() for out in found for t in (out.logits, *read_graph.states(out.past_key_values))]
    assert len(set(places)) == len(places)
    for out in found, wanted:  # and can be gone on from
        for n, o in enumerate(out):
            o.step = read(model, tokens(2, 1, seed=n), past_key_values=o.past_key_values).logits
    assert all(torch.equal(a.step, b.step) for a, b in zip(found, wanted, strict=True))


def test_a_cache_keeps_its_tensors_where_they_fit(recorder):
    model, cache, before = student(num_hidden_layers=1), None, []
    for n in range(4):
        cache = read(model, tokens(2, 9, seed=n), past_key_values=cache).past_key_values
        places = [t.data_ptr() for t in read_graph.states(cache)]
        assert n == 0 or places == before
        before = places
        cache.reset()
    read(model, tokens(3, 9)), read(model, tokens(3, 9)), read(model, tokens(3, 9), past_key_values=cache)
    assert cache.positions().tolist() == [9, 9, 9]  # other rows: tensors of its own, made anew


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 4}, {"num_beams": 2}, {"cache_implementation": "static"}]
)
def test_generate_reads_its_prompt_from_a_graph(recorder, monkeypatch, options):
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: recorder)
    model = student(num_hidden_layers=2)
    options = dict(max_new_tokens=8, do_sample=False) | options
    for seed in range(4):
        ids = tokens(2, 12, seed=seed)
        assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, decode_graph=False))
    graphs = read_graph._graphs[model].graphs
    assert len(graphs) == (2 if "prefill_chunk_size" in options else 1)
    free_decode_graphs(model)
    assert not read_graph._graphs.get(model)


def test_generate_reads_padding_and_softmax_layers_as_ever(recorder, told):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for model, inputs in (
        (student(num_hidden_layers=1), {"attention_mask": mask}),
        (student(num_hidden_layers=2, softmax_layers=(1,)), {}),
    ):
        for _ in range(4):
            found, wanted = (read(model, tokens(2, 9), graph, **inputs) for graph in (None, False))
            assert torch.equal(found.logits, wanted.logits)
    assert not recorder.tapes and "padding" in told[0] and "kept softmax layers" in told[-1] and len(set(told)) == 2


@pytest.mark.parametrize(
    "inputs",
    [
        {"output_hidden_states": True},
        {"use_cache": False},
        {"labels": tokens(2, 9)},
        {"return_dict": False},
        {"logits_to_keep": torch.tensor([3])},
    ],
)
def test_other_forwards_run_as_ever(recorder, inputs):
    model = student(num_hidden_layers=1)
    for _ in range(3):
        found, wanted = (read(model, tokens(2, 9), graph, **inputs) for graph in (None, False))
        assert torch.equal(
            found[0] if isinstance(found, tuple) else found.logits,
            wanted[0] if isinstance(wanted, tuple) else wanted.logits,
        )
    assert not read_graph._graphs.get(model)


def test_gradients_modes_and_single_tokens_run_as_ever(recorder):
    model = student(num_hidden_layers=1).requires_grad_(True)
    for _ in range(3):
        assert model(tokens(2, 9), use_cache=True).logits.requires_grad
        read(model, tokens(2, 1))
    model.set_attention_mode("teacher")
    for _ in range(3):
        read(model, tokens(2, 9))
    assert not recorder.warm_ups


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return "model.layers.0.mlp has hooks"


def adapted(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return "adapters"


def compiled(model):
    model.model.layers[0].mlp.compile(backend="eager")
    return "mlp is compiled"


@pytest.mark.parametrize("change", [hooked, adapted, compiled])
def test_what_is_not_captured_says_why(recorder, told, change):
    model = student(num_hidden_layers=1)
    reason = change(model)
    for _ in range(4):
        assert_same(read(model, tokens(2, 9)), read(model, tokens(2, 9), False))
    assert not recorder.tapes and reason in told[0]


def test_hooks_that_come_later_end_the_graphs(recorder, told):
    model, seen = student(num_hidden_layers=1), []
    for _ in range(4):
        read(model, tokens(2, 9))
    assert recorder.replays
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    read(model, tokens(2, 9))
    assert seen and "has hooks" in told[0]


def test_changed_weights_and_choices_are_captured_again(recorder):
    model = student(num_hidden_layers=1)

    def check(tapes):
        for n in range(3):
            assert_same(read(model, tokens(2, 9, seed=n)), read(model, tokens(2, 9, seed=n), False))
        assert len(recorder.tapes) == tapes

    check(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)  # where they lie
    check(1)
    model.double()
    check(2)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight.flip(0))
    check(3)


def test_few_graphs_are_kept_and_go_with_their_model(recorder):
    model = student(num_hidden_layers=1)
    for length in range(5, 12):
        for _ in range(3):
            read(model, tokens(1, length))
    kept = read_graph._graphs[model]
    assert [shape.length for shape in kept.graphs] == [8, 9, 10, 11]
    for length in range(5, 200):
        read(model, tokens(1, length))
    assert len(kept.came) == read_graph.SHAPES
    copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    gone, held = weakref.ref(model), weakref.ref(kept)
    del model, kept
    gc.collect()
    assert gone() is None and held() is None


def test_large_readings_are_not_kept(recorder, told, monkeypatch):
    model = student(num_hidden_layers=1)
    monkeypatch.setattr(read_graph, "TOKENS", 17)
    for _ in range(3):
        read(model, tokens(2, 9))
    assert told == ["more than 17 tokens at once"] * 2
    monkeypatch.setattr(read_graph, "total_memory", lambda device: 1 << 20)
    sizes = iter(range(0, 1 << 30, 1 << 17))
    monkeypatch.setattr(read_graph, "memory", lambda device: next(sizes))
    for _ in range(3):
        assert_same(read(model, tokens(2, 8)), read(model, tokens(2, 8), False))
    assert "the graphs took" in told[-1] and not read_graph._graphs[model].graphs
    monkeypatch.setattr(read_graph, "total_memory", lambda device: 1 << 10)
    for _ in range(3):
        read(model, tokens(2, 7))
    assert told[-1] == "a graph of 14 tokens would take more than a 16th of the memory"


def test_a_reading_that_waits_for_the_device_stays_as_it_is(monkeypatch, told):
    recorder = TapeRecorder(why="aten.item waits for the device")
    monkeypatch.setattr(read_graph, "recorder_for", lambda device: recorder)
    model = student(num_hidden_layers=1)
    for _ in range(4):
        assert_same(read(model, tokens(2, 9)), read(model, tokens(2, 9), False))
    assert not recorder.tapes and recorder.warm_ups == 1 and set(told) == {"aten.item waits for the device"}


def test_a_capture_that_fails_leaves_the_reading(recorder, told, monkeypatch):
    def broken(step, pool):
        raise RuntimeError("operation not permitted\nwhile the stream is capturing")

    model = student(num_hidden_layers=1)
    monkeypatch.setattr(recorder, "capture", broken)
    for _ in range(4):
        assert_same(read(model, tokens(2, 9)), read(model, tokens(2, 9), False))
    assert set(told) == {"the capture failed (RuntimeError: operation not permitted)"}


def test_what_a_forward_refuses_is_refused(recorder):
    model, cache = student(num_hidden_layers=1), None
    for _ in range(3):
        cache = read(model, tokens(2, 9)).past_key_values
        read(model, tokens(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values holds 2 rows"):
        read(model, tokens(3, 9), past_key_values=cache)
    mask = torch.ones(2, 20, dtype=torch.long)
    for _ in range(3):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            read(model, tokens(2, 9), past_key_values=cache, attention_mask=mask)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for _ in range(3):
        with pytest.raises(ValueError, match="packed sequences keeps no cache"):
            read(model, tokens(1, 9), position_ids=packed)


def test_inference_mode_has_graphs_of_its_own(recorder):
    model = student(num_hidden_layers=1)
    for _ in range(3):
        with torch.inference_mode():
            found = model(tokens(2, 9), use_cache=True)
        assert_same(found, read(model, tokens(2, 9), False))
        assert_same(read(model, tokens(2, 9)), read(model, tokens(2, 9), False))
        cache = read(model, tokens(2, 9), False).past_key_values
        after = read(model, tokens(2, 6), past_key_values=found.past_key_values)
        assert_same(after, read(model, tokens(2, 6), False, past_key_values=cache))
    assert len(recorder.tapes) == 3


def test_there_are_no_graphs_on_a_cpu():
    model = student(num_hidden_layers=1)
    for _ in range(3):
        read(model, tokens(1, 5))
    assert not read_graph._graphs.get(model)
