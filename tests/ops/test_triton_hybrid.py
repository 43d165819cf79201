"""The hybrid kernels against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from kernel_checks import DEVICE, check_against_naive, with_gradients, worst_excess

from lizard_ops.common.state import AttentionState
from lizard_ops.hybrid_attn.api import chunk_hybrid_attn
from lizard_ops.hybrid_attn.naive import naive_hybrid_attn

pytest.importorskip("lizard_ops.hybrid_attn.triton.chunk")
from lizard_ops.tiles.strided import strided  # noqa: E402

MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}
SUM = {"mix": "sum", "coverage": "all", "feature_map": "softmax"}


EXP = {"feature_map": "exp"}


def make(b, t, hq, hk, dim, value, pre, gate=0, sinks=0, weight=False, positive=False):
    """gate: number of gate heads, 0 for none; weight: alpha or merge bias a token."""
    generator = torch.Generator().manual_seed(t * hq + dim)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x = {"q": randn(b, t, hq, dim), "k": randn(b, t, hk, dim), "v": randn(b, t, hk, value)}
    x |= {"fq": randn(b, t, hq, pre), "fk": randn(b, t, hk, pre)}
    if positive:
        x |= {"fq": x["fq"].abs(), "fk": x["fk"].abs()}
    if gate:
        x["g"] = torch.nn.functional.logsigmoid(randn(b, t, gate) + 3)
    if sinks:
        x["sinks"] = randn(hq, sinks)
    if weight:
        x["weight"] = randn(b, t, hq)
    return x


def run(op, x, window, state=None, final=False, rows=None, **options):
    weights = {"alpha" if options["mix"] == "sum" else "merge_bias": x["weight"]} if "weight" in x else {}
    o, state = op(
        x["q"], x["k"], x["v"], x["fq"], x["fk"], x.get("g"), window, sinks=x.get("sinks"), initial_state=state,
        output_final_state=final, **weights, **(rows or {}), **options,
    )  # fmt: skip
    return {"o": o} | ({} if state is None else {n: s for n, s in state._asdict().items() if s is not None})


def fast(x, window, **options):
    return run(chunk_hybrid_attn, x, window, impl="triton", **options)


def check(x, window, dtype=torch.float32, **options):
    check_against_naive(
        lambda x: fast(x, window, **options), lambda x: run(naive_hybrid_attn, x, window, **options), x, dtype
    )


@pytest.mark.parametrize(
    "shape, window, anchors, options, dtype",
    [
        (dict(b=1, t=80, hq=2, hk=1, dim=16, value=16, pre=16, gate=1), 32, 3, MERGE, torch.float32),
        (dict(b=1, t=45, hq=4, hk=2, dim=16, value=20, pre=12, gate=4, weight=True), 13, 2, MERGE, torch.float32),
        (dict(b=1, t=40, hq=3, hk=1, dim=24, value=16, pre=16, weight=True), 41, 0, MERGE, torch.float32),
        (dict(b=1, t=1, hq=2, hk=2, dim=16, value=16, pre=16, gate=2), 4, 2, MERGE, torch.float32),
        (dict(b=1, t=90, hq=2, hk=1, dim=16, value=16, pre=16, gate=1, sinks=2), 33, 5, SUM, torch.float32),
        (dict(b=1, t=70, hq=2, hk=1, dim=16, value=16, pre=16, gate=1), 32, 3, MERGE, torch.float16),
        (dict(b=1, t=52, hq=2, hk=1, dim=16, value=16, pre=12, gate=2), 8, 3, MERGE | EXP, torch.float32),
        (dict(b=2, t=20, hq=2, hk=1, dim=16, value=20, pre=16), 8, 0, SUM | EXP, torch.float16),
    ],
)  # fmt: skip
def test_output_and_gradients_match_the_reference(shape, window, anchors, options, dtype):
    check(make(**shape), window, dtype, anchors=anchors, **options)


@pytest.mark.parametrize(
    "options",
    [
        MERGE | {"merge_mass": "absolute"},
        MERGE | {"coverage": "all", "feature_scale": 0.3},
        SUM | {"coverage": "outside", "normalize": False},
        SUM | {"feature_map": "identity"},
        SUM | {"feature_map": "identity", "normalize": False, "coverage": "outside"},
        MERGE | {"feature_map": "identity"},
        MERGE | {"softcap": 1.5},
        SUM | {"feature_map": "identity", "softcap": 1.5},
    ],
)
def test_every_option_matches_the_reference(options):
    check(make(1, 80, 2, 1, 16, 16, 16, 2, weight=True, positive=True), 20, anchors=3, **options)


def test_gradients_where_the_linear_branch_has_nearly_all_mass():
    """The gradient of the mix is a difference of averages times both shares: small, and with all its digits."""
    x = make(1, 24, 1, 1, 16, 80, 40, 1, weight=True)
    x |= {"fq": 2 * x["fq"], "fk": 2 * x["fk"], "weight": x["weight"] + 4}
    check(x, 6, anchors=1, **MERGE | EXP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_where_the_window_has_no_mass_left(dtype):
    """Its share is 0 in the dtype of the sums, and in half precision that is what its row terms are divided by."""
    x = make(1, 20, 2, 1, 16, 16, 8, 1, weight=True)
    x["weight"] = torch.where(x["weight"] > 0, 200.0, x["weight"])
    check(x, 6, dtype, anchors=1, **MERGE)


@pytest.mark.parametrize("feature_map", ["identity", "softmax"])
def test_gradients_of_a_sum_that_is_nearly_all_window(feature_map):
    """do.o less the window's part has lost the digits of do.o_linear, of which d fq and d fk are made."""
    x = make(1, 40, 2, 1, 16, 16, 16, 2, weight=True, positive=True)
    x["weight"] = x["weight"] + 30
    check(x, 20, anchors=3, **SUM | {"feature_map": feature_map})


