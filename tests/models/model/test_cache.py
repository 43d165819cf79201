"""The cache: constant size from the first token, the same logits however the prompt arrives, what it refuses."""

import copy
import dataclasses

import pytest
import torch
from tiny import student, tokens
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lizard_layers import empty_state, state_bytes
from lizard_models import LizardCache
from lizard_models.model.layer_configs import attention_config

PRESETS = ["plain", "paper", "paper_literal", "lolcats", "liger", "window_only"]


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_in_pieces_and_steps_equals_one_shot(preset):
    model, ids = student(preset), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ([40], [1] * 40, [3, 17, 1, 19], [8, 8, 24]):
        cache, pieces = model.new_cache(), []
        for piece in ids.split(sizes, dim=1):
            pieces.append(model(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kept", [(0,), (1, 2)])
def test_kept_softmax_layers_share_the_cache(family, kept):
    model, ids = student(family=family, softmax_layers=kept), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ([1] * 40, [3, 17, 1, 19]):
        cache = model.new_cache()
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], 1)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert [isinstance(layer, DynamicLayer) for layer in cache.layers] == [i in kept for i in range(3)]


@torch.no_grad()
def test_kept_sliding_window_layers_share_the_cache():
    model, ids = student(family="mistral", sliding_window=12, softmax_layers=(1,)), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ([1] * 40, [3, 17, 1, 19]):
        cache = model.new_cache()
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], 1)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert isinstance(cache.layers[1], DynamicSlidingWindowLayer)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_size_is_constant_from_the_first_token(preset):
    model, cache = student(preset), None
    ids = tokens(2, 30)
    sizes = set()
    for t in range(30):
        cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        sizes.add(cache.state_bytes())
    assert sizes == {3 * state_bytes(empty_state(attention_config(model.config), 2))}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "right"])
def test_padded_prompts_leave_the_state_of_single_runs(layout):
    model = student()
    rows = [tokens(1, length, seed=length)[0] for length in (20, 11, 3)]
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(20 - len(row), 20) if layout == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, 1
    cache = model(ids, attention_mask=mask).past_key_values
    for b, row in enumerate(rows):
        alone = model(row[None]).past_key_values
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            for a, s in zip(ours.state, theirs.state, strict=True):
                if a is not None:
                    torch.testing.assert_close(a[b : b + 1], s, rtol=1e-4, atol=1e-4)
    assert cache.layers[0].state.position.tolist() == [20, 11, 3]
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_a_cached_prompt_with_padding_goes_on():
    model = student()
    ids, mask = tokens(2, 25), torch.ones(2, 25, dtype=torch.long)
    mask[0, :6] = 0
    cache = model(ids[:, :15], attention_mask=mask[:, :15]).past_key_values
    later = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    alone = model(ids[:1, 6:]).logits[:, 9:]
    torch.testing.assert_close(later[:1], alone, rtol=1e-4, atol=1e-4)
    assert cache.positions().tolist() == [19, 25]
    cache = model(ids[:, :15], attention_mask=mask[:, :15]).past_key_values
    without_mask = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(without_mask, later)


@torch.no_grad()
@pytest.mark.parametrize("take", [copy.deepcopy, LizardCache.copy])
@pytest.mark.parametrize("kept", [(), (1,)])
def test_a_snapshot_is_independent(take, kept):
    model, ids = student(softmax_layers=kept), tokens(1, 30)
    cache = model(ids[:, :20]).past_key_values
    snapshot = take(cache)
    for cut in (ids[:, 20:], ids[:, 20:21]):
        again = take(snapshot)
        first = model(cut, past_key_values=take(cache)).logits
        assert torch.equal(first, model(cut, past_key_values=again).logits)
        assert (snapshot.get_seq_length(), again.get_seq_length()) == (20, 20 + cut.shape[1])


