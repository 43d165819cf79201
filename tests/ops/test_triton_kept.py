"""The kernels of keys with an expiry against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.utils.checkpoint
from kernel_checks import DEVICE, check_against_naive
from test_triton_hybrid import EXP, MERGE, SUM, make, run

from lizard_ops import NEVER, checked, chunk_hybrid_attn, naive_hybrid_attn, naive_key_expiry

pytest.importorskip("lizard_ops.hybrid_attn.triton.kept_chunk")

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter gets bfloat16 wrong
OUTSIDE, LEFT = {"coverage": "outside"}, {"coverage": "left"}
ABSOLUTE = MERGE | {"merge_mass": "absolute"}
UNNORMALISED = SUM | OUTSIDE | {"feature_map": "identity", "normalize": False}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """So that short sequences meet the boundaries of a long one."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.hybrid_attn.triton.kept_index"), "SEGMENT", 32)


def expiry_of(x, window, anchors, places, rows=None):
    """Of scores with ties among them."""
    scores = torch.randn(x["k"].shape[:3], generator=torch.Generator().manual_seed(0)).round()
    return naive_key_expiry(scores.to(DEVICE), window, anchors, places, **(rows or {})).expiry


def any_expiry(x, window, anchors, places, seed):
    """Lives of any length: each key that leaves the window takes a free place, that of any other key, or none."""
    batch, length, heads = x["k"].shape[:3]
    generator = torch.Generator().manual_seed(seed)
    expiry = torch.full((batch, length, heads), NEVER)
    for b in range(batch):
        for h in range(heads):
            alive = []
            for i in range(window + anchors, length):
                alive.append(i - window)
                if len(alive) > places or torch.rand((), generator=generator) < 0.3:
                    out = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
                    expiry[b, out, h] = i
    return expiry.to(DEVICE)


def fast(x, window, expiry, places, **options):
    op = functools.partial(chunk_hybrid_attn, expiry=expiry, kept_keys=places, impl="triton")
    return run(op, x, window, **options)


def check(x, window, places, dtype=torch.float32, expiry=None, anchors=0, rows=None, **options):
    x = {name: t.to(DEVICE) for name, t in x.items()}
    expiry = expiry_of(x, window, anchors, places, rows) if expiry is None else expiry
    options |= {"anchors": anchors, "rows": rows}
    naive = functools.partial(naive_hybrid_attn, expiry=expiry)
    check_against_naive(
        lambda x: fast(x, window, expiry, places, **options), lambda x: run(naive, x, window, **options), x, dtype
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape, window, anchors, places, options, dtype",
    [
        (dict(t=70, hq=2, hk=1, gate=1, weight=True), 9, 3, 7, MERGE, torch.float32),
        (dict(t=36, hq=4, hk=2, value=20, pre=12, gate=4, sinks=1), 5, 1, 6, ABSOLUTE, torch.float32),
        (dict(t=50, hq=2, hk=1, gate=1, sinks=2, weight=True), 7, 2, 17, SUM, torch.float32),
        (dict(t=70, hq=1, hk=1, positive=True), 9, 3, 5, UNNORMALISED, torch.float32),
        (dict(t=40, hq=2, hk=2, gate=1), 6, 0, 4, MERGE | EXP, torch.float32),
        (dict(t=40, hq=3, hk=1, dim=24, gate=3), 4, 1, 0, SUM | OUTSIDE | {"softcap": 1.5}, torch.float32),
        (dict(t=40, hq=2, hk=1, gate=1, weight=True), 8, 5, 9, MERGE | {"coverage": "all"} | EXP, torch.float32),
        (dict(t=70, hq=2, hk=1, gate=1), 9, 0, 7, MERGE, HALF),
        (dict(t=70, hq=4, hk=2, gate=2, weight=True), 9, 3, 7, MERGE | LEFT, torch.float32),
        (dict(t=40, hq=2, hk=1, gate=2), 5, 1, 6, SUM | LEFT | EXP, torch.float32),
    ],
)  # fmt: skip
def test_output_and_gradients_match_the_reference(shape, window, anchors, places, options, dtype):
    """Every map, mix, gate of heads and coverage; over chunks of 64 rows and segments of 32."""
    x = make(**{"b": 1, "dim": 16, "value": 16, "pre": 16} | shape)
    check(x, window, places, dtype, anchors=anchors, **options)


@pytest.mark.parametrize("seed, window, places", [(1, 5, 20), (2, 12, 3)])
def test_lives_of_any_length(seed, window, places):
    x = make(1, 100, 1, 1, 16, 16, 8, 1)
    check(x, window, places, expiry=any_expiry(x, window, 2, places, seed), anchors=2, **MERGE)