@pytest.mark.parametrize("options", [MERGE, SUM])
def test_gradients_of_scores_where_one_key_has_nearly_all_weight(options):
    """A difference that the rounding of a log-sum-exp of hundreds would be the whole of: no larger than the naive's."""
    x = make(1, 40, 2, 1, 128, 16, 16, gate=1, sinks=3)
    x["q"] = 100 * x["q"]
    x = {name: t.to(DEVICE) for name, t in x.items()}

    def naive(x):
        return run(naive_hybrid_attn, x, 32, **options)

    exact, plain = with_gradients(naive, x, torch.float64), with_gradients(naive, x, torch.float32)
    found = with_gradients(lambda x: fast(x, 32, **options), x, torch.float32)
    for name in ("d q", "d k"):
        error, allowed = ((y[name].double() - exact[name]).norm() for y in (found, plain))
        assert error <= allowed, f"{name}: {error / allowed:.2f} times the error of the naive op"


@pytest.mark.parametrize(
    "options, per_channel",
    [(MERGE, True), (SUM | {"coverage": "outside"}, True), (MERGE | EXP, False), (MERGE | EXP, True),
     (SUM | EXP | {"coverage": "outside", "normalize": False}, False), (MERGE | {"softcap": 1.5}, True)],
)  # fmt: skip
def test_gates_a_channel_and_exponential_features(options, per_channel):
    """Across a carried state, whose ring holds features as given."""
    x = make(2, 40, 2, 1, 16, 16, 16, 1)
    if per_channel:
        x["g"] = x["g"].unsqueeze(-1) * torch.linspace(0, 2, 32)

    def in_two_parts(op):
        def both(x):
            parts = ({n: t[:, a:b] for n, t in x.items()} for a, b in ((0, 23), (23, 40)))
            first = run(op, next(parts), 6, final=True, anchors=2, **options)
            o = first.pop("o")
            second = run(op, next(parts), 6, state=AttentionState(**first), final=True, anchors=2, **options)
            return second | {"o": torch.cat([o, second["o"]], 1)}

        return both

    kernels = functools.partial(chunk_hybrid_attn, impl="triton")
    check_against_naive(in_two_parts(kernels), in_two_parts(naive_hybrid_attn), x, torch.float32)


@pytest.mark.parametrize("options", [MERGE, SUM, MERGE | EXP, SUM | {"coverage": "outside"}])
def test_extreme_gates(options):
    """A reset within the window leaves the sums as they are and the linear branch without a key: no output of a sum."""
    x = make(1, 90, 2, 1, 16, 16, 16, 1)
    kinds = torch.tensor([0.0, -1e-8, -0.1, -30.0, -1e4, -torch.inf])
    odds = torch.tensor([8.0, 8.0, 8.0, 1.0, 1.0, 0.2])
    x["g"] = kinds[odds.multinomial(90, True, generator=torch.Generator().manual_seed(0))].view(1, 90, 1)
    check(x, 20, anchors=3, **options)


@pytest.mark.parametrize("kind", ["large", "opposite", "equal"])
def test_exponential_features_overflow_nothing(kind):
    """Pre-activations to 1e3, across chunks; the gradients, which cancel there, are judged in test_properties.py."""
    x = make(1, 40, 2, 1, 16, 16, 8, 1)
    if kind == "equal":
        x |= {"fk": x["fk"][:, :1].expand_as(x["fk"]).clone()}
    sign = -1 if kind == "opposite" else 1
    x |= {"fq": x["fq"] + 500 * sign * x["fq"][..., :1].abs(), "fk": x["fk"] + 500 * x["fk"][..., :1].abs()}
    options = MERGE | EXP | {"anchors": 2, "final": True}
    leaves = {name: t.to(DEVICE).requires_grad_() for name, t in x.items()}
    found = fast(leaves, 9, **options)
    grads = torch.autograd.grad(found["o"].square().sum() + found["s"].sum(), list(leaves.values()))
    assert all(grad.isfinite().all() for grad in grads)
    with torch.no_grad():
        exact, plain = (
            run(naive_hybrid_attn, {name: t.to(DEVICE, dtype) for name, t in x.items()}, 9, **options)
            for dtype in (torch.float64, torch.float32)
        )
    for name, t in exact.items():
        assert worst_excess(found[name].detach(), plain[name], t, torch.float32) <= 1, name


