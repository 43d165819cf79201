"""Positions past the teacher's context: what each form promises, however the text arrives."""

import math

import pytest
import torch
from readable import byte_tokenizer
from tiny import assert_slopes, disturb, teacher, tokens

from lizard_models import LizardConfig, linearize
from lizard_models.model.positions import PositionRange, position_range, with_far_positions
from lizard_models.teachers.loading import load_model
from lizard_ops import apply_rotary

LIMIT = 24  # the teacher's context; window 8 and 4 anchors fit


def student(preset="plain", positions="clamped", layers=3, **changes):
    attention = {"window": 8, "positions": positions} | changes
    model = linearize(
        teacher(max_position_embeddings=LIMIT, num_hidden_layers=layers),
        LizardConfig.preset(preset, attention=attention),
    )
    disturb(model)
    return model.requires_grad_(False)


def test_the_shift_keeps_positions_in_range():
    limits = PositionRange(24, 5)
    at = torch.arange(200)
    left = at - limits.shift(at)
    assert torch.equal(left[:24], at[:24]) and torch.equal(limits.shift(at[:24]), torch.zeros(24).long())
    assert left.max() == 23 and left[24:].min() == 19
    assert torch.equal(left[24:], 19 + (at[24:] - 24) % 5)
    assert torch.equal(torch.arange(90) - PositionRange(24, 1).shift(torch.arange(90)), torch.arange(90).clamp(max=23))


def test_limit_and_step_have_the_teachers_context_as_default():
    assert position_range(student().config) == (24, 12)
    assert position_range(student(position_limit=20, position_step=3).config) == (20, 3)
    assert position_range(student(position_limit=None, window=100).config) == (104, 52)


