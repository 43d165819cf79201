"""The layer against its formulas, and the properties that make it usable: causal, restartable, blind to padding."""

import pytest
import torch
import torch.nn.functional as F
from layer_checks import FORMS, SHAPE, angles, as_formulas_read, assert_same_state, inputs, layer

from lizard_layers import (
    AttentionConfig,
    HybridAttention,
    empty_state,
    hybrid_attention,
    map_state,
    read_input,
    tensors_of,
)
from lizard_ops import apply_rotary, chunk_hybrid_attn, recurrent_hybrid_attn, window_attn


@pytest.mark.parametrize("form", FORMS)
def test_equals_its_formulas(form):
    made, (x, q, k, v, rope) = layer(form), inputs(13)
    o, state = made(x, q, k, v, rope)
    assert state is None
    torch.testing.assert_close(o, as_formulas_read(made, x, q, k, v, rope), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "absorbed"])  # whose decays are read first
def test_shapes_are_known_without_data(form):
    """On the meta device, where there is no autocast to turn off."""
    made, (x, q, k, v, rope) = layer(form), inputs(13)
    o, state = made(x, q, k, v, rope, use_state=True)
    made, (x, q, k, v, *rope) = made.to("meta"), (t.to("meta") for t in (x, q, k, v, *rope))
    found, left = made(x, q, k, v, tuple(rope), use_state=True)
    found, wanted = {"o": found} | tensors_of(left), {"o": o} | tensors_of(state)
    assert found.keys() == wanted.keys()
    for name, have in found.items():
        assert have.is_meta and have.shape == wanted[name].shape and have.dtype == wanted[name].dtype, name
    assert made(x, q, k, v, tuple(rope), left)[0].shape == o.shape


@pytest.mark.parametrize("form", [form for form in FORMS if form != "liger"])  # liger has none
def test_every_parameter_gets_a_gradient(form):
    made, (x, q, k, v, rope) = layer(form), inputs(13)
    made(x, q, k, v, rope)[0].square().sum().backward()
    for name, parameter in made.named_parameters():
        if name.startswith("key_score."):  # the choice of keys has none; stage 0 trains it
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", FORMS)
def test_pieces_and_steps_equal_the_whole(form):
    made, (x, q, k, v, rope) = layer(form), inputs(17)
    with torch.no_grad():
        whole, end = made(x, q, k, v, rope, use_state=True)
        for cuts in ([17], [1] * 17, [4, 1, 9, 3], [0, 6, 11]):
            state, pieces, at = None, [], 0
            for size in cuts:
                here = slice(at, at + size)
                turns = tuple(t[:, here] for t in rope)
                o, state = made(x[:, here], q[:, here], k[:, here], v[:, here], turns, state, use_state=True)
                pieces.append(o)
                at += size
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
            assert_same_state(state, end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_empty_state_has_the_shape_of_every_later_one(form):
    made, (x, q, k, v, rope) = layer(form), inputs(3)
    empty = empty_state(made.config, 2, torch.float64)
    turns = tuple(t[:, :1] for t in rope)
    with torch.no_grad():
        first = made(x[:, :1], q[:, :1], k[:, :1], v[:, :1], turns, use_state=True)[1]
        from_empty, _ = made(x, q, k, v, rope, empty)
        torch.testing.assert_close(from_empty, made(x, q, k, v, rope)[0])
    empty, first = tensors_of(empty), tensors_of(first)
    assert empty.keys() == first.keys()
    for name, a in empty.items():
        assert a.shape == first[name].shape and a.dtype == first[name].dtype, name


PADDED = ["recommended", "paper", "channel", "one_sided", "linear_rope", "window_only", "kept", "received"]


@pytest.mark.parametrize("form", PADDED)
def test_padding_anywhere_changes_nothing(form):
    made = layer(form)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, :5] = mask[1, 7:] = mask[2, [0, 3, 4, 11]] = mask[3] = False
    x, q, k, v, _ = inputs(12, batch=4)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    rope = tuple(torch.cat(t) for t in zip(*(angles(p) for p in positions), strict=True))
    with torch.no_grad():
        o, state = made(x, q, k, v, rope, use_state=True, padding_mask=mask)
        assert not o[~mask].any()
        for row in range(3):
            alone = [t[row : row + 1, mask[row]] for t in (x, q, k, v)]
            count = int(mask[row].sum())
            o_alone, state_alone = made(*alone, angles(torch.arange(count)), use_state=True)
            torch.testing.assert_close(o[row, mask[row]], o_alone[0], rtol=1e-9, atol=1e-9)
            of_row = map_state(state, lambda t, row=row: t[row : row + 1])
            assert_same_state(of_row, state_alone, rtol=1e-9, atol=1e-9)
        assert state.position.tolist() == [7, 7, 8, 0]