@pytest.mark.parametrize("static", [False, True])
def test_a_copy_stays_in_the_graph_of_gradients(static):
    model, ids = student(softmax_layers=(1,)).requires_grad_(True), tokens(2, 12)
    options = dict(past_key_values=model.new_cache(static=static, max_cache_len=16)) if static else {}
    with torch.set_grad_enabled(not static):  # a static layer is written to in place
        cache = model(ids[:, :8], **options).past_key_values
    twin = cache.copy()
    model(ids[:, :4], past_key_values=cache)
    logits = model(ids[:, 8:], past_key_values=twin).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert model.model.embed_tokens.weight.grad[ids[0, 0]].any() == (not static)


def addresses(cache) -> list[int]:
    return [t.data_ptr() for layer in cache.lizard_layers() for t in layer.state if t is not None]


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_the_tensors_stay_where_they_are(preset):
    model, ids = student(preset), tokens(2, 30)
    cache = model.new_cache().allocate(2)
    first = addresses(cache)
    whole = model(ids, use_cache=False).logits
    for _ in range(2):
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([11, 1, 1, 17], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert addresses(cache) == first
        cache.reset()
    assert addresses(cache) == first


def test_gradients_flow_through_a_cache():
    model, ids = student().requires_grad_(True), tokens(2, 12)
    model.zero_grad()
    cache = model(ids[:, :8]).past_key_values
    for t in range(8, 12):
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits
    logits.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, use_cache=False).logits[:, -1:].sum().backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def test_a_state_of_inference_mode_goes_on_outside():
    model, ids = student(), tokens(1, 12)
    with torch.inference_mode():
        cache = model(ids[:, :8]).past_key_values
    with torch.no_grad():
        later = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)], 1)
        torch.testing.assert_close(later, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (1,)])
def test_moves_to_another_dtype(kept):
    """What was read in float32 goes on in bfloat16, and errs no more than a model that has read it all in bfloat16."""
    model, ids, more = student(softmax_layers=kept), tokens(2, 20), tokens(2, 5, seed=3)
    exact = model(torch.cat([ids, more], 1)).logits[:, 20:]
    cache = model(ids).past_key_values.to("cpu", torch.bfloat16)
    for layer in cache.lizard_layers():
        for name, t in layer.state._asdict().items():
            keys = name in ("ring_k", "ring_v", "ring_fk", "anchor_k", "anchor_v")
            wanted = torch.int64 if name == "position" else torch.bfloat16 if keys else torch.float32
            assert t is None or t.dtype == wanted, name
    assert cache.get_seq_length() == 20
    model.bfloat16()
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in more.split([1, 4], 1)], 1)
    reference = model(torch.cat([ids, more], 1)).logits[:, 20:]
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() <= 1.2 * (reference.float() - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("options", [{}, {"family": "mistral", "sliding_window": 12}])
def test_every_tensor_moves(options, static):
    """Also what kept layers count their positions and windows by."""
    model = student(softmax_layers=(1,), **options)
    cache = LizardCache(model.config, static=static, max_cache_len=16 if static else None)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    model(tokens(2, 9), attention_mask=mask, past_key_values=cache)
    cache.to("meta", torch.float64)
    assert cache.read_mask.device.type == cache.mask_of_the_past().device.type == "meta"
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        held = dict(vars(layer)) if state is None else state._asdict()
        tensors = {name: t for name, t in held.items() if isinstance(t, torch.Tensor)}
        assert tensors and {t.device.type for t in tensors.values()} == {"meta"}
        for name, t in tensors.items():
            assert not t.is_floating_point() or t.dtype == torch.float64, name


@torch.no_grad()
@pytest.mark.parametrize("kept", [(0,), (1,)])
def test_a_move_that_is_refused_moves_nothing(kept):
    """Also the layers before the first that records its past stay as they are."""
    model, ids = student(softmax_layers=kept), tokens(2, 9)
    cache, untouched = (model(ids).past_key_values for _ in range(2))
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="records its past cannot be moved"):
        cache.to("cpu", torch.bfloat16)
    (layer,) = (cache.layers[i] for i in kept)
    named = getattr(layer, "dtype", torch.float32)  # by transformers up to 5.23
    assert named == layer.keys.dtype == layer.values.dtype == torch.float32
    more = tokens(2, 3, seed=3)
    found, wanted = (model(more, past_key_values=c).logits for c in (cache, untouched))
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_another_number_of_rows_is_refused():
    model = student()
    cache = model(tokens(2, 9)).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, but the inputs have 3"):
        model(tokens(3, 1), past_key_values=cache)
    cache.reset()
    first = addresses(cache)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(tokens(3, 4), attention_mask=torch.ones(3, 5), past_key_values=cache)
    assert addresses(cache) == first  # a refusal leaves an empty cache its tensors too
    assert model(tokens(3, 4), past_key_values=cache).logits.shape[0] == 3


