"""What a tensor holds counts, not how it lies in memory: every argument as a strided, permuted or expanded view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DEVICE

import lizard_ops
from lizard_ops import AttentionState, apply_rotary, project_heads, row_losses

B, T, HQ, HK, K, V, F, W, A = 2, 11, 4, 2, 6, 5, 3, 4, 2
ENDS = [0, 4, 4, 11]
MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}
SUM = {"mix": "sum", "coverage": "all", "feature_map": "exp"}


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Every other entry of a larger tensor, from the second on; numbers that nobody may read between them."""
    garbage = float("nan") if x.is_floating_point() else False if x.dtype == torch.bool else -7
    wide = torch.full([2 * n + 1 for n in x.shape], garbage, dtype=x.dtype, device=x.device)
    view = wide[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    return view.copy_(x)


def permuted(x: torch.Tensor) -> torch.Tensor:
    """Axes in the opposite order in memory."""
    axes = list(range(x.ndim))[::-1]
    return contiguous(x.permute(axes)).permute(axes)


def column(x: torch.Tensor) -> torch.Tensor:
    """Beside another tensor, as the columns of a stack."""
    return torch.stack([x, x * 0 - 7 if x.dtype != torch.bool else ~x], -1)[..., 0]


LAYOUTS = {"sliced": sliced, "permuted": permuted, "column": column}
EXPANDED = {"rows": 0, "positions": 1, "channels": -1}


def case(op: str, kind: str, gate: str) -> dict[str, Any]:
    """Tensor arguments of a call; ``kind``: "plain", "padded", "packed" or one of them "carried"."""
    torch.manual_seed(len(op + kind + gate))
    b = 1 if "packed" in kind else B
    t = 1 if op == "decode" else T
    x = {"q": torch.randn(b, t, HQ, K), "k": torch.randn(b, t, HK, K), "v": torch.randn(b, t, HK, V)}
    if op == "gated":
        x |= {"q": x["q"].abs(), "k": x["k"].abs()}
    if op in ("hybrid", "decode"):
        x |= {"fq": torch.randn(b, t, HQ, F), "fk": torch.randn(b, t, HK, F), "weight": torch.randn(b, t, HQ)}
    if op != "gated":
        x["sinks"] = torch.randn(HQ, 3)
    if op != "window":
        channels = K if op == "gated" else 2 * F
        x["g"] = -torch.rand(b, t, *{"token": (), "key": (HK,), "query": (HQ,), "channel": (HK, channels)}[gate])
    if "padded" in kind:
        x["padding_mask"] = torch.rand(b, t) > 0.3
    if "packed" in kind:
        x["cu_seqlens"] = torch.tensor(ENDS, dtype=torch.int32 if gate == "key" else torch.int64)
    return {name: t.to(DEVICE) for name, t in x.items()}


def run(op: str, x: dict[str, Any], options: dict[str, Any], state: AttentionState | None = None):
    """(outputs by name, gradients by name) of the kernels, for cotangents that are views too."""
    leaves = {name: t.detach().requires_grad_(op != "decode") for name, t in x.items() if t.is_floating_point()}
    given = x | leaves
    fields = {}
    if state is not None:
        fields = {f"state.{n}": t for n, t in state._asdict().items() if t is not None}
        leaves |= {n: t.detach().requires_grad_(op != "decode") for n, t in fields.items() if t.is_floating_point()}
        state = AttentionState(**{n.removeprefix("state."): leaves.get(n, t) for n, t in fields.items()})
    if "weight" in given:
        given["merge_bias" if options["mix"] == "merge" else "alpha"] = given.pop("weight")
    name = {
        "gated": "chunk_gated_attn", "window": "window_attn", "hybrid": "chunk_hybrid_attn",
        "decode": "recurrent_hybrid_attn",
    }[op]  # fmt: skip
    extra = {"gated": {"return_log_mass": True}, "window": {"return_lse": True}}.get(op, {})
    o, after, *log = getattr(lizard_ops, name)(
        **given, **options, **extra, initial_state=state, output_final_state=True, impl="triton"
    )
    outputs = {"o": o} | {f"after.{n}": t for n, t in after._asdict().items() if t is not None}
    outputs |= {"log": log[0]} if log else {}
    if op == "decode":
        return outputs, {}
    tracked = [t for t in outputs.values() if t.requires_grad]
    grads = torch.autograd.grad(tracked, list(leaves.values()), [cotangent(t) for t in tracked], allow_unused=True)
    return outputs, dict(zip(leaves, grads, strict=True))


def cotangent(x: torch.Tensor) -> torch.Tensor:
    """Numbers for an output, as a view that is expanded over the last axis."""
    numbers = torch.arange(x[..., 0].numel(), device=x.device, dtype=x.dtype).view(x.shape[:-1]).sin()
    return numbers.unsqueeze(-1).expand_as(x)


# On a GPU a stride that 16 divides is compiled for, and another order of operations rounds otherwise.
TOLERANCE = dict(rtol=1e-5, atol=1e-6) if DEVICE == "cuda" else dict(rtol=0, atol=0)


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name, x in b.items():
            if x is None:
                assert a[name] is None
            else:
                torch.testing.assert_close(a[name], x, **TOLERANCE, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


CASES = [
    ("gated", "packed", "key", {}),
    ("gated", "packed carried", "query", {"anchors": A, "window_offset": W}),
    ("gated", "padded", "channel", {"anchors": A, "window_offset": W}),
    ("window", "packed carried", "token", {"window": W, "anchors": A}),
    ("window", "padded", "key", {"window": W, "softcap": 2.0}),
    ("hybrid", "packed", "key", MERGE | {"window": W, "anchors": A}),
    ("hybrid", "packed carried", "query", MERGE | {"window": W, "anchors": A}),
    ("hybrid", "packed carried", "key", SUM | {"window": W}),
    ("hybrid", "padded", "token", SUM | {"window": W, "anchors": A}),
    ("hybrid", "packed carried", "channel", MERGE | {"window": W, "anchors": A}),
    ("decode", "carried", "query", MERGE | {"window": W, "anchors": A}),
    ("decode", "carried", "channel", SUM | {"window": W}),
]


def state_for(op, kind, gate, options):
    if "carried" not in kind:
        return None
    n = len(ENDS) - 1 if "packed" in kind else B
    past = case("hybrid" if op == "decode" else op, "carried", gate)
    past = {name: torch.cat([x, x])[:n] if x.ndim > 2 or name == "g" else x for name, x in past.items()}
    if "weight" in past:
        past["merge_bias" if options["mix"] == "merge" else "alpha"] = past.pop("weight")
    name = {"gated": "chunk_gated_attn", "window": "window_attn"}.get(op, "chunk_hybrid_attn")
    after = getattr(lizard_ops, name)(**past, **options, output_final_state=True, impl="torch")[1]
    return AttentionState(*(None if x is None else contiguous(x.detach()) for x in after))


@pytest.mark.parametrize("op, kind, gate, options", CASES)
def test_kernels_take_any_layout_of_every_argument(op, kind, gate, options):
    x, state = case(op, kind, gate), state_for(op, kind, gate, options)
    wanted = run(op, x, options, state)
    for change in (sliced, permuted):
        there = {name: change(t) for name, t in x.items()}
        held = None if state is None else AttentionState(*(None if t is None else change(t) for t in state))
        same(run(op, there, options, held), wanted)


@pytest.mark.parametrize("axis", EXPANDED.values(), ids=EXPANDED)
@pytest.mark.parametrize("op, kind, gate, options", [c for c in CASES if "packed" not in c[1]])
def test_kernels_take_expanded_views(op, kind, gate, options, axis):
    def narrow(t):
        return t if t.ndim <= axis else t.narrow(axis, 0, 1).expand_as(t)

    def flat(t):
        return contiguous(narrow(t))

    x, state = case(op, kind, gate), state_for(op, kind, gate, options)
    wanted, found = (
        run(
            op,
            {name: change(t) for name, t in x.items()},
            options,
            None if state is None else AttentionState(*(None if t is None else change(t) for t in state)),
        )
        for change in (flat, narrow)
    )
    same(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_in_place_refuses_a_state_it_cannot_overwrite(layout):
    options = MERGE | {"window": W, "anchors": A}
    x, state = case("decode", "carried", "query"), state_for("decode", "carried", "query", options)
    x["merge_bias"] = x.pop("weight")
    for name, field in state._asdict().items():
        if field is None or (there := LAYOUTS[layout](field)).is_contiguous():
            continue
        with pytest.raises(ValueError, match=rf"initial_state.{name}: got strides"):
            lizard_ops.recurrent_hybrid_attn(
                **x, **options, initial_state=state._replace(**{name: there}), inplace=True
            )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_ops_take_any_layout(layout, impl):
    torch.manual_seed(0)
    change = LAYOUTS[layout]

    def projected(x, weight):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        same_x, y = project_heads(x, weight, impl=impl)
        grads = torch.autograd.grad((same_x, y), (x, weight), (cotangent(same_x), cotangent(y)))
        return {"y": y, "dx": grads[0], "dw": grads[1]}

    def turned(x, cos, sin):
        x = x.detach().requires_grad_()
        y = apply_rotary(x, cos, sin, impl=impl)
        return {"y": y, "dx": torch.autograd.grad(y, x, cotangent(y))[0]}

    x, weight = torch.randn(B, T, HQ, K, device=DEVICE), torch.randn(HK, K, F, device=DEVICE)
    cos, sin = torch.randn(B, T, K, device=DEVICE), torch.randn(B, T, K, device=DEVICE)
    same([projected(change(x), change(weight))], [projected(x, weight)])
    same([turned(change(x), change(cos), change(sin))], [turned(x, cos, sin)])
    wide = cos[:, :1].expand(-1, T, -1)
    same([turned(change(x), wide, wide)], [turned(x, contiguous(wide), contiguous(wide))])

    logits, teacher = torch.randn(5, 9, device=DEVICE), torch.randn(5, 9, device=DEVICE)
    targets = torch.tensor([3, 0, 8, 8, 1], device=DEVICE)
    for scale in (None, 0.5):
        plain, there = logits.clone(), torch.cat([logits, logits + 9], 1)[:, :9]
        wanted = row_losses(plain, teacher, targets, 0.7, 0.4, scale, impl)
        found = row_losses(there, change(teacher), change(targets), 0.7, 0.4, scale, impl)
        same([{"losses": found, "logits": there}], [{"losses": wanted, "logits": plain}])
        one = teacher[:1].expand(5, -1)
        found, wanted = (row_losses(logits.clone(), t, targets, 0.7, 0.4, scale, impl) for t in (one, contiguous(one)))
        same([{"losses": found}], [{"losses": wanted}])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logits_that_share_memory_are_not_overwritten(impl):
    rows = torch.randn(1, 9, device=DEVICE)
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    for shared in (rows.expand(3, 9), torch.randn(11, device=DEVICE).unfold(0, 9, 1)):
        before = shared.clone()
        with pytest.raises(ValueError, match="student: got strides"):
            row_losses(shared, None, targets, 1.0, 0.0, 0.5, impl)
        torch.testing.assert_close(shared, before, rtol=0, atol=0)
        assert row_losses(shared, None, targets, 1.0, 0.0, None, impl).shape == (3,)