def reference_layer(attention, x, rope_at, limits):
    """The window branch of a window_only layer as the definition reads: one query and one key at a time."""
    q, k, v = (
        p(x).unflatten(-1, (-1, attention.head_dim))[0] for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    config = attention.lizard.config
    group, out = config.num_heads // config.num_key_heads, torch.zeros_like(q)
    for i in range(len(q)):
        for h in range(config.num_heads):
            scores, values = [], []
            for j in range(i + 1):
                near = i - j < config.window
                if not near and j >= config.anchors:
                    continue
                distance = i - j if near else i - int(limits.shift(torch.tensor(i))) - j
                turned = apply_rotary(q[i, h].view(1, 1, 1, -1), *rope_at(distance)).flatten()
                scores.append(turned @ k[j, h // group] / math.sqrt(config.head_dim))
                values.append(v[j, h // group])
            out[i, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out.flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 7, None])
def test_clamped_is_its_definition(step):
    model = student("window_only", position_step=step)
    attention, rotary = model.lizard_attentions()[0], model.model.rotary_emb
    limits = position_range(model.config)
    seen = {}
    attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    attention.o_proj.register_forward_pre_hook(lambda m, args: seen.update(o=args[0]))
    model(tokens(1, 45), use_cache=False)

    def rope_at(distance):
        return rotary(seen["x"], torch.tensor([[distance]]))

    torch.testing.assert_close(
        seen["o"][0], reference_layer(attention, seen["x"], rope_at, limits), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "choices"),
    [
        ("plain", {"position_step": 1}),
        ("plain", {"position_step": 7}),
        ("window_only", {}),
        ("recommended", {"kept_keys": 5}),
        ("recommended", {"kept_keys": [4, 9], "position_step": 7}),
        ("recommended", {"kept_keys": 5, "kept_past": "moved"}),
    ],
)
def test_clamped_does_not_depend_on_how_the_text_arrives(preset, choices):
    model, ids = student(preset, **choices), tokens(2, 45)
    whole = model(ids, use_cache=False).logits
    for sizes in ([45], [1] * 45, [25, 1, 10, 9], [7] * 6 + [3]):
        cache, pieces = model.new_cache(), []
        for piece in ids.split(sizes, dim=1):
            pieces.append(model(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dropped_keys_are_moved_ones_up_to_the_limit_and_none_past_it():
    ids = tokens(1, 60)
    moved, dropped = (student("recommended", kept_keys=40, kept_past=form)(ids) for form in ("moved", "dropped"))
    assert torch.equal(moved.logits[:, :LIMIT], dropped.logits[:, :LIMIT])
    assert not torch.allclose(moved.logits[:, LIMIT:], dropped.logits[:, LIMIT:], atol=1e-4)
    shift = int(position_range(student().config).shift(torch.tensor(59)))
    for layer in dropped.past_key_values.layers:
        held = layer.state.attention.kept_positions
        assert (
            held.max() == 59 - 8 and held[held >= 0].min() == shift and (held >= 0).sum(1).max() == 59 - 8 - shift + 1
        )


@torch.no_grad()
@pytest.mark.parametrize("preset", ["plain", "recommended"])
def test_a_saved_model_is_read_with_other_positions(preset, tmp_path):
    model, ids = student(preset, **({"kept_keys": 5} if preset == "recommended" else {})), tokens(1, LIMIT + 10)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    true, clamped = (load_model(str(tmp_path), positions=form).model(ids).logits for form in ("true", "clamped"))
    torch.testing.assert_close(clamped, model(ids).logits)
    torch.testing.assert_close(true[:, :LIMIT], clamped[:, :LIMIT])
    assert not torch.allclose(true[:, LIMIT:], clamped[:, LIMIT:], atol=1e-4)


@torch.no_grad()
def test_both_forms_are_one_up_to_the_limit_and_differ_past_it():
    ids = tokens(1, 60)
    true, clamped = (student(positions=form)(ids).logits for form in ("true", "clamped"))
    assert torch.equal(true[:, :LIMIT], clamped[:, :LIMIT])
    assert (true - clamped)[:, LIMIT:].abs().amax(-1).min() > 1e-4
    far = student(position_limit=60)(ids).logits
    torch.testing.assert_close(far, true, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "right"])
def test_rows_reach_the_limit_one_by_one(layout):
    model = student(position_step=7)
    rows = [tokens(1, length, seed=length)[0] for length in (50, 33, 20, 3)]
    ids, mask = torch.zeros(4, 50, dtype=torch.long), torch.zeros(4, 50, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(50 - len(row), 50) if layout == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, 1
    cache = model.new_cache()
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    more = tokens(4, 12, seed=9)
    later = []
    for t in range(12):
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
        later.append(model(more[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    for b, row in enumerate(rows):
        alone = model(torch.cat([row, more[b]])[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[b][ids[b] > 0], alone[: len(row)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat(later, 1)[b], alone[len(row) :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_state_keeps_the_anchors_as_they_came():
    model, cache, ids = student(), None, tokens(1, 90)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    before = [layer.state.anchor_k.clone() for layer in cache.layers]
    for piece in ids[:, 10:].split(9, dim=1):
        model(piece, past_key_values=cache)
    for layer, anchors in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.state.anchor_k, anchors)


def test_gradients_cross_the_limit():
    model = student().requires_grad_(True)
    weights = torch.randn(97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, ids = model.double(), tokens(1, 60)
    assert_slopes(model, lambda: (model(ids, use_cache=False).logits * weights).sum())


@torch.no_grad()
def test_generation_past_the_context_equals_full_forward_passes():
    model, row = student(position_step=5), tokens(1, 20)[0]
    out = model.generate(row[None], attention_mask=torch.ones(1, 20).long(), max_new_tokens=20, do_sample=False)
    for _ in range(20):
        row = torch.cat([row, model(row[None], use_cache=False).logits[0, -1:].argmax(-1)])
    assert torch.equal(out[0], row)


PACKED = {
    "window_only": dict(preset="window_only", layers=2),
    "kept keys of each head": dict(layers=2, kept_keys=[3, 1], score_dim=8, coverage="left"),
    "received": dict(layers=1, kept_keys=4, score_dim=8, score_received=True, score_stride=4),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKED)
def test_packed_sequences_move_their_anchors_as_each_alone(kind):
    """Lengths below the limit, at it, in its first blocks and far past it, with padding between them and without."""
    model = student(position_step=5, **PACKED[kind]).double()
    texts = [tokens(1, n, seed=n) for n in (43, 7, 24, 30)]
    alone = [model(text).logits for text in texts]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    row = model(torch.cat(texts, 1), position_ids=positions).logits
    for found, wanted in zip(row.split([text.shape[1] for text in texts], 1), alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    still = student(position_limit=999, **PACKED[kind]).double()(texts[0]).logits
    assert (alone[0] - still)[:, 30:].abs().max() > 0.1  # the case is one
    ids, real, places = torch.zeros(3, 2, 60, dtype=torch.int64)
    lies = [(0, 4), (0, 50), (1, 0), (1, 26)]
    for (b, at), text in zip(lies, texts, strict=True):
        where = slice(at, at + text.shape[1])
        ids[b, where], real[b, where], places[b, where] = text[0], 1, torch.arange(text.shape[1])
    rows = model(ids, attention_mask=real, position_ids=places).logits
    for (b, at), wanted in zip(lies, alone, strict=True):
        torch.testing.assert_close(rows[b : b + 1, at : at + wanted.shape[1]], wanted, rtol=1e-9, atol=1e-9)


def test_gradients_of_packed_sequences_cross_the_limit():
    model, texts = student(layers=1).requires_grad_(True).double(), [tokens(1, n, seed=n) for n in (40, 9)]
    weights = torch.randn(1, 49, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.cat([torch.arange(40), torch.arange(9)])[None]
    (model(torch.cat(texts, 1), position_ids=positions).logits * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(
        (model(t, use_cache=False).logits * w).sum() for t, w in zip(texts, weights.split([40, 9], 1), strict=True)
    ).backward()
    assert len(packed) > 10
    for name, p in model.named_parameters():
        if name in packed:
            torch.testing.assert_close(packed[name], p.grad, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16},
    ],
)
def test_far_angles_are_those_of_float64(rope):
    family = teacher(max_position_embeddings=LIMIT, rope_parameters=rope)
    model = linearize(family, LizardConfig.preset("window_only", attention={"window": 8}))
    rotary, x = model.model.rotary_emb, torch.empty(1, dtype=torch.float32)
    model(tokens(1, 4))  # sets the range
    near = torch.arange(LIMIT)[None]
    for ours, theirs in zip(rotary(x, near), family.model.rotary_emb(x, near), strict=True):
        assert torch.equal(ours, theirs)
    far = torch.tensor([[10**6, 10**6 + 1, 10**9 + 7]])
    angles = far[..., None].double() * rotary.inv_freq.double()
    scaling = rotary.attention_scaling
    cos, sin = rotary(x, far)
    half = angles.shape[-1]
    torch.testing.assert_close(cos[..., :half].double(), angles.cos() * scaling, rtol=0, atol=2e-6 * scaling)
    torch.testing.assert_close(sin[..., half:].double(), angles.sin() * scaling, rtol=0, atol=2e-6 * scaling)
    for found, wanted in zip(rotary(x.bfloat16(), far), (cos, sin), strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
    for found, wanted in zip(rotary.turn(far), (angles.cos(), angles.sin()), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found[..., :half], wanted.float())


LONG_ROPE = dict(
    rope_type="longrope", rope_theta=10_000.0, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=8.0,
    original_max_position_embeddings=16,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", factor=10.0, rope_theta=10_000.0)


@torch.no_grad()
@pytest.mark.parametrize("rope", [DYNAMIC, LONG_ROPE], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("preset", ["plain", "lolcats"])
def test_angles_are_the_same_whatever_was_read_before(preset, rope):
    """Kinds that change their frequencies: in the first forward, in the next, after a short text and after a teacher's.

    LIMIT tokens are the case that transformers does not take its rescaled frequencies back for.
    """
    fresh = [student_of(preset, rope) for _ in range(2)]
    long, short = tokens(1, LIMIT + 16), tokens(1, LIMIT + 16)[:, :LIMIT]
    for model, ids in zip(fresh, (long, short), strict=True):
        wanted = model(ids, use_cache=False).logits
        for mode, before in (("student", ids), ("student", ids[:, :8]), ("teacher", long)):
            model.set_attention_mode(mode)
            model(before, use_cache=False)
            model.set_attention_mode("student")
            assert torch.equal(model(ids, use_cache=False).logits, wanted), (mode, before.shape)


@torch.no_grad()
def test_a_teacher_that_rescales_is_not_distilled_past_its_context():
    model, family = student_of("plain", DYNAMIC), teacher(max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)
    ids = tokens(1, LIMIT + 1)
    model.set_attention_mode("distill")
    hidden = model.model(ids[:, :LIMIT]).last_hidden_state
    torch.testing.assert_close(hidden, family.model(ids[:, :LIMIT]).last_hidden_state, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"got {LIMIT + 1} positions, wanted at most {LIMIT}"):
        model(ids)
    packed = torch.cat([torch.arange(LIMIT), torch.arange(5)])[None]
    model(torch.cat([ids, ids[:, :4]], 1), position_ids=packed)


def student_of(preset, rope):
    family = teacher(max_position_embeddings=LIMIT, rope_parameters=rope)
    model = linearize(family, LizardConfig.preset(preset, attention={"window": 8}))
    disturb(model)
    return model


def test_a_teacher_keeps_its_own_angles():
    family = teacher(max_position_embeddings=LIMIT)
    model = linearize(family, LizardConfig.preset("plain", attention={"window": 8}))
    model.set_attention_mode("teacher")
    ids = tokens(1, 60)
    assert torch.equal(model(ids, use_cache=False).logits, family(ids, use_cache=False).logits)
    assert type(model.model.rotary_emb).__name__ == type(family.model.rotary_emb).__name__
    assert with_far_positions(model.model.rotary_emb) is model.model.rotary_emb


def test_pairs_that_promise_nothing_are_refused():
    for changes, reason in (
        ({"position_step": 3}, 'position_step belongs to positions="clamped"'),
        ({"positions": "clamped", "position_limit": 9}, "position_limit=9 is less than window"),
        ({"positions": "clamped", "position_step": 0}, "position_step=0 must be at least 1"),
        ({"positions": "moving"}, "positions must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            LizardConfig.preset("plain", attention={"positions": "true"} | changes)


@torch.no_grad()
def test_one_compiled_step_does_before_and_past_the_limit():
    model, ids = student(position_step=5), tokens(1, 40)
    whole = model(ids, use_cache=False).logits
    cache, graphs = model.new_cache(static=True, max_cache_len=40), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward, fullgraph=True, backend=counted)
    model(ids[:, :15], past_key_values=cache)
    for t in range(15, 40):
        logits = step(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "smollm3", "gemma2", "gemma3_text"])
def test_every_family_goes_past_the_limit(family):
    config = LizardConfig.preset("plain", attention={"window": 8, "positions": "clamped", "position_step": 9})
    model = linearize(teacher(family, max_position_embeddings=LIMIT), config)
    disturb(model)
    ids = tokens(1, 60)
    whole = model(ids, use_cache=False).logits
    cache = model.new_cache()
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([30, 1, 29], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_longrope_in_pieces_is_one_piece_where_the_first_passes_its_length():
    rope = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=8.0)
    family = teacher(rope_parameters=rope | {"original_max_position_embeddings": 32}, num_hidden_layers=1)
    model = linearize(family, LizardConfig.preset("plain", attention={"window": 8}))
    disturb(model)
    ids = tokens(1, 60)
    whole = model(ids).logits
    for first, same in ((33, True), (20, False)):  # docs/models.md says so, of the teacher too
        for reader in (model, family) if not same else (model,):
            cache = reader(ids[:, :first], use_cache=True).past_key_values
            rest = reader(ids[:, first:], past_key_values=cache).logits
            wanted = whole if reader is model else family(ids).logits
            assert torch.allclose(rest, wanted[:, first:], rtol=1e-4, atol=1e-4) == same
