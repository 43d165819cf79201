"""A text that begins like one that was read goes on from its state, and writes what it writes alone."""

import copy
import pickle
import threading

import pytest
import torch
from readable import byte_tokenizer
from tiny import student, teacher, tokens
from transformers import pipeline

from lizard_models import PrefixStates
from lizard_models.model.prefix.store import common_start, digests_of

KINDS = {
    "plain": {},
    "paper": dict(preset="paper"),
    "wide": dict(wide_layers=[0], wide_window=24),
    "kept softmax": dict(softmax_layers=[1]),
    "kept sliding": dict(family="gemma3_text"),
    "kept keys": dict(attention=dict(kept_keys=4, score_dim=8)),
    "received": dict(attention=dict(kept_keys=4, score_dim=8, score_received=True, score_stride=4)),
    "far anchors": dict(attention=dict(positions="clamped", position_limit=24, position_step=4)),
}
GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)


def written(model, ids, **settings):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | settings)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_writes_what_it_writes_alone(kind):
    model, store = student(**KINDS[kind]), PrefixStates()
    text, fresh = tokens(1, 40), 0
    for turn in range(3):
        alone = written(model, text, prefix_states=False)
        kept = written(model, text, prefix_states=store)
        torch.testing.assert_close(kept, alone, rtol=0, atol=0)
        fresh += text.shape[1] if turn == 0 else 8  # the last token that was written, and the new ones
        assert store.counts.read_tokens == fresh
        text = torch.cat([kept, tokens(1, 7, seed=turn)], 1)
    assert store.counts.texts == 3 and store.counts.found_tokens == (40 + 11) + (40 + 11 + 8 + 11)
    again = written(model, text[:, :51], prefix_states=store)
    torch.testing.assert_close(again, written(model, text[:, :51]), rtol=0, atol=0)


