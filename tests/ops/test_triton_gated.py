"""The gated kernels against the reference, in the interpreter without a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import DEVICE, check_against_naive

from lizard_ops import AttentionState, chunk_gated_attn, naive_gated_attn, window_attn

config = pytest.importorskip("lizard_ops.gated_attn.triton.config")
pytest.importorskip("lizard_ops.gated_attn.triton.chunk")
chunk_gated_triton = partial(chunk_gated_attn, impl="triton", return_log_mass=True)

GATES = {"none": 0, "one": 1, "key": 2, "query": 3, "channel": 4}


def gate_shape(gate, b, t, hq, hk, k):
    return {"one": (b, t, 1), "key": (b, t, hk), "query": (b, t, hq), "channel": (b, t, hk, k)}[gate]


def make(b=1, t=40, hq=2, hk=1, k=16, v=16, gate="key", decay=0.3, signed=False):
    torch.manual_seed(t * hq + k)
    features = torch.randn if signed else torch.rand
    x = {"q": features(b, t, hq, k), "k": features(b, t, hk, k), "v": torch.randn(b, t, hk, v)}
    x = {name: value.double() for name, value in x.items()}
    if gate != "none":
        x["g"] = -decay * torch.rand(gate_shape(gate, b, t, hq, hk, k)) ** 2
    return x


def with_state(x, gate="key", offset=0, sequences=1):
    n, hq, hk, k, v = sequences, x["q"].shape[2], *x["k"].shape[2:], x["v"].shape[3]
    heads = hq if gate == "query" else hk
    x |= {"s": torch.randn(n, heads, k, v), "z": torch.rand(n, heads, k) + k**0.5}
    if offset:
        x |= {"ring_v": torch.randn(n, offset, hk, v).double(), "ring_fk": torch.rand(n, offset, hk, k).double()}
        x["ring_g"] = -0.3 * torch.rand(gate_shape(gate, n, offset, hq, hk, k))
    return x


def run(op, x, position, options):
    state = None
    if "s" in x:
        fields = {name: x[name] for name in AttentionState._fields if name in x}
        state = AttentionState(torch.full((len(x["s"]),), position, device=DEVICE), **fields)
    o, final, log_mass = op(x["q"], x["k"], x["v"], x.get("g"), initial_state=state, **options)
    fields = {} if final is None else {name: field for name, field in final._asdict().items() if field is not None}
    return {"o": o, "log_mass": log_mass} | fields


def compare(x, dtype=torch.float32, position=0, chunk=16, final=True, **options):
    options = {"normalize": True, "window_offset": 0, "anchors": 0, "output_final_state": final} | options
    options |= {"cu_seqlens": None, "padding_mask": None} | {
        name: options[name].to(DEVICE) for name in ("cu_seqlens", "padding_mask") if name in options
    }
    scale = 1.0 if options["normalize"] else x["k"].shape[-1] ** -0.5

    def fast(*args, **kw):
        return chunk_gated_triton(*args, scale=scale, gate_form="stable", chunk_size=chunk, **kw)

    def naive(*args, **kw):
        return naive_gated_attn(*args, return_log_mass=True, **kw)

    check_against_naive(lambda x: run(fast, x, position, options), lambda x: run(naive, x, position, options), x, dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_outputs_and_gradients_match_the_reference(gate, dtype):
    compare(make(b=1, t=37, hq=4, hk=2, gate=gate), dtype)


@pytest.mark.parametrize("gate", ["key", "query", "channel"])
def test_unnormalised_with_signed_features(gate):
    x = make(t=40, hq=3, hk=1, gate=gate, signed=True)
    check = {"normalize": False, "output_final_state": True, "window_offset": 0, "anchors": 0}
    check |= {"cu_seqlens": None, "padding_mask": None}

    def outputs(op, x):
        found = run(op, x, 0, check)
        del found["log_mass"]
        return found

    check_against_naive(
        lambda x: outputs(partial(chunk_gated_triton, scale=0.25, gate_form="stable", chunk_size=16), x),
        lambda x: outputs(partial(naive_gated_attn, scale=0.25, return_log_mass=True), x),
        x,
        torch.float32,
    )


@pytest.mark.parametrize("gate", ["one", "query", "channel"])
@pytest.mark.parametrize("offset, anchors", [(0, 0), (5, 0), (4, 3)])
def test_a_carried_state_gives_outputs_state_and_gradients(gate, offset, anchors):
    x = with_state(make(b=2, t=21, hq=4, hk=2, gate=gate), gate, offset, sequences=2)
    compare(x, position=offset + anchors + 1, window_offset=offset, anchors=anchors)


@pytest.mark.parametrize("gate", ["none", "key", "channel"])
@pytest.mark.parametrize("offset, anchors", [(0, 3), (6, 3), (30, 0)])
def test_window_offset_and_anchors_from_the_start(gate, offset, anchors):
    compare(make(b=2, t=21, gate=gate), window_offset=offset, anchors=anchors)


@pytest.mark.parametrize("gate", ["query", "channel"])
def test_window_offset_without_normaliser(gate):
    compare(make(t=24, gate=gate), normalize=False, window_offset=5)


@pytest.mark.parametrize("gate", ["key", "channel"])
@pytest.mark.parametrize("state", [False, True])
def test_packed_sequences_are_as_if_alone(gate, state):
    x = make(t=40, hq=2, hk=1, gate=gate)
    x = with_state(x, gate, 4, sequences=4) if state else x
    compare(x, position=6, window_offset=4, anchors=2, cu_seqlens=torch.tensor([0, 7, 7, 30, 40]))


@pytest.mark.parametrize("gate", ["none", "query"])  # the others: test_properties.py
def test_padding_anywhere(gate):
    x = with_state(make(b=2, t=20, gate=gate), gate, 4 if gate == "query" else 0, sequences=2)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    compare(x, position=5, window_offset=4 if gate == "query" else 0, padding_mask=mask)


@pytest.mark.parametrize("gate", ["key", "channel"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 33, 3, 1, 10, 21),
        (1, 20, 2, 1, 72, 80),
        (1, 17, 2, 1, 72, 16),
        (1, 17, 2, 1, 16, 72),
        (1, 1, 8, 1, 16, 5),
        (2, 16, 1, 1, 1, 1),
    ],
)
def test_odd_lengths_groups_and_dims(gate, shape):
    compare(make(*shape, gate=gate), final=False)


@pytest.mark.parametrize("gate", ["key", "channel"])
@pytest.mark.parametrize("length", [1, 16, 100])
def test_one_chunk_and_many(gate, length):
    compare(make(t=length, hq=1, gate=gate))


@pytest.mark.parametrize("gate", ["key", "channel"])
def test_a_lone_key_passes_no_gradient_of_the_output_to_its_weight(gate):
    """Its two terms cancel: to the last bit for channels, to one rounding of do.v for a gate a head. A normalised
    output does not know what the only weight is."""
    x = {name: value.float().to(DEVICE).requires_grad_() for name, value in make(b=8, t=1, gate=gate).items()}
    options = {"normalize": True, "window_offset": 0, "anchors": 0, "output_final_state": False}
    options |= {"initial_state": None, "cu_seqlens": None, "padding_mask": None, "scale": 1.0, "gate_form": "stable"}
    o, _, _ = chunk_gated_triton(*x.values(), chunk_size=16, **options)
    d_o = torch.randn(o.shape, device=DEVICE)
    dq, dk = torch.autograd.grad(o, [x["q"], x["k"]], d_o)
    if gate == "channel":
        assert not dq.any() and not dk.any()
    else:
        hk = x["k"].shape[2]
        heads = x["q"].shape[2] // hk
        flow = (d_o.unflatten(2, (hk, heads)) * x["v"].unsqueeze(3)).sum(-1).flatten(2)  # do.v
        mass = (x["q"].unflatten(2, (hk, heads)) * x["k"].unsqueeze(3)).sum(-1).flatten(2)
        allowed = 2.0**-22 * (flow / mass).abs().unsqueeze(-1) * x["k"].repeat_interleave(heads, 2).abs()
        assert (dq.abs() <= allowed).all()


@pytest.mark.parametrize("k, v", [(16, 136), (136, 16), (16, 16), (32, 64), (512, 64)])
@pytest.mark.parametrize("chunk", [64, 128])
def test_tiles_of_a_chunk_share_a_layout(k, v, chunk):
    """Narrower tiles beside wider ones compile wrong where a product takes 64 rows: docs/kernels.md."""
    for kernel in set(config.WIDE) - {"scan"}:
        for size in (2, 4):
            found = config.launch(kernel, k, v, 1, chunk, size)
            assert min(found.rows, found.columns) >= 64


@pytest.mark.parametrize("k, v", [(1, 1), (3, 5), (16, 16), (72, 80)])
def test_short_chunks_of_float32_pair_rows_without_tensor_cores(k, v):
    """Index computations of their 16-row tiles compile wrong: docs/kernels.md."""
    ops = pytest.importorskip("lizard_ops.gated_attn.triton.op")
    q, values, g = torch.empty(1, 16, 2, k), torch.empty(1, 16, 1, v), torch.empty(1, 16, 1, k)
    for dtype, chunk, wanted in (
        (torch.float32, 16, "ieee"),
        (torch.float16, 16, "ieee"),
        (torch.bfloat16, 16, "tf32"),
        (torch.float32, 32, "tf32x3"),
    ):
        x = q.to(dtype), q[:, :, :1].to(dtype), values.to(dtype), g
        assert ops.shape_of(*x, chunk).score_constants["PRECISION"] == wanted


@pytest.mark.parametrize("gate", ["one", "query", "channel"])
def test_extreme_gates(gate):
    x = make(t=40, hq=2, hk=1, gate=gate)
    u = torch.rand(x["g"].shape)
    for below, value in ((0.8, -1e-8), (0.6, 0.0), (0.3, -torch.inf), (0.2, -1e4)):
        x["g"] = torch.where(u < below, value, x["g"])
    compare(x)


@pytest.mark.parametrize("gate", ["key", "channel"])
def test_a_later_gate_changes_no_bit_before_it(gate):
    x = {name: value.float().to(DEVICE) for name, value in make(t=40, gate=gate).items()}
    options = {"scale": 1.0, "normalize": True, "window_offset": 0, "anchors": 0, "initial_state": None}
    options |= {"output_final_state": False, "cu_seqlens": None, "padding_mask": None, "gate_form": "stable"}
    before = chunk_gated_triton(*x.values(), **options, chunk_size=32)[0]
    for t in (5, 22):
        later = x | {"g": x["g"].clone()}
        later["g"][:, t:] = -50.0
        assert torch.equal(chunk_gated_triton(*later.values(), **options, chunk_size=32)[0][:, :t], before[:, :t])


def test_no_rows_at_all_leave_the_state_as_it_was():
    x = {name: value.float().to(DEVICE) for name, value in make(b=2, t=0).items()}
    s, z = (torch.randn(2, 1, *dims, device=DEVICE, requires_grad=True) for dims in ((16, 16), (16,)))
    state = AttentionState(torch.full((2,), 7, device=DEVICE), s, z)
    options = {"normalize": True, "window_offset": 0, "anchors": 0, "cu_seqlens": None, "padding_mask": None}
    options |= {"scale": 1.0, "gate_form": "stable", "chunk_size": None, "output_final_state": True}
    o, final, log_mass = chunk_gated_triton(*x.values(), initial_state=state, **options)
    assert o.shape == (2, 0, 2, 16) and log_mass.shape == (2, 0, 2)
    assert torch.equal(final.s, s) and torch.equal(final.z, z) and torch.equal(final.position, state.position)
    (final.s.sum() + final.z.sum()).backward()
    assert torch.equal(s.grad, torch.ones_like(s)) and torch.equal(z.grad, torch.ones_like(z))


def test_absorbed_form_within_its_bound_and_refused_beyond():
    x = {name: value.float().to(DEVICE) for name, value in make(t=40, hq=4, hk=2).items()}
    options = {"scale": 1.0, "normalize": True, "window_offset": 0, "anchors": 0, "initial_state": None}
    options |= {"output_final_state": False, "cu_seqlens": None, "padding_mask": None, "chunk_size": 16}
    stable, absorbed = (
        chunk_gated_triton(*x.values(), **options, gate_form=form)[0] for form in ("stable", "absorbed")
    )
    torch.testing.assert_close(absorbed, stable, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gate_form"):
        chunk_gated_triton(*(x | {"g": x["g"] - 10}).values(), **options, gate_form="absorbed")


def test_bad_options_are_refused():
    x = make()
    options = {"scale": 1.0, "normalize": True, "window_offset": 0, "anchors": 0, "initial_state": None}
    options |= {"output_final_state": False, "cu_seqlens": None, "padding_mask": None, "gate_form": "stable"}
    with pytest.raises(ValueError, match="float64"):
        chunk_gated_triton(*x.values(), **options, chunk_size=16)
    with pytest.raises(ValueError, match="chunk_size"):
        chunk_gated_triton(*(value.float().to(DEVICE) for value in x.values()), **options, chunk_size=24)


@pytest.mark.parametrize("gate", ["none", "query", "channel"])
def test_registered_as_torch_wants_it(gate):
    x = {name: value.float().to(DEVICE).requires_grad_() for name, value in make(t=20, gate=gate, hq=2).items()}
    arguments = (x["q"], x["k"], x["v"], x.get("g"), None, None, None, 0, 0, 20, 1.0, True, False, 16)
    torch.library.opcheck(torch.ops.lizard_ops.gated_chunk.default, arguments)


@pytest.mark.parametrize("gate", ["key", "channel"])
def test_compiles_to_one_graph_and_follows_autocast(gate):
    x = {name: value.float().to(DEVICE).requires_grad_() for name, value in make(t=20, gate=gate).items()}

    def attend(q, k, v, g):
        o, final, log_mass = chunk_gated_triton(
            q, k, v, g, scale=1.0, normalize=True, window_offset=4, anchors=2, initial_state=None,
            output_final_state=True, cu_seqlens=None, padding_mask=None, gate_form="stable", chunk_size=None,
        )  # fmt: skip
        return o, final.s, log_mass[:, 6:]

    torch.compiler.reset()
    plain, compiled = attend(*x.values()), torch.compile(attend, fullgraph=True, backend="aot_eager")(*x.values())
    gradients = [torch.autograd.grad(sum(y.sum() for y in found), list(x.values())) for found in (plain, compiled)]
    for a, b in zip(plain + gradients[0], compiled + gradients[1], strict=True):
        assert torch.equal(a, b)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert attend(*x.values())[0].dtype == torch.float16


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("low, step", [(0.02, 2.0), (0.02, 30.0), (0.02, 40.0), (0.02, 100.0), (1.0, 0.0)])
def test_channel_gates_stay_within_their_own_bound(low, step, seed):
    """docs/trust.md: a decay is a quotient of two since the chunk's start, each off by a GPU's exp2: ten roundings.

    Twenty in numerator and denominator, and as many for sums over rows.
    """
    bound = 40 * 2.0**-24
    torch.manual_seed(seed)
    q, k, v, do = (torch.rand(1, 64, 1, 16, device=DEVICE) for _ in range(4))
    v, do, g = v - 0.5, do - 0.5, -low * torch.rand(1, 64, 1, 16, device=DEVICE)
    g[:, 32] -= step

    def run(dtype, impl):
        x = [t.to(dtype).requires_grad_() for t in (q, k, v, g)]
        o = chunk_gated_attn(*x, impl=impl)[0]
        return [o.detach(), *torch.autograd.grad((o * do.to(dtype)).sum(), x)]

    for found, exact in zip(run(torch.float32, "triton"), run(torch.float64, "torch"), strict=True):
        assert (found - exact).abs().max() <= bound * exact.abs().max()


def test_weak_channel_gates_after_strong_ones_keep_their_digits():
    """A decay near 1 is a quotient of two factors near exp(-38), whose logs are rounded by more than its own is."""
    x = make(t=64, gate="channel")
    x["g"] = x["g"] * 0.1
    x["g"][:, :20] -= 1.9
    compare(x, chunk=64, normalize=False)


@pytest.mark.parametrize("seed", range(3))
def test_half_precision_gradients_of_sinks_stay_within_their_own_bound(seed):
    """docs/trust.md: the row term do.o is formed of an o that is rounded to half, so d sinks has that rounding."""
    torch.manual_seed(seed)
    q, k, v, do = (torch.randn(1, 40, 2, 16, device=DEVICE).half() for _ in range(4))
    sinks = torch.randn(2, 2, device=DEVICE)

    def run(dtype, impl):
        leaf = sinks.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        o = window_attn(q.to(dtype), k.to(dtype), v.to(dtype), 9, sinks=leaf, impl=impl)[0]
        return torch.autograd.grad((o.double() * do.double()).sum(), leaf)[0]

    found, exact = run(torch.float16, "triton"), run(torch.float64, "torch")
    assert (found - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()