@pytest.mark.parametrize("form", ["recommended", "paper", "one_sided", "linear_rope", "window_only", "received"])
def test_packed_sequences_do_not_meet(form):
    made, (x, q, k, v, _) = layer(form), inputs(14, batch=1)
    ends = torch.tensor([0, 6, 7, 14])
    rope = angles(torch.cat([torch.arange(6), torch.arange(1), torch.arange(7)]))
    with torch.no_grad():
        packed, _ = made(x, q, k, v, rope, cu_seqlens=ends)
        for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            alone, _ = made(x[:, a:b], q[:, a:b], k[:, a:b], v[:, a:b], angles(torch.arange(b - a)))
            torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_future_changes_nothing(form):
    made, (x, q, k, v, rope) = layer(form), inputs(13)
    with torch.no_grad():
        before = made(x, q, k, v, rope)[0]
        for tensor in (x, q, k, v):
            tensor[:, 9:] += 1.0
        after = made(x, q, k, v, rope)[0]
    assert torch.equal(before[:, :9], after[:, :9])


@pytest.mark.parametrize("form", ["recommended", "lolcats"])
def test_equals_softmax_attention_up_to_the_window_before_training(form):
    made, (x, q, k, v, rope) = layer(form, window=12, disturbed=False), inputs(12)
    full = F.scaled_dot_product_attention(
        apply_rotary(q, *rope).transpose(1, 2),
        apply_rotary(k, *rope).transpose(1, 2).repeat_interleave(2, 1),
        v.transpose(1, 2).repeat_interleave(2, 1),
        is_causal=True,
    ).transpose(1, 2)
    torch.testing.assert_close(made(x, q, k, v, rope)[0], full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["naive", "torch"])
def test_every_op_is_asked_for_the_implementation_of_the_config(monkeypatch, impl):
    asked = []

    def watched(op):
        return lambda *args, **options: asked.append((op.__name__, options["impl"])) or op(*args, **options)

    for op in (chunk_hybrid_attn, recurrent_hybrid_attn, window_attn):
        monkeypatch.setattr(hybrid_attention, op.__name__, watched(op))
    x, q, k, v, rope = inputs(5)
    step = [t[:, :1] for t in (x, q, k, v)]
    for form in ("recommended", "window_only"):
        made = layer(form, impl=impl)
        state = made(x, q, k, v, rope, use_state=True)[1]
        made(*step, angles(torch.tensor([5])), state)
    names = ["chunk_hybrid_attn", "recurrent_hybrid_attn", "window_attn", "window_attn"]
    assert asked == [(name, impl) for name in names]


@pytest.mark.parametrize("linear_branch", [True, False])
def test_scores_are_scaled_and_capped_as_the_config_says(linear_branch):
    config = AttentionConfig(**SHAPE, window=12, anchors=2, linear_branch=linear_branch, scale=0.7, softcap=1.5)
    x, q, k, v, rope = inputs(12)
    made = HybridAttention(config).double()
    keys, values = (t.repeat_interleave(2, 2) for t in (apply_rotary(k, *rope), v))
    scores = 1.5 * (0.7 * torch.einsum("bihd,bjhd->bhij", apply_rotary(q, *rope), keys) / 1.5).tanh()
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    wanted = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    whole, state = made(x, q, k, v, rope, use_state=True)
    torch.testing.assert_close(whole, wanted)
    step = [t[:, :1] for t in (x, q, k, v)]
    again, _ = made(*step, angles(torch.tensor([12])), state, use_state=True)
    longer = [torch.cat([t, t[:, :1]], 1) for t in (x, q, k, v)]
    torch.testing.assert_close(again[:, 0], made(*longer, angles(torch.arange(13)))[0][:, 12])