@torch.no_grad()
@pytest.mark.parametrize("preset", ["plain", "paper", "liger"])
def test_bfloat16_pieces_err_no_more_than_the_reference(preset):
    ids = tokens(2, 24)
    exact = student(preset)(ids, use_cache=False).logits
    model = student(preset).bfloat16()
    reference = naive(preset).bfloat16()(ids, use_cache=False).logits.float()
    allowed = 2 * (reference - exact).norm()
    for sizes in ([24], [11, 1, 1, 1, 1, 9]):
        cache = model.new_cache()
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], 1)
        assert (logits.float() - exact).norm() <= allowed, sizes


def naive(preset: str):
    model = student(preset)
    for attention in model.lizard_attentions():
        attention.lizard.config = dataclasses.replace(attention.lizard.config, impl="naive")
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"softmax_layers": (1,)}, {"family": "mistral", "sliding_window": 12, "softmax_layers": (1,)}]
)
def test_recorded_tokens_can_be_taken_back(options):
    """While rows change places: what is remembered of them goes with them."""
    model, ids = student(**options), tokens(2, 60)
    whole = model(ids, use_cache=False).logits
    cache = model.new_cache()
    cache.activate_past_recording()
    wrong = tokens(2, 5, seed=9)
    at = 0
    for size in (20, 1, 7, 1, 12):  # read right ones and wrong ones, take the wrong ones back
        read = torch.cat([ids[:, at : at + size], wrong], 1)
        logits = model(read, past_key_values=cache).logits[:, :size]
        torch.testing.assert_close(logits, whole[:, at : at + size], rtol=1e-4, atol=1e-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-5)
        ids, whole = ids.flip(0), whole.flip(0)
        at += size
        assert cache.get_seq_length() == at
    for t in range(3):  # as an assistant: one token at a time, then all back
        model(wrong[:, t : t + 1], past_key_values=cache)
    cache.crop(-3)
    logits = model(ids[:, at:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole[:, at:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_long_prompts_are_remembered_in_part():
    model, ids = student(), tokens(1, 200)
    cache = model.new_cache()
    cache.activate_past_recording()
    logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only the last 128 tokens are remembered"):
        cache.crop(-129)
    assert cache.get_seq_length() == 200
    cache.crop(-128)
    later = model(ids[:, 72:], past_key_values=cache).logits
    torch.testing.assert_close(later, logits[:, 72:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="wanted a negative number"):
        cache.crop(5)


@torch.no_grad()
def test_taking_back_everything_leaves_an_empty_cache():
    model, ids = student(), tokens(1, 9)
    cache = model.new_cache()
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-9)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_can_be_reordered_repeated_and_dropped():
    model, ids = student(), tokens(3, 20)
    step = tokens(4, 1, seed=5)

    def after(change) -> torch.Tensor:
        cache = model(ids).past_key_values
        change(cache)
        rows = cache.layers[0].state.position.shape[0]
        return model(step[:rows], past_key_values=cache).logits

    def directly(order) -> torch.Tensor:
        cache = model(ids[order]).past_key_values
        return model(step[: len(order)], past_key_values=cache).logits

    for change, order in MOVES:
        torch.testing.assert_close(after(change), directly(order), rtol=1e-4, atol=1e-4)


MOVES = [
    (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    (lambda c: (c.batch_select_indices(torch.tensor([0, 2])), c.batch_repeat_interleave(2)), [0, 0, 2, 2]),
]


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (1,)])
def test_what_is_remembered_moves_with_its_rows(kept):
    """Rows with padding, moved before some of what they read is taken back: mask, record and softmax keys move too."""
    model, ids, more = student(softmax_layers=kept), tokens(3, 30), tokens(4, 3, seed=5)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :7] = mask[1, :2] = 0
    for change, order in MOVES:
        cache = model.new_cache()
        cache.activate_past_recording()
        model(ids[:, :24], attention_mask=mask[:, :24], past_key_values=cache)
        model(ids[:, 24:], attention_mask=mask, past_key_values=cache)
        change(cache)
        cache.crop(-6)
        rows = len(order)
        assert cache.positions().tolist() == mask[order, :24].sum(1).tolist()
        told = torch.cat([mask[order, :24], torch.ones(rows, 3, dtype=torch.long)], 1)
        found = model(more[:rows], attention_mask=told, past_key_values=cache).logits
        text = torch.cat([ids[order, :24], more[:rows]], 1)
        wanted = model(text, attention_mask=told, use_cache=False).logits[:, 24:]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_state_that_is_set_is_read():
    model, ids = student(), tokens(1, 20)
    whole, cache = model(ids).past_key_values, model.new_cache()
    for ours, theirs in zip(cache.lizard_layers(), whole.lizard_layers(), strict=True):
        ours.set_state(theirs.state)
    step = tokens(1, 2, seed=5)
    assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=whole).logits)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["plain", "paper"])
