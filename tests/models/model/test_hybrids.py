"""Layers that keep the teacher's softmax attention: by list, by share, and sliding ones as they are."""

import pytest
import torch
from tiny import student, teacher, tokens
from transformers import AutoModelForCausalLM

from lizard_models import LizardConfig, linearize
from lizard_models.evaluation.control import window_control
from lizard_models.model.cache_layer import LizardCacheLayer
from lizard_models.model.layer_configs import converted_layers, evenly_placed, kept_layers
from lizard_models.runs import memory
from lizard_models.teachers.find import Teacher

MIXED = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}


def test_a_share_of_the_layers_is_placed_evenly():
    assert evenly_placed(list(range(32)), 0.25) == [2, 6, 10, 14, 18, 22, 26, 30]
    assert evenly_placed(list(range(30)), 0.125) == [3, 11, 18, 26]
    assert evenly_placed(list(range(3)), 0.5) == [0, 2]
    assert evenly_placed(list(range(30)), 0.001) == [15]
    assert evenly_placed(list(range(30)), 0.0) == evenly_placed([], 0.5) == []
    assert evenly_placed([5, 11, 17, 23], 0.5) == [11, 23]


@torch.no_grad()
def test_a_share_is_the_list_it_stands_for(tmp_path):
    by_share, by_list, ids = student(softmax_share=0.34), student(softmax_layers=(1,)), tokens(2, 30)
    assert kept_layers(by_share.config) == [1]
    assert torch.equal(by_share(ids).logits, by_list(ids).logits)
    by_share.save_pretrained(tmp_path)
    assert kept_layers(AutoModelForCausalLM.from_pretrained(tmp_path).config) == [1]


@pytest.mark.parametrize(
    ("family", "changes", "keep", "converted"),
    [
        ("llama", {}, None, [0, 1, 2]),
        ("llama", {}, True, [0, 1, 2]),
        ("mistral", {"sliding_window": 12}, None, [0, 1, 2]),
        ("mistral", {"sliding_window": 12}, True, []),
        ("qwen2", {"sliding_window": 12}, None, [0, 1, 2]),
        ("qwen2", MIXED, None, [0, 1]),
        ("qwen2", MIXED, False, [0, 1, 2]),
        ("gemma3_text", {}, None, [1, 2]),
        ("gemma3_text", {}, False, [0, 1, 2]),
    ],
)
def test_sliding_layers_are_kept_where_the_teacher_has_both_kinds(family, changes, keep, converted):
    model = student(family=family, keep_sliding_layers=keep, **changes)
    assert converted_layers(model.config) == converted == [a.layer_idx for a in model.lizard_attentions()]


def test_a_share_counts_the_layers_that_would_be_converted():
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 4
    model = student(family="gemma3_text", softmax_share=0.5, num_hidden_layers=6, layer_types=kinds)
    assert kept_layers(model.config) == [0, 1, 3, 5] and converted_layers(model.config) == [2, 4]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes", "constant"),
    [
        ("gemma3_text", {}, True),
        ("qwen2", MIXED, True),
        ("qwen2", MIXED | {"softmax_layers": (0,)}, False),
        ("llama", {"softmax_share": 0.3}, False),
    ],
)
def test_one_cache_holds_every_kind_of_layer(family, changes, constant):
    model, sizes = student(family=family, **changes), []
    cache = model.new_cache()
    for step in range(4):
        model(tokens(1, 15, seed=step), past_key_values=cache)
        sizes.append(cache.state_bytes())
        assert sizes[-1] == memory.lizard_bytes(model.config, 15 * (step + 1), torch.float32)
    assert (len(set(sizes)) == 1) == constant
    kinds = [isinstance(layer, LizardCacheLayer) for layer in cache.layers]
    assert [i for i, is_state in enumerate(kinds) if is_state] == converted_layers(model.config)
    assert cache.get_seq_length() == 60 and {layer.get_seq_length() for layer in cache.layers} == {60}


@torch.no_grad()
@pytest.mark.parametrize("kept", [{}, {"softmax_layers": (1,)}])
def test_kept_layers_of_both_kinds_search_with_beams(kept):
    model, ids = student(family="gemma3_text", **kept), tokens(2, 20)
    settings = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("kept", [{}, {"softmax_layers": (1,)}])