def test_alpha_zero_switches_the_window_off():
    config = AttentionConfig(**SHAPE, window=5, mix="sum", alpha_init=0.0, coverage="all")
    x, q, k, v, rope = inputs(9)
    made = HybridAttention(config).double()
    moved = HybridAttention(AttentionConfig(**SHAPE, window=2, mix="sum", alpha_init=0.0, coverage="all")).double()
    torch.testing.assert_close(made(x, q, k, v, rope)[0], moved(x, q, k, v, rope)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["recommended", "paper", "channel"])
def test_half_precision_in_and_out(form, dtype):
    made, (x, q, k, v, rope) = layer(form, torch.float32).to(dtype), inputs(13, dtype=dtype)
    o, state = made(x, q, k, v, rope, use_state=True)
    assert o.dtype == dtype and state.ring_k.dtype == dtype and state.s.dtype == torch.float32
    exact, _ = made.double()(*(t.double() for t in (x, q, k, v)), tuple(t.double() for t in rope))
    assert (o.double() - exact).abs().max() < 20 * torch.finfo(dtype).eps


def test_autocast_leaves_the_new_parameters_their_precision():
    made, (x, q, k, v, rope) = layer("recommended", torch.float32), inputs(13, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = made(x, q, k, v, rope)
    assert torch.equal(inside, made(x, q, k, v, rope)[0])


def test_a_state_can_be_moved_and_detached():
    made, (x, q, k, v, rope) = layer("recommended"), inputs(9)
    state = made(x, q.requires_grad_(), k.requires_grad_(), v, rope, use_state=True)[1]
    assert state.s.requires_grad
    assert not any(t.requires_grad for t in tensors_of(map_state(state, torch.Tensor.detach)).values())


def test_wrong_inputs_are_named():
    made, (x, q, k, v, rope) = layer("recommended"), inputs(9)
    with pytest.raises(ValueError, match=r"^q has shape \(2, 9, 3, 8\), wanted \(2, 9, 4, 8\)"):
        made(x, q[:, :, :3], k, v, rope)
    with pytest.raises(ValueError, match=r"^k has shape"):
        made(x, q, k[:, :4], v, rope)
    with pytest.raises(ValueError, match=r"^x has shape"):
        made(x[..., :5], q, k, v, rope)
    with pytest.raises(ValueError, match=r"^x has shape \(9, 24\), wanted \(-1, -1, 24\)"):
        made(x[0], q, k, v, rope)
    with pytest.raises(ValueError, match="rope=.* is needed"):
        made(x, q, k, v)
    with pytest.raises(ValueError, match="rope has shapes"):
        made(x, q, k, v, tuple(t[:, :4] for t in rope))


def test_gate_and_merge_bias_are_one_call_unless_somebody_looks(monkeypatch):
    made, (x, q, k, v, rope) = layer("recommended", gate_temperature=4.0), inputs(13)
    calls, op = [], read_input.gate_and_bias
    monkeypatch.setattr(read_input, "gate_and_bias", lambda *a, **given: calls.append(given) or op(*a, **given))
    wanted, _ = made(x, q, k, v, rope)
    assert len(calls) == 1 and calls[0]["temperature"] == 4
    seen = []
    for part in (made.gate, made.mix):
        hook = part.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        o, _ = made(x, q, k, v, rope)
        hook.remove()
        assert torch.equal(o, wanted) and torch.equal(seen.pop(), x) and len(calls) == 1
    other = layer("lolcats")  # whose bias does not depend on the input
    other(x, q, k, v, rope)
    assert len(calls) == 1
