"""The window kernels against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, check_against_naive

from lizard_ops import naive_window_attn, window_attn
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions
from lizard_ops.window_attn.naive import naive_window

window_triton = pytest.importorskip("lizard_ops.window_attn.triton.chunk").window_triton


def make(b, t, hq, hk, d, v, sinks=0):
    torch.manual_seed(t * hq + d)
    made = {"q": torch.randn(b, t, hq, d), "k": torch.randn(b, t, hk, d), "v": torch.randn(b, t, hk, v)}
    return made | ({"sinks": torch.randn(hq, sinks)} if sinks else {})


def fast(x, window, anchors, state=None, final=False, **options):
    o, state, lse = window_attn(
        x["q"], x["k"], x["v"], window, anchors=anchors, sinks=x.get("sinks"), initial_state=state,
        output_final_state=final, return_lse=True, impl="triton", **options,
    )  # fmt: skip
    return {"o": o, "lse": lse} | fields_of(state)


def naive(x, window, anchors, state=None, final=False, **options):
    o, state, lse = naive_window_attn(
        x["q"], x["k"], x["v"], window, anchors=anchors, sinks=x.get("sinks"), initial_state=state,
        output_final_state=final, return_lse=True, **options,
    )  # fmt: skip
    return {"o": o, "lse": lse} | fields_of(state)


def fields_of(state):
    return {} if state is None else {name: x for name, x in state._asdict().items() if x is not None}


@pytest.mark.parametrize(
    "shape, window, anchors, sinks, dtype",
    [
        ((2, 45, 4, 2, 16, 16), 16, 4, 2, torch.float32),
        ((1, 41, 3, 1, 20, 12), 7, 0, 0, torch.float32),
        ((1, 37, 8, 2, 16, 32), 100, 18, 1, torch.float32),
        ((1, 1, 2, 2, 16, 16), 3, 2, 1, torch.float32),
        ((2, 70, 4, 1, 32, 16), 9, 3, 1, torch.float16),
    ],
)
def test_output_and_gradients_match_the_reference(shape, window, anchors, sinks, dtype):
    x = make(*shape, sinks)
    check_against_naive(lambda x: fast(x, window, anchors), lambda x: naive(x, window, anchors), x, dtype)


@pytest.mark.parametrize("size", [1, 30, 300])
def test_gradients_of_values_stay_within_their_own_bound(size):
    """A weight is exp(s - lse) of a stored lse: off by the roundings of s and lse, five as docs/trust.md counts."""
    x = make(1, 40, 2, 1, 128, 16)
    x["q"] = size * x["q"]
    x = {name: t.to(DEVICE) for name, t in x.items()}
    v64, v32 = x["v"].double().requires_grad_(), x["v"].requires_grad_()
    naive({name: t.double() for name, t in x.items()} | {"v": v64}, 32, 0)["o"].sum().backward()
    fast(x, 32, 0)["o"].sum().backward()  # of weights alone, so that no terms cancel
    scores = torch.einsum("bthd,bshd->bhts", x["q"].double(), x["k"].double().expand_as(x["q"])) * 128**-0.5
    bound = (5 * scores.abs().amax() + 16) * 2.0**-24
    assert ((v32.grad.double() - v64.grad).abs() <= bound * v64.grad + 1e-30).all()


@pytest.mark.parametrize(
    "softcap, dtype", [(0.1, torch.float32), (1.5, torch.float32), (50.0, torch.float32), (1.5, torch.float16)]
)
def test_capped_scores_match_the_reference(softcap, dtype):
    """From scores far beyond the cap to scores that the cap hardly moves."""
    x = make(1, 25, 4, 2, 16, 16, 2)
    options = {"softcap": softcap}
    check_against_naive(lambda x: fast(x, 9, 3, **options), lambda x: naive(x, 9, 3, **options), x, dtype)


def test_row_maximum_and_its_gradient_match_the_reference():
    options = WindowOptions(window=6, anchors=3, scale=0.5)

    def fast_max(x):
        o, _, lse, spread = window_triton(WindowInputs(**x), options, with_max=True)
        return {"o": o, "lse": lse, "relative": spread}

    def naive_max(x):
        o, _, lse, row_max = naive_window(WindowInputs(**x), options)
        return {"o": o, "lse": lse, "relative": lse - row_max}

    x = make(1, 40, 4, 2, 16, 16, 2)
    check_against_naive(fast_max, naive_max, x, torch.float32)


@pytest.mark.parametrize("ends", [[0, 1, 1, 20, 33, 50], [0, 13, 50]])
def test_packed_sequences_are_as_if_alone(ends):
    x, cu_seqlens = make(1, 50, 4, 2, 16, 16, 1), torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    check_against_naive(
        lambda x: fast(x, 5, 2, final=True, cu_seqlens=cu_seqlens),
        lambda x: naive(x, 5, 2, final=True, cu_seqlens=cu_seqlens),
        x,
        torch.float32,
    )


def test_padding_adds_nothing():
    x = make(3, 24, 2, 1, 16, 16, 1)
    mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[2] = False
    mask = mask.to(DEVICE)
    check_against_naive(
        lambda x: fast(x, 5, 2, final=True, padding_mask=mask),
        lambda x: naive(x, 5, 2, final=True, padding_mask=mask),
        x,
        torch.float32,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_carried_state_continues_the_sequence(packed):
    """Sequences that have seen 0, 2 and 23 tokens; gradients reach those tokens through the state."""
    window, anchors = 5, 4
    x = make(*((1, 40) if packed else (3, 12)), 4, 2, 16, 16, 1)
    x |= {"past " + name: t for name, t in make(1, 25, 4, 2, 16, 16).items()}
    seen = torch.tensor([0, 0, 2, 25], device=DEVICE)
    rows = {"cu_seqlens": torch.tensor([0, 3, 25, 40], device=DEVICE)} if packed else {}

    def after_past(run):
        def both(x):
            past = (x["past q"], x["past k"], x["past v"])
            _, state = naive_window_attn(*past, window, anchors=anchors, output_final_state=True, cu_seqlens=seen)
            return run(x, window, anchors, state=state, final=True, **rows)

        return both

    check_against_naive(after_past(fast), after_past(naive), x, torch.float32)


def test_strided_inputs_need_no_copy():
    x = make(2, 20, 4, 2, 16, 16)

    def strided(run):
        return lambda x: run({name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in x.items()}, 6, 2)

    check_against_naive(strided(fast), strided(naive), x, torch.float32)


@pytest.mark.parametrize("shape", [(2, 0, 2, 1, 16, 16)])
def test_empty_input(shape):
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make(*shape, 1).items()}
    found = fast(x, 4, 2)
    assert found["o"].shape == (2, 0, 2, 16) and found["lse"].shape == (2, 0, 2)
    found["o"].sum().backward()


def test_operator_is_well_formed():
    from lizard_ops.window_attn.triton.op import window_forward

    x = {name: t.to(DEVICE).requires_grad_() for name, t in make(1, 9, 2, 1, 16, 16).items()}
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    torch.library.opcheck(window_forward, (x["q"], x["k"], x["v"], None, None, sinks, None, None, 4, 2, 0, 0.25, True))


def test_autocast_takes_its_dtype():
    x = {name: t.to(DEVICE) for name, t in make(1, 9, 2, 1, 16, 16, 1).items()}
    with torch.autocast(DEVICE, dtype=torch.float16):
        cast = fast(x, 4, 2)
    plain = fast({name: t if name == "sinks" else t.half() for name, t in x.items()}, 4, 2)
    assert cast["o"].dtype == torch.float16 and torch.equal(cast["o"], plain["o"])


def test_compiles_into_one_graph():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make(1, 9, 2, 1, 16, 16, 1).items()}
    o = torch.compile(lambda x: fast(x, 4, 2)["o"], backend="aot_eager", fullgraph=True)(x)
    plain = fast(x, 4, 2)["o"]
    assert torch.equal(o, plain)
    found, wanted = (torch.autograd.grad(out.sum(), list(x.values())) for out in (o, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