@torch.no_grad()
def test_states_are_those_of_one_forward():
    model, store, text = student(softmax_layers=[1]), PrefixStates(), tokens(1, 50)
    written(model, text[:, :30], prefix_states=store, max_new_tokens=1)
    output = written(
        model, text, prefix_states=store, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(output.logits[0], model(text).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert output.past_key_values.get_seq_length() == 50


@torch.no_grad()
def test_texts_that_part_late_share_their_start():
    """The second text keeps a state where it parts from the first, which the third reads from."""
    model, store, system = student(), PrefixStates(least=8), tokens(1, 60)
    for turn in range(3):
        text = torch.cat([system, torch.full((1, 1), 2 + turn), tokens(1, 9, seed=turn)], 1)
        before = store.counts.found_tokens
        kept = written(model, text, prefix_states=store)
        torch.testing.assert_close(kept, written(model, text), rtol=0, atol=0)
        assert store.counts.found_tokens - before == (60 if turn == 2 else 0)


@torch.no_grad()
def test_the_models_own_store_is_used_and_can_be_left_out():
    model, text = student(), tokens(1, 30)
    model.prefix_states = store = PrefixStates()
    expected = written(model, text, prefix_states=False)
    assert store.counts.texts == 0
    for _ in range(2):
        torch.testing.assert_close(written(model, text), expected, rtol=0, atol=0)
    assert store.counts.texts == 2 and store.counts.read_tokens == 30 + 1
    written(model, tokens(2, 30))  # two different texts: read without it
    written(model, text, prompt_lookup_num_tokens=2)
    assert store.counts.texts == 4 and store.counts.skipped == 2
    assert copy.deepcopy(model).prefix_states is store
    empty = pickle.loads(pickle.dumps(store))
    assert len(empty) == 0 and empty.max_bytes == store.max_bytes


@torch.no_grad()
def test_beams_samples_and_chunks_read_from_a_prefix():
    model, store, text = student(), PrefixStates(), tokens(1, 30)
    written(model, text[:, :20], prefix_states=store)
    for settings in (dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(prefill_chunk_size=7),
                     dict(cache_implementation="static"), dict(do_sample=True, num_return_sequences=3)):  # fmt: skip
        torch.manual_seed(0)
        expected = written(model, text, **settings)
        torch.manual_seed(0)
        torch.testing.assert_close(written(model, text, prefix_states=store, **settings), expected, rtol=0, atol=0)
    assert store.counts.found_tokens >= 19 * 5
    with torch.inference_mode():
        written(model, text, prefix_states=store)
    longer = torch.cat([text, tokens(1, 5)], 1)
    torch.testing.assert_close(written(model, longer, prefix_states=store), written(model, longer), rtol=0, atol=0)


def test_a_pipeline_passes_it_on():
    tokenizer, store = byte_tokenizer(), PrefixStates()
    talk = pipeline("text-generation", model=student(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    settings = dict(max_new_tokens=6, do_sample=False)
    for text in ("the wind turns the mill", "the wind turns the mill and the river"):
        assert talk(text, prefix_states=store, **settings) == talk(text, **settings)
    assert store.counts.found_tokens >= len("the wind turns the mill") - 1


@torch.no_grad()
def test_another_model_finds_nothing():
    """Weights, config, dtype, positions, adapters: whatever a state depends on."""
    text, store, model = tokens(1, 30), PrefixStates(), student()
    written(model, text, prefix_states=store)
    found = store.counts.found_tokens

    def finds(other) -> bool:
        before = store.counts.found_tokens
        torch.testing.assert_close(written(other, text, prefix_states=store), written(other, text), rtol=0, atol=0)
        return store.counts.found_tokens > before

    assert finds(model) and finds(student())  # the same weights in another object
    assert not finds(student(seed=7)) and not finds(student(window=9)) and not finds(student().double())
    assert not finds(student(attention=dict(position_limit=20, position_step=4)))
    model.model.layers[1].mlp.up_proj.weight.mul_(2)  # written to in place
    assert not finds(model) and finds(model)
    model.model.layers[1].mlp.up_proj.weight.div_(2)
    assert finds(model) and store.counts.found_tokens > found
    with torch.autocast("cpu", torch.bfloat16):
        assert not finds(model)
    model.lm_head.weight.data.mul_(2)  # which torch does not count
    store.clear()
    assert not finds(model) and not finds(student()) and len(store) == 4


@torch.no_grad()
@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(prefix_states=3), "got int, wanted a PrefixStates, None or False"),
        (dict(rows=2), "2 different texts"),
        (dict(padding=True), "padding"),
        (dict(use_cache=False), "no constant-size cache"),
        (dict(cache=True), "has read 5 positions"),
        (dict(prompt_lookup_num_tokens=2), "drafts"),
        (dict(position_ids=torch.arange(3, 33)[None]), "position_ids do not count from 0"),
        (dict(softmax=True, cache_implementation="static"), "static cache with kept softmax layers"),
        (dict(mode="teacher"), "mode 'teacher'"),
    ],
)
def test_what_a_store_does_not_help_is_refused(settings, match):
    settings = dict(settings)
    model = student(softmax_layers=[1] if settings.pop("softmax", False) else ())
    model.set_attention_mode(settings.pop("mode", "student"))
    ids = tokens(settings.pop("rows", 1), 30)
    mask = torch.ones_like(ids)
    if settings.pop("padding", False):
        mask[0, :3] = 0
    if settings.pop("cache", False):
        settings["past_key_values"] = model(ids[:, :5]).past_key_values
    settings = GREEDY | dict(prefix_states=PrefixStates()) | settings
    with pytest.raises(ValueError, match=match):
        model.generate(ids, attention_mask=mask, **settings)


def test_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(student(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj has an adapter.*merge"):
        written(adapted, tokens(1, 20), prefix_states=PrefixStates())


@torch.no_grad()
def test_bytes_are_bounded_and_the_least_recently_used_go():
    model, texts = student(), [tokens(1, 30, seed=n) for n in range(6)]
    one = PrefixStates()
    written(model, texts[0], prefix_states=one)
    assert len(one) == 2
    store = PrefixStates(2 * one.nbytes() + 100)  # of four states
    for text in texts:
        written(model, text, prefix_states=store)
        assert 0 < store.nbytes() <= store.max_bytes and len(store) <= 4
        written(model, texts[0], prefix_states=store)  # used again and again: it stays
    assert store.nbytes() == sum(prefix.nbytes for prefix in store._held.values())
    found = store.counts.found_tokens
    written(model, texts[0], prefix_states=store)
    assert store.counts.found_tokens - found == 29
    written(model, texts[1], prefix_states=store)
    assert store.counts.found_tokens - found == 29  # gone
    nothing = PrefixStates(0)
    written(model, texts[0], prefix_states=nothing)
    assert len(nothing) == nothing.nbytes() == 0
    store.clear()
    assert len(store) == store.nbytes() == 0


def test_many_threads_share_a_store():
    model, store = student(num_hidden_layers=1), PrefixStates(40_000)
    texts = [tokens(1, 20 + n % 3 * 7, seed=n % 4) for n in range(12)]
    expected, found = [written(model, text) for text in texts], [None] * len(texts)

    def ask(n: int) -> None:
        found[n] = written(model, texts[n], prefix_states=store)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert store.nbytes() <= 40_000


def test_tokens_are_compared_as_they_are():
    a, b = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 4, 4, 5])
    assert common_start(a, b) == 2 and common_start(a, a[:3]) == 3 and common_start(a, a[:0]) == 0
    assert digests_of(a, (2, 3))[2] == digests_of(b, (2,))[2] != digests_of(a, (3,))[3]
    assert digests_of(torch.tensor([258]), (1,)) != digests_of(torch.tensor([2, 1]), (2,))


@pytest.mark.parametrize("name, value", [("max_bytes", -1), ("max_disk_bytes", -2), ("least", 0)])
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, wanted"):
        PrefixStates(**{name: value})


def test_a_teacher_knows_no_store():
    with pytest.raises(ValueError, match="prefix_states"):
        teacher().generate(tokens(1, 20), prefix_states=PrefixStates(), max_new_tokens=2)
