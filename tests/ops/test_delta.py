"""The delta memory: chunked and recurrent forms against the loop, and what the rule promises."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

import lizard_ops
from lizard_ops import AttentionState, chunk_delta_attn, chunk_hybrid_attn, naive_delta_attn, recurrent_delta_attn
from lizard_ops.delta_attn import chunk_torch
from lizard_ops.delta_attn.triangle import unit_lower_inverse

FORMS = {"chunk": chunk_delta_attn, "recurrent": recurrent_delta_attn}
OPTIONS = [(0, 0, "key"), (5, 0, "key"), (5, 3, "token"), (0, 2, None)]  # offset, anchors, gate


def tokens(length: int, gate: str | None = "key", dtype: torch.dtype = torch.float64, rows: int = 2, seed: int = 0):
    """q, k, v, g, beta for two key heads and four query heads."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(rows, length, *shape, generator=draw, dtype=torch.float64)

    q, k, v, beta = uniform(4, 6), uniform(2, 6), uniform(2, 5) - 0.5, uniform(2)
    g = None if gate is None else -0.3 * uniform(2 if gate == "key" else 1)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return q.to(dtype), k.to(dtype), v.to(dtype), None if g is None else g.to(wide), beta.to(wide)


def run(form, x, offset=0, anchors=0, **more):
    options = dict(window_offset=offset, anchors=anchors, output_final_state=True, return_log_mass=True)
    return form(*x, **options | more)


def assert_same(found, wanted, **tolerance) -> None:
    o, state, log_mass = found
    torch.testing.assert_close(o, wanted[0], **tolerance)
    torch.testing.assert_close(log_mass, wanted[2], **tolerance)
    for name, a, b in zip(AttentionState._fields, state, wanted[1], strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, msg=name, **tolerance)


def cut(x, part: slice):
    return tuple(None if t is None else t[:, part] for t in x)


@pytest.fixture(params=[4, 64])
def chunk(request, monkeypatch):
    monkeypatch.setattr(chunk_torch, "CHUNK", request.param)


@pytest.mark.parametrize("offset, anchors, gate", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_equal_the_loop(form, offset, anchors, gate, chunk):
    for length in (0, 1, 3, 5, 8, 17):
        x = tokens(length, gate)
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) > 0.3
        for padding_mask in (None, mask):
            wanted = run(naive_delta_attn, x, offset, anchors, padding_mask=padding_mask)
            assert_same(run(FORMS[form], x, offset, anchors, padding_mask=padding_mask), wanted)


@pytest.mark.parametrize("offset, anchors, gate", OPTIONS)
@pytest.mark.parametrize("form", [*FORMS, "naive"])
def test_pieces_equal_the_whole(form, offset, anchors, gate, chunk):
    op, x = FORMS.get(form, naive_delta_attn), tokens(17, gate)
    whole = run(naive_delta_attn, x, offset, anchors)
    for cuts in ([0, 4, 5, 17], [0, 9, 9, 16, 17]):
        state, outputs, masses = None, [], []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            o, state, log_mass = run(op, cut(x, slice(a, b)), offset, anchors, initial_state=state)
            outputs.append(o)
            masses.append(log_mass)
        assert_same((torch.cat(outputs, 1), state, torch.cat(masses, 1)), whole)


@pytest.mark.parametrize("form", [*FORMS, "naive"])
def test_packed_sequences_do_not_meet(form):
    op, x, ends = FORMS.get(form, naive_delta_attn), tokens(20, rows=1), torch.tensor([0, 7, 7, 8, 20])
    o, state, log_mass = run(op, x, 3, 1, cu_seqlens=ends)
    for n, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        alone = run(naive_delta_attn, cut(x, slice(a, b)), 3, 1)
        assert_same((o[:, a:b], AttentionState._make(t if t is None else t[n : n + 1] for t in state),
                     log_mass[:, a:b]), alone)  # fmt: skip