def test_reset_forgets(preset):
    """Padding, what was remembered of the past and the tokens that can be taken back as well."""
    model, ids = student(preset), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    cache = model.new_cache()
    cache.activate_past_recording()
    model(tokens(2, 20, seed=7), attention_mask=mask, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.positions().tolist() == [0, 0]
    assert cache.read_mask is None and not cache.padded
    with pytest.raises(ValueError, match="only the last 0 tokens are remembered"):
        cache.crop(-1)
    whole = model(ids).logits
    assert torch.equal(model(ids, past_key_values=cache).logits, whole)
    cache.crop(-8)
    torch.testing.assert_close(model(ids[:, 12:], past_key_values=cache).logits, whole[:, 12:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only the last 8 tokens are remembered"):
        cache.crop(-9)


def test_what_it_cannot_do_is_refused_by_name():
    model = student()
    cache = model(tokens(1, 9)).past_key_values
    assert isinstance(cache, LizardCache)
    with pytest.raises(ValueError, match="cannot be cropped: .*activate_past_recording.* copy.deepcopy"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="keeps a state, not keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="offloading is not supported"):
        cache.offload(0, only_non_sliding=False)


@torch.no_grad()
def test_moved_anchors_go_with_steps_in_place_and_tokens_taken_back():
    ids = tokens(2, 260)
    attention = {"window": 8, "positions": "clamped", "position_limit": 24, "position_step": 10}
    model = student(attention=attention)
    whole = model(ids, use_cache=False).logits
    cache = model.new_cache()
    cache.activate_past_recording()
    read = [model(torch.cat([ids[:, :150], tokens(2, 9)], 1), past_key_values=cache).logits[:, :150]]
    cache.crop(-9)
    read += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(150, 180)]
    read.append(model(ids[:, 180:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(read, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_names_that_a_transformers_has_as_properties_stay_its_own(monkeypatch, static):
    """5.0 to 5.17 have ``Cache.max_cache_len`` without a setter, 5.23 has none."""
    monkeypatch.setattr(Cache, "max_cache_len", property(lambda cache: -1), raising=False)
    model, ids = student(softmax_layers=(1,)), tokens(2, 12)
    cache = model.new_cache(static=static, max_cache_len=12)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert cache.max_cache_len == -1