def test_right_padding_is_exact_and_gaps_are_refused_beside_sliding_layers(kept):
    model, ids = student(family="gemma3_text", **kept), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[1, :25], model(ids[1:, :25]).logits[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="padding between the real tokens of row 1, which the kept sliding-window"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
    mask[1] = torch.arange(30) % 2
    with pytest.raises(ValueError, match="padding between the real tokens of row 1"):
        model(ids, attention_mask=mask)
    exact = student(family="gemma3_text", keep_sliding_layers=False, **kept)
    torch.testing.assert_close(
        exact(ids, attention_mask=mask).logits[1, 1::2], exact(ids[1:, 1::2]).logits[0], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_a_static_cache_and_a_snapshot_hold_sliding_layers_too():
    model, ids = student(family="gemma3_text", softmax_layers=(1,)), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    cache = model.new_cache(static=True, max_cache_len=64)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([25] + [1] * 15, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    cache = model.new_cache()
    model(ids[:, :25], past_key_values=cache)
    kept = cache.copy()
    cache.activate_past_recording()
    model(ids[:, :7], past_key_values=cache)
    cache.crop(-7)
    for snapshot in (kept, cache):
        logits = model(ids[:, 25:], past_key_values=snapshot).logits
        torch.testing.assert_close(logits, whole[:, 25:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kept", [{"softmax_share": 0.5}, {"softmax_layers": [0, 1]}, {"keep_sliding_layers": False}, {}]
)
def test_the_window_control_keeps_the_same_layers(kept):
    made = teacher("gemma3_text")
    config = LizardConfig.preset("plain", attention={"window": 8}, **kept)
    control = window_control(Teacher(made, None, "random"), config)
    assert kept_layers(control.config) == kept_layers(linearize(made, config).config)
    assert not list(control.lizard_parameters())


def test_what_cannot_be_kept_or_converted_says_why():
    recommended = LizardConfig.preset("plain", attention={"window": 13})
    with pytest.raises(ValueError, match="window=13 is wider than the teacher's sliding window of 12 in layer 2"):
        linearize(teacher("qwen2", **MIXED), recommended.replace(keep_sliding_layers=False))
    linearize(teacher("qwen2", **MIXED), recommended)
    with pytest.raises(ValueError, match=r"give one of softmax_layers and softmax_share, got \[1\] and 0.5"):
        recommended.replace(softmax_layers=[1], softmax_share=0.5)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"softmax_share is a share .* got {share}"):
            recommended.replace(softmax_share=share)
    with pytest.raises(ValueError, match="keep_sliding_layers must be bool"):
        recommended.replace(keep_sliding_layers="yes")


@torch.no_grad()
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_no_tokens_at_all_are_refused_beside_kept_layers(given):
    model, ids = student(softmax_layers=(1,)), tokens(2, 9)
    cache = model(ids).past_key_values
    none = {given: ids[:, :0] if given == "input_ids" else model.get_input_embeddings()(ids[:, :0])}
    with pytest.raises(ValueError, match=f"{given}: got 0 tokens, wanted at least 1"):
        model(**none, past_key_values=cache)
    assert student()(ids[:, :0]).logits.shape == (2, 0, 97)  # a state alone reads none


STATIC = {"softmax_layers": (1,)}, {"family": "gemma3_text", "softmax_layers": (1,)}


@torch.no_grad()
@pytest.mark.parametrize("options", STATIC)
def test_static_caches_keep_their_rows_and_say_so(options):
    model, ids = student(**options), tokens(2, 9)
    cache = model(ids, past_key_values=model.new_cache(static=True, max_cache_len=16)).past_key_values
    before = [t.clone() for layer in cache.lizard_layers() for t in layer.state if t is not None]
    for change in (lambda: cache.batch_select_indices(torch.tensor([1])), lambda: cache.batch_repeat_interleave(2)):
        with pytest.raises(ValueError, match="batch_.*: a Static.*Layer keeps the rows it was made for"):
            change()
    after = [t for layer in cache.lizard_layers() for t in layer.state if t is not None]
    assert all(map(torch.equal, before, after))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"softmax_layers": (1,)}, {"family": "gemma3_text", "sliding_window": 20}])
def test_static_caches_that_are_too_short_are_refused_unchanged(options):
    model, ids = student(**options), tokens(2, 20)
    cache = model(ids[:, :14], past_key_values=model.new_cache(static=True, max_cache_len=16)).past_key_values
    with pytest.raises(ValueError, match="has seen 14 positions and gets 3, .* max_cache_len=16"):
        model(ids[:, 14:17], past_key_values=cache)
    found = model(ids[:, 14:16], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids[:, :16]).logits[:, 14:], rtol=1e-4, atol=1e-4)


def test_static_caches_leave_inference_mode():
    model, ids = student(softmax_layers=(1,)), tokens(1, 12)
    with torch.inference_mode():
        cache = model(ids[:, :8], past_key_values=model.new_cache(static=True, max_cache_len=16)).past_key_values
    with torch.no_grad():
        later = model(ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(later, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        cache = model(ids[:, :8], past_key_values=model.new_cache(static=True, max_cache_len=16)).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    held = [t for t in vars(cache.layers[1]).values() if isinstance(t, torch.Tensor)]
    assert len(held) >= 2 and all(hasattr(t, "_dynamo_static_input_type") for t in held)  # compiled steps write there


@torch.no_grad()
@pytest.mark.parametrize("static", [True, False])
def test_an_emptied_cache_takes_another_number_of_rows(static):
    model, ids = student(softmax_layers=(1,)), tokens(3, 12)
    cache = model.new_cache(static=static, max_cache_len=16)
    if not static:
        cache.activate_past_recording()
    model(ids[:2], past_key_values=cache)
    cache.reset() if static else cache.crop(-12)
    found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(5, 1)], 1)
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
