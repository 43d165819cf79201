"""``generate`` with its step in a graph, a tape of operations standing in for CUDA's: the same bits, or a reason."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from tape import TapeRecorder
from tiny import student, teacher, tokens
from torch import nn

from lizard_models.model import decode_graph
from lizard_models.model.decode_graph import free_decode_graphs
from lizard_models.model.step_recorder import Uncapturable

CLAMPED = {"positions": "clamped", "position_limit": 24, "position_step": 10}


@pytest.fixture
def recorder(monkeypatch):
    recorder = TapeRecorder()
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: recorder)
    return recorder


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(decode_graph, "tell", lines.append)
    return lines


def both(model, ids, **options):
    """generate without and with graphs."""
    seed = options.pop("seed", 5)
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True) | options
    found = []
    for graph in (False, None):
        torch.manual_seed(seed)
        found.append(model.generate(input_ids=ids, **options, decode_graph=graph))
    return found


def assert_same(plain, graphed):
    assert torch.equal(plain.sequences, graphed.sequences)
    if plain.logits is not None:
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, graphed.logits, strict=True))


def padded(rows=3, length=9):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 6:] = 0
    return mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": padded()},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "attention_mask": padded(), "max_new_tokens": 10},
        {"repetition_penalty": 1.3, "min_new_tokens": 4},
        {"eos_token_id": list(range(40)), "pad_token_id": 0, "min_new_tokens": 6},  # rows end one by one
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
    ],
)
def test_steps_from_a_graph_are_the_steps(recorder, options):
    model, ids = student(num_hidden_layers=2), tokens(3, 9)
    plain, graphed = both(model, ids, **options)
    assert_same(plain, graphed)
    steps = len(plain.logits) - 1
    steps += options.get("prefill_chunk_size") == 4  # the last piece of the prompt is one token, so a step
    assert len(recorder.tapes) == 1 and recorder.warm_ups == 1 and recorder.replays == steps - 1
    assert graphed.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    assert torch.equal(graphed.past_key_values.positions(), plain.past_key_values.positions())


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_other_families(recorder, family):
    changes = {} if family == "qwen3" else {"keep_sliding_layers": False}
    assert_same(*both(student(family=family, **changes), tokens(2, 9)))
    assert recorder.replays == 10


@pytest.mark.parametrize(
    "attention",
    [{"kept_keys": 5}, {"kept_keys": 5, "score_received": True}, {"mix": "sum", "merge_bias": "none", "num_sinks": 2}],
)
def test_other_states(recorder, attention):
    assert_same(*both(student(num_hidden_layers=1, attention=attention), tokens(2, 9), max_new_tokens=20))
    assert recorder.replays == 18


@pytest.mark.parametrize("kept", [0, 5])
def test_anchors_that_move_on_are_another_graph(recorder, kept):
    model, ids = student(num_hidden_layers=1, attention=CLAMPED | {"kept_keys": kept}), tokens(2, 9)
    plain, graphed = both(model, ids, max_new_tokens=40)
    assert_same(plain, graphed)
    assert len(recorder.tapes) == recorder.warm_ups == 2 and recorder.replays == 37


def test_a_pool_serves_the_next_call(recorder):
    model, options = student(num_hidden_layers=1), dict(max_new_tokens=12, return_dict_in_generate=False)
    for rows, seed, tapes in ((2, 3, 1), (2, 4, 1), (3, 4, 2), (2, 6, 2), (3, 6, 2)):
        before, warm_ups = recorder.replays, recorder.warm_ups
        plain, graphed = both(model, tokens(rows, 5 + seed, seed=seed), **options, output_logits=False)
        assert torch.equal(plain, graphed)
        assert len(recorder.tapes) == tapes
        first = recorder.warm_ups > warm_ups
        assert recorder.replays - before == (10 if first else 11)
    both(model, tokens(4, 6), **options, output_logits=False)
    pool = decode_graph._pools[model]
    assert len(pool) == 2  # a third batch size takes the oldest's place
    held = [weakref.ref(cache) for cache in pool]
    del pool
    free_decode_graphs(model)
    gc.collect()
    assert not any(ref() is not None for ref in held)  # and the graphs with them


def test_a_pool_goes_with_its_model(recorder):
    model = student(num_hidden_layers=1)
    model.generate(tokens(1, 5), max_new_tokens=9)
    cache, gone = weakref.ref(decode_graph._pools[model][0]), weakref.ref(model)
    assert decode_graph._graphs[cache()] is not None
    copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    del model
    gc.collect()
    assert gone() is None and cache() is None


def test_a_cache_that_is_returned_is_the_callers(recorder):
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    plain, first = both(model, ids)
    assert not decode_graph._pools.get(model)
    more, options = tokens(2, 4, seed=8), dict(max_new_tokens=9, do_sample=False)
    wanted = model.generate(**plain.past_key_values.copy().inputs_for(more), **options, decode_graph=False)
    before = first.past_key_values.copy()
    found = model.generate(**first.past_key_values.inputs_for(more), **options)
    assert torch.equal(found, wanted)
    assert len(recorder.tapes) == 1 and recorder.warm_ups == 1  # its graph went with it
    assert torch.equal(model.generate(**before.inputs_for(more), **options), wanted)
    assert len(recorder.tapes) == 2  # a copy has none


def test_changed_weights_and_choices_are_captured_again(recorder):
    model, ids, options = student(num_hidden_layers=1), tokens(2, 9), dict(return_dict_in_generate=False)

    def check(tapes):
        plain, graphed = both(model, ids, **options, output_logits=False)
        assert torch.equal(plain, graphed) and len(recorder.tapes) == tapes

    check(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)  # as an optimizer: where they lie
    check(1)
    model.double()
    check(2)
    model.train()
    check(3)
    model.eval()
    check(4)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight.flip(0))
    check(5)


def test_adapters_are_captured_in_every_call(recorder):
    from peft import LoraConfig, get_peft_model

    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    for tapes in (1, 2):
        assert_same(*both(adapted, ids))
        assert len(recorder.tapes) == tapes
    with adapted.disable_adapter():
        assert_same(*both(adapted, ids))


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return "model.layers.0.mlp has hooks"


def quantised(model):
    model.hf_quantizer = SimpleNamespace(is_compileable=True)
    return "quantised"


def of_another_kind(model):
    class Packed(nn.Parameter):
        pass

    model.lm_head.weight = Packed(model.lm_head.weight.detach(), requires_grad=False)
    return "lm_head.weight is a Packed"


def compiled(model):
    model.model.layers[0].mlp.compile(backend="eager")
    return "mlp is compiled"


@pytest.mark.parametrize("change", [hooked, quantised, of_another_kind, compiled])
def test_what_is_not_captured_says_why(recorder, told, change):
    model, ids = student(num_hidden_layers=1, tie_word_embeddings=False), tokens(2, 9)
    reason = change(model)
    assert_same(*both(model, ids))
    assert not recorder.tapes and len(told) == 1 and reason in told[0]


def test_kept_softmax_layers_grow(recorder, told):
    assert_same(*both(student(num_hidden_layers=2, softmax_layers=(1,)), tokens(2, 9)))
    assert not recorder.tapes and "kept softmax layers" in told[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 2}, None),
        ({"use_cache": False}, "no cache"),
        ({"max_new_tokens": 4}, None),  # a capture would not pay
    ],
)
def test_calls_without_a_graph(recorder, told, options, reason):
    options = dict(output_logits=False) | options
    assert_same(*both(student(num_hidden_layers=1), tokens(1, 9), **options))
    assert not recorder.tapes
    assert (reason is None and not told) or reason in told[0]


def test_hidden_states_once_asked_for_leave_idle_hooks(recorder):
    model, ids = student(num_hidden_layers=1), tokens(2, 9)  # of one row a CPU's step is another op's, unless watched
    model(ids, output_hidden_states=True)
    assert_same(*both(model, ids))
    assert recorder.replays


def test_a_step_that_waits_for_the_device_stays_as_it_is(monkeypatch, told):
    recorder = TapeRecorder(why="aten.item waits for the device")
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: recorder)
    assert_same(*both(student(num_hidden_layers=1), tokens(2, 9)))
    assert not recorder.tapes and recorder.warm_ups == 1 and told == ["aten.item waits for the device"]


def test_a_capture_that_fails_leaves_the_steps(recorder, told, monkeypatch):
    def broken(step):
        raise RuntimeError("operation not permitted\nwhile the stream is capturing")

    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    monkeypatch.setattr(recorder, "capture", broken)
    assert_same(*both(model, ids))
    assert told == ["the capture failed (RuntimeError: operation not permitted)"]


def test_hooks_of_the_model_itself_run_around_every_step(recorder):
    model, ids, seen = student(num_hidden_layers=1), tokens(2, 9), []
    model.register_forward_hook(lambda module, args, outputs: seen.append(outputs.logits.clone()))
    plain, graphed = both(model, ids)
    assert_same(plain, graphed)
    assert len(seen) == 24 and torch.equal(torch.cat(seen[1:12]), torch.cat(seen[13:]))
    assert recorder.replays == 10


def test_positions_that_a_caller_gives_are_counted_on(recorder):
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    positions = torch.arange(20, 29)[None].repeat(2, 1)  # a text that begins elsewhere, for RoPE alone
    assert_same(*both(model, ids, position_ids=positions))
    assert recorder.replays == 10


def test_off_by_a_keyword_or_the_generation_config(recorder):
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    with pytest.raises(ValueError, match="decode_graph: got 'yes', wanted True, False, or None"):
        model.generate(ids, max_new_tokens=9, decode_graph="yes")
    model.generation_config.decode_graph = False
    model.generate(ids, max_new_tokens=9)
    assert not recorder.tapes
    model.generate(ids, max_new_tokens=9, decode_graph=True)
    assert recorder.tapes


def test_modes_and_teachers_keep_their_own_way(recorder):
    model, ids = student(num_hidden_layers=1), tokens(2, 9)
    model.set_attention_mode("teacher")
    wanted = teacher(num_hidden_layers=1).generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), wanted)
    assert not recorder.tapes


def test_a_warm_up_sees_what_a_graph_cannot_hold():
    def found(call):
        with Uncapturable() as looking:
            call()
        return looking.found

    x = torch.arange(4.0)
    assert found(lambda: x.add_(1).softmax(-1).view(2, 2)) is None
    assert "waits for the device" in found(lambda: x.sum().item())
    assert "waits for the device" in found(lambda: x.nonzero())
    assert "waits for the device" in found(lambda: x[x > 1])
    assert found(lambda: x[torch.tensor([1, 2])]) is None
    assert "random numbers" in found(lambda: nn.functional.dropout(x, 0.5))
    assert "waits for the device" in found(lambda: torch.ones(2, device="meta").copy_(torch.ones(2)))


def test_there_are_no_graphs_on_a_cpu():
    model = student(num_hidden_layers=1)
    model.generate(tokens(1, 5), max_new_tokens=9)
    assert not decode_graph._pools.get(model)