def test_a_key_written_in_full_reads_back_its_last_value():
    q, k, v, _, _ = tokens(12)
    keys = torch.eye(6, dtype=torch.float64)[torch.tensor([0, 1, 2, 0, 3, 1, 4, 0, 5, 2, 3, 4])]
    k = keys.view(1, 12, 1, 6).expand(2, -1, 2, -1)
    o, _ = chunk_delta_attn(k.repeat_interleave(2, 2), k, v, None, torch.ones(2, 12, 2, dtype=torch.float64))
    torch.testing.assert_close(o, v.repeat_interleave(2, 2))
    last = torch.eye(6, dtype=torch.float64)[0].expand(2, 12, 4, 6)
    o, _ = chunk_delta_attn(last, k, v, None, torch.ones(2, 12, 2, dtype=torch.float64))
    torch.testing.assert_close(o[:, -1], v[:, 7].repeat_interleave(2, 1))


@pytest.mark.parametrize("offset", [0, 4])
def test_the_mass_is_that_of_the_sums(offset):
    q, k, v, g, beta = tokens(19)
    _, state, log_mass = run(chunk_delta_attn, (q, k, v, g, beta), offset, 2, scale=3.0)
    _, sums, wanted = run(lizard_ops.chunk_gated_attn, (q, k, v, g), offset, 2, scale=3.0)
    torch.testing.assert_close(log_mass, wanted)
    torch.testing.assert_close(state.z, sums.z)


@pytest.mark.parametrize("form", [*FORMS, "naive"])
def test_extreme_gates_stay_finite(form):
    q, k, v, g, beta = tokens(150)
    g[:, 20::40], g[:, 30::40] = -float("inf"), -1e4
    assert_same(
        run(FORMS.get(form, naive_delta_attn), (q, k, v, g, beta), 5), run(naive_delta_attn, (q, k, v, g, beta), 5)
    )
    leaves = [t.requires_grad_() for t in (q, k, v, beta)]
    o, _, log_mass = run(chunk_delta_attn, (*leaves[:3], g, leaves[3]), 5)
    found = torch.autograd.grad(o.sum() + log_mass[log_mass > -float("inf")].sum(), leaves)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("form", [*FORMS, "naive"])
def test_gradients_are_those_of_finite_differences(form, monkeypatch):
    monkeypatch.setattr(chunk_torch, "CHUNK", 4)
    op = FORMS.get(form, naive_delta_attn)
    past = run(naive_delta_attn, tokens(4, rows=1, seed=3), 2, 1)[1]
    q, k, v, g, beta = tokens(7, rows=1)
    carried = ("s", "z", "ring_v", "ring_fk", "ring_g", "ring_beta")

    def outputs(q, k, v, g, beta, *fields):
        state = AttentionState(past.position, **dict(zip(carried, fields, strict=True)))
        o, final, log_mass = run(op, (q, k, v, g, beta), 2, 1, initial_state=state)
        return o, final.s, final.z, log_mass

    fields = [getattr(past, name) for name in carried]
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v, g - 0.1, 0.1 + 0.8 * beta, *fields)]
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_errors_are_at_most_twice_those_of_the_loop(form, dtype):
    x = tokens(130, dtype=dtype)
    exact = run(naive_delta_attn, tuple(t.double() for t in x), 5)
    found, plain = (run(op, x, 5) for op in (FORMS[form], naive_delta_attn))
    least = torch.finfo(dtype).eps * exact[0].abs().max()
    assert (found[0].double() - exact[0]).abs().max() <= 2 * (plain[0].double() - exact[0]).abs().max() + least


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_inverse_of_a_unit_triangle(size):
    lower = torch.rand(3, size, size, dtype=torch.float64).tril(-1)  # all positive, as flat features make it
    wanted = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower)
    torch.testing.assert_close(unit_lower_inverse(lower), wanted)
    exact, single = wanted, unit_lower_inverse(lower.float())
    assert (single.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    if size == 8:
        leaf = lower.clone().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x: unit_lower_inverse(x.tril(-1)), leaf, fast_mode=True)


HYBRID = dict(anchors=2, mix="merge", coverage="outside", feature_map="softmax", output_final_state=True)