@pytest.mark.parametrize("options", [MERGE, SUM | OUTSIDE, MERGE | EXP, MERGE | LEFT])
def test_resets_and_other_extreme_gates(options):
    """A reset leaves nothing of the keys before it, whether they have expired or not; and gates that are nearly 1."""
    x = make(1, 70, 1, 1, 16, 16, 8, 1)
    kinds = torch.tensor([0.0, -1e-8, -0.1, -30.0, -1e4, -torch.inf])
    odds = torch.tensor([8.0, 8.0, 8.0, 1.0, 1.0, 1.0])
    x["g"] = kinds[odds.multinomial(70, True, generator=torch.Generator().manual_seed(0))].view(1, 70, 1)
    check(x, 6, 5, anchors=3, **options)


def test_packed_sequences_are_as_if_alone():
    rows = {"cu_seqlens": torch.tensor([0, 1, 1, 40, 75], dtype=torch.int32, device=DEVICE)}
    check(make(1, 75, 2, 1, 16, 16, 8, 1), 6, 7, rows=rows, anchors=2, **MERGE)


def test_padding_adds_nothing_and_leftovers_are_never_read(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like")):
        make_tensor = getattr(owner, name)

        def leftover(*args, make_tensor=make_tensor, **kwargs):
            x = make_tensor(*args, **kwargs)
            return x.fill_(-1e30) if x.is_floating_point() else x.fill_(1 << 29) if x.dtype == torch.int32 else x

        monkeypatch.setattr(owner, name, leftover)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    rows = {"padding_mask": mask.to(DEVICE)}
    check(make(2, 40, 1, 1, 16, 16, 8, 1, weight=True), 5, 4, rows=rows, anchors=2, **SUM | OUTSIDE)


@torch.no_grad()
def test_keys_of_a_segment_stand_in_the_order_in_which_they_expire():
    """All that live in it beyond what the kernel of window keys takes, and those found alive: neighbours in a tile have
    much the same queries, so it goes through few that see none of its keys."""
    from lizard_ops.hybrid_attn.triton.kept_bwd import sort_kernel
    from lizard_ops.hybrid_attn.triton.kept_index import index_of
    from lizard_ops.hybrid_attn.triton.kept_op import described

    x, window, anchors, places, size, segment = make(1, 90, 1, 1, 16, 16, 8), 5, 2, 16, 7, 32
    x = {name: t.to(DEVICE) for name, t in x.items()}
    expiry = any_expiry(x, window, anchors, places, 3)
    none = dict.fromkeys(("g", "weight", "sink", "cu_seqlens", "lengths", "softcap"))
    numbers = {"window": window, "anchors": anchors, "outside": True, "mix": "sum", "scale": 1.0, "feature_scale": 1.0}
    _, _, shape, stream = described(x | none | numbers | {"normalize": True, "feature_map": "softmax"})
    index = index_of(expiry, places, stream, shape)
    order = torch.full((3, 1, places + segment), -1, dtype=torch.int32, device=DEVICE)
    at_end, count = torch.empty_like(order[..., :segment]), torch.empty_like(order[..., 0])
    given = index.ends, index.carried, index.carried_count, at_end, order, count, 90, stream
    sort_kernel[(3,)](*given, window, size, 1, segment, places, 16)
    ends = [0] * anchors + [min(end, 90) for end in expiry[0, anchors:, 0].tolist()]
    for n, t in enumerate(range(0, 90, segment)):
        last, carried = min(t + segment, 90), index.carried[n, 0].tolist()
        found = [int(code) for code in order[n, 0, : count[n, 0]]]
        found = [carried[code] if code < places else code - places + t - window + 1 for code in found]
        alive = [j for j in range(90) if j <= t - window and ends[j] > t]
        leave = [j for j in range(max(t - window + 1, 0), last - window)]
        leave = [j for j in leave if max(j // size * size + size - 1 + window, t) < min(ends[j], last)]
        assert found == sorted(alive + leave, key=lambda j, last=last: min(ends[j], last))


@pytest.mark.parametrize("final", [False, True])
def test_no_places_are_the_kernels_without(final, monkeypatch):
    """Outputs, gradients and the state by the same launches, bit for bit."""
    module = importlib.import_module("lizard_ops.hybrid_attn.triton.chunk")
    for name in ("kept_hybrid", "kept_between_states"):
        monkeypatch.setattr(module, name, None)  # whoever calls it fails

    def results(**more):
        x = leaves_of(1, 6, 1, 1, 16, 16, 8, 1)
        o, state = chunk_hybrid_attn(
            **x, window=2, anchors=1, impl="triton", output_final_state=final, **more, **MERGE
        )  # fmt: skip
        ends = [o, *(t for t in state or () if t is not None and t.requires_grad)]
        return [*ends, *torch.autograd.grad(sum(t.square().sum() for t in ends), list(x.values()))]

    plain, found = results(), results(kept_keys=0, score_delay=0)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_rising_scores_make_a_wider_window():
    x = {name: t.to(DEVICE) for name, t in make(1, 60, 2, 1, 16, 16, 8, 1).items()}
    expiry = (torch.arange(60, device=DEVICE) + 5 + 11).view(1, -1, 1)
    options = ABSOLUTE | {"anchors": 1}
    with torch.no_grad():
        found = fast(x, 5, expiry, 11, **options)["o"]
        wider = run(naive_hybrid_attn, x, 16, **options)["o"]
    torch.testing.assert_close(found, wider)


def leaves_of(*shape, **more):
    return {name: t.to(DEVICE).requires_grad_() for name, t in make(*shape, **more).items()}


def test_two_runs_are_equal_bit_for_bit_and_compile_and_checkpoint():
    x = leaves_of(1, 40, 2, 1, 16, 16, 8, 1, weight=True)
    expiry = expiry_of(x, 4, 2, 5)

    def attend(x):
        return fast(x, 4, expiry, 5, anchors=2, **MERGE)["o"]

    def gradients(op):
        o = op(x)
        return o, *torch.autograd.grad(o.sum(), tuple(x.values()))

    plain = gradients(attend)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
    for op in (attend, compiled, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(op), strict=True))


def test_operator_is_well_formed():
    from lizard_ops.hybrid_attn.triton.kept_op import kept_forward

    x = leaves_of(1, 20, 2, 1, 16, 16, 8, 1)
    inputs = (x["q"], x["k"], x["v"], x["fq"], x["fk"], x["g"], *[None] * 4, expiry_of(x, 4, 2, 3), 3)
    for late in (True, False):
        torch.library.opcheck(kept_forward, (*inputs, 4, 2, True, late, "relative", True, "softmax", 0.25, 1.0, None))


@pytest.mark.parametrize("given", ["expiry", "scores", "final"])
def test_any_layout_of_every_argument(given):
    """Rows between those of the other sequences, and channels that lie apart; "final": the kernels of states."""
    x = make(b=2, t=40, hq=2, hk=1, dim=16, value=16, pre=16, gate=1, weight=True)
    x = {name: t.to(DEVICE) for name, t in x.items()}
    scores = torch.randn(x["k"].shape[:3], generator=torch.Generator().manual_seed(0)).round().to(DEVICE)
    kept = {"expiry": expiry_of(x, 6, 1, 5)} if given == "expiry" else {"scores": scores, "score_delay": 2}

    def between(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def apart(t):
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]

    def results(layout):
        leaves = {name: t.clone().requires_grad_(given != "final") for name, t in x.items()}
        laid = {name: layout(t) for name, t in leaves.items()}
        more = {name: layout(t) if isinstance(t, torch.Tensor) else t for name, t in kept.items()}
        weight = {"merge_bias": laid.pop("weight")}
        o, state = chunk_hybrid_attn(
            **laid, window=6, anchors=1, kept_keys=5, impl="triton", output_final_state=given == "final",
            **more, **weight, **MERGE,
        )  # fmt: skip
        if state is not None:
            return [o, *(t for t in state if t is not None)]
        return [o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))]

    wanted = results(torch.Tensor.clone)
    for layout in (between, apart):
        for found, one in zip(results(layout), wanted, strict=True):
            exact = DEVICE != "cuda"
            torch.testing.assert_close(found, one, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_empty_input():
    x = leaves_of(2, 0, 2, 1, 16, 16, 8, 1, weight=True)
    expiry = torch.zeros(2, 0, 1, dtype=torch.int64, device=DEVICE)
    o = fast(x, 4, expiry, 3, anchors=2, **MERGE)["o"]
    assert o.shape == (2, 0, 2, 16)
    o.sum().backward()


@pytest.mark.parametrize("ends", [None, [0, 4, 12]], ids=["plain", "packed"])
def test_more_alive_than_there_are_places_is_refused_by_name(ends):
    x = {name: t.to(DEVICE) for name, t in make(1, 12, 1, 1, 16, 16, 8).items()}
    rows = {} if ends is None else {"cu_seqlens": torch.tensor(ends, device=DEVICE)}
    with checked(), pytest.raises(ValueError, match="^kept_keys: got 1, wanted at least"):
        fast(x, 2, torch.full((1, 12, 1), NEVER, device=DEVICE), 1, rows=rows, **MERGE)


def test_second_derivatives_are_refused_by_name():
    x = leaves_of(1, 6, 1, 1, 16, 16, 8)
    o = fast(x, 2, expiry_of(x, 2, 0, 2), 2, **MERGE)["o"]
    (grad,) = torch.autograd.grad(o.square().sum(), x["v"], create_graph=True)
    with pytest.raises(ValueError, match='got "triton" for a second derivative of chunk_hybrid_attn'):
        torch.autograd.grad(grad.sum(), x["v"])