@pytest.mark.parametrize("options", [MERGE, SUM])
@pytest.mark.parametrize("ends", [[0, 1, 1, 40, 65, 100], [0, 13, 100]])
def test_packed_sequences_are_as_if_alone(ends, options):
    rows = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=DEVICE)}
    check(make(1, 100, 2, 1, 16, 16, 16, 1), 9, final=True, rows=rows, anchors=2, **options)


@pytest.mark.parametrize("options", [MERGE, SUM])
def test_padding_adds_nothing(options):
    mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[2] = False
    rows = {"padding_mask": mask.to(DEVICE)}
    check(make(3, 60, 2, 1, 16, 16, 16, 1, weight=True), 9, final=True, rows=rows, anchors=2, **options)


@pytest.mark.parametrize("options", [MERGE, SUM])
def test_padding_reads_no_leftovers(options, monkeypatch):
    """Finite leftovers in fresh memory, which no test for NaN can tell from a result, reach no gradient."""
    for owner, name in ((torch, "empty"), (torch, "empty_like")):
        make_tensor = getattr(owner, name)

        def leftover(*args, make_tensor=make_tensor, **kwargs):
            x = make_tensor(*args, **kwargs)
            return x.fill_(-1e30) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, leftover)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    rows = {"padding_mask": mask.to(DEVICE)}
    check(make(2, 20, 2, 1, 16, 16, 16, 1, sinks=2, weight=True), 5, final=True, rows=rows, anchors=2, **options)


@pytest.mark.parametrize(
    "options, packed, gate",
    [
        (MERGE, False, 2),
        (MERGE, True, 1),
        (SUM, False, 1),
        (SUM, True, 2),
        (SUM | EXP | {"coverage": "outside"}, True, 1),
    ],
)
def test_carried_state_continues_the_sequence(packed, options, gate):
    """Sequences that have seen 0, 2 and 43 tokens; gradients reach those tokens through the state."""
    window, anchors = 7, 4
    x = make(*((1, 90) if packed else (3, 40)), 2, 1, 16, 16, 16, gate)
    x |= {"past " + name: t for name, t in make(1, 45, 2, 1, 16, 16, 16, gate).items()}
    seen = torch.tensor([0, 0, 2, 45], device=DEVICE)
    rows = {"cu_seqlens": torch.tensor([0, 3, 35, 90], device=DEVICE)} if packed else {}

    def after_past(op):
        def both(x):
            past = {name: x["past " + name] for name in ("q", "k", "v", "fq", "fk", "g")}
            before = {"anchors": anchors, "final": True, "rows": {"cu_seqlens": seen}, **options}
            state = run(naive_hybrid_attn, past, window, **before)
            state.pop("o")
            return op(x, window, state=AttentionState(**state), final=True, rows=rows, anchors=anchors, **options)

        return both

    naive = after_past(lambda x, window, **options: run(naive_hybrid_attn, x, window, **options))
    check_against_naive(after_past(fast), naive, x, torch.float32)


def test_strided_inputs_need_no_copy():
    x = make(1, 40, 4, 2, 16, 16, 16, 2)

    def strided(op):
        def moved(x):
            return op({name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in x.items()}, 6, **MERGE)

        return moved

    check_against_naive(strided(fast), strided(lambda x, *w, **o: run(naive_hybrid_attn, x, *w, **o)), x, torch.float32)


@pytest.mark.parametrize(("width", "unit"), [(64, 8), (40, 8), (20, 4), (5, 1)])
def test_strides_are_known_to_be_aligned(width, unit):
    x = torch.empty(2, 3, 5, width)
    found = strided(x)
    assert found.unit.value == unit
    assert [unit * step for step in (found.batch, found.time, found.head)] == list(x.stride()[:3])


def test_empty_input():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make(2, 0, 2, 1, 16, 16, 16, 1, weight=True).items()}
    found = fast(x, 4, final=True, anchors=2, **MERGE)
    assert found["o"].shape == (2, 0, 2, 16) and not found["s"].any()
    found["o"].sum().backward()


def test_operator_is_well_formed():
    from lizard_ops.hybrid_attn.triton.op import hybrid_forward

    x = make(1, 20, 2, 1, 16, 16, 16, 1, weight=True)
    x = {name: t.to(DEVICE).requires_grad_() for name, t in x.items()}
    inputs = (x["q"], x["k"], x["v"], x["fq"], x["fk"], x["g"], x["weight"], *[None] * 8)
    torch.library.opcheck(hybrid_forward, (*inputs, 4, 2, True, "relative", True, "softmax", 0.25, 1.0, True))


def test_compiles_checkpoints_and_autocasts():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make(1, 20, 2, 1, 16, 16, 16, 1, weight=True).items()}

    def attend(x):
        return fast(x, 4, anchors=2, **MERGE)["o"]

    def gradients(op):
        o = op(x)
        return o, *torch.autograd.grad(o.sum(), tuple(x.values()))

    plain = gradients(attend)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
    for op in (compiled, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(op), strict=True))
    with torch.autocast(DEVICE, torch.float16):
        o, *grads = gradients(attend)
    assert o.dtype == torch.float16 and all(grad.dtype == torch.float32 for grad in grads)