def hybrid_tokens(length: int):
    draw = torch.Generator().manual_seed(5)
    shapes = [(2, 16), (1, 16), (1, 16), (2, 4), (1, 4), (1,), (1,)]
    q, k, v, fq, fk, g, beta = (torch.randn(1, length, *shape, generator=draw) for shape in shapes)
    return [q, k, v, fq, fk, -0.3 * g.abs(), beta.sigmoid()]


def test_the_window_kernel_beside_the_memory():
    x = [t.to(DEVICE).requires_grad_() for t in hybrid_tokens(21)]
    found = {}
    for impl in ("torch", "triton"):
        o, state = chunk_hybrid_attn(*x[:6], 6, beta=x[6], impl=impl, **HYBRID)
        grads = torch.autograd.grad(o.square().sum() + state.s.square().sum(), x)
        found[impl] = [o, *(t for t in state if t is not None), *grads]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_in_place_steps_write_where_the_state_lies():
    x = hybrid_tokens(12)
    with torch.no_grad():
        whole, end = chunk_hybrid_attn(*x[:6], 4, beta=x[6], **HYBRID)
        _, state = chunk_hybrid_attn(*(t[:, :8] for t in x[:6]), 4, beta=x[6][:, :8], **HYBRID)
        state = AttentionState._make(t if t is None else t.contiguous() for t in state)
        places = [t.data_ptr() for t in state if t is not None]
        for i in range(8, 12):
            now = [t[:, i : i + 1] for t in x]
            o, state = lizard_ops.recurrent_hybrid_attn(
                *now[:6], 4, beta=now[6], initial_state=state, inplace=True, **HYBRID
            )
            torch.testing.assert_close(o, whole[:, i : i + 1])
        assert places == [t.data_ptr() for t in state if t is not None]
        for a, b in zip(state, end, strict=True):
            assert a is None or torch.allclose(a, b, atol=1e-5)


def test_wrong_arguments_are_named():
    q, k, v, g, beta = tokens(5)
    with pytest.raises(ValueError, match="^beta: got .*wanted a float32 or float64 tensor of shape"):
        chunk_delta_attn(q, k, v, g, beta[..., :1])
    with pytest.raises(ValueError, match="^beta: got .*wanted a float32 or float64 tensor"):
        chunk_delta_attn(q, k, v, g, None)
    with pytest.raises(ValueError, match="^beta: .*from 0 to 1"):
        chunk_delta_attn(q, k, v, g, beta + 1)
    with pytest.raises(ValueError, match="^g: .*a key head"):
        chunk_delta_attn(q, k, v, g.repeat_interleave(2, 2), beta)
    with pytest.raises(ValueError, match="^impl: got 'triton'"):
        chunk_delta_attn(q, k, v, g, beta, impl="triton")
    state = run(chunk_delta_attn, (q, k, v, g, beta), 3)[1]
    with pytest.raises(ValueError, match="^initial_state.ring_beta"):
        run(chunk_delta_attn, (q, k, v, g, beta), 3, initial_state=state._replace(ring_beta=None))
    with pytest.raises(ValueError, match="^initial_state.ring_beta"):
        run(lizard_ops.chunk_gated_attn, (q, k, v, g), 3, initial_state=state)
    x = hybrid_tokens(6)
    for change, name in (
        (dict(feature_map="exp"), "feature_map"),
        (dict(gate_form="absorbed", feature_map="identity"), "gate_form"),
        (dict(mix="sum", normalize=False), "normalize"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            chunk_hybrid_attn(*x[:6], 4, beta=x[6], **HYBRID | change)
    step = dict(impl="triton", initial_state=chunk_hybrid_attn(*x[:6], 4, beta=x[6], **HYBRID)[1])
    with pytest.raises(ValueError, match="^impl: got 'triton'.*beta"):
        lizard_ops.recurrent_hybrid_attn(*(t[:, :1] for t in x[:6]), 4, beta=x[6][:, :1], **HYBRID | step)
