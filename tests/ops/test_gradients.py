"""Gradients of the PyTorch paths against finite differences in float64, those of states in and out included."""

from __future__ import annotations

import pytest
import torch
from op_cases import Case, call, cases, state_in
from op_checks import examples, one_of

from lizard_ops import AttentionState, window_attn

CARRIED = ("s", "z", "ring_k", "ring_v", "ring_fk", "ring_g", "anchor_k", "anchor_v")


def differentiable(case: Case, form: str, past: Case):
    """The op as a function of tensors alone, and the tensors: inputs, weights and the carried state's fields."""
    names = list(case.leaves())
    state = state_in(call(past, "naive"))
    fields = [name for name in CARRIED if getattr(state, name) is not None]

    def function(*tensors: torch.Tensor):
        given = dict(zip(names + fields, tensors, strict=True))
        now = case.map(lambda name, _: given[name], weights=True)
        carried = AttentionState(state.position, log_scale=state.log_scale, **{name: given[name] for name in fields})
        found = call(now, form, carried)
        if "state.log_scale" in found:  # sums and their scale mean something together only
            scale = found["state.log_scale"].exp()
            found |= {
                "state.s": found["state.s"] * scale[..., None, None],
                "state.z": found["state.z"] * scale[..., None],
            }
        kept = [x for name, x in found.items() if x.requires_grad and name not in ("log", "state.log_scale")]
        return tuple(kept) + ((found["log"].masked_fill(found["log"] == -torch.inf, 0.0),) if "log" in found else ())

    inputs = [*case.leaves().values(), *(getattr(state, name) for name in fields)]
    return function, [x.detach().clone().requires_grad_() for x in inputs]


FORMS = [(op, form) for op in ("gated", "window", "hybrid") for form in ("chunk", "recurrent", "naive")]


@pytest.mark.parametrize("op, form", [pair for pair in FORMS if pair != ("window", "recurrent")])
def test_gradients_are_those_of_finite_differences(op, form, small_sizes):
    sizes = {"B": 1, "T": 6, "K": 2, "V": 2, "Fp": 2, "window": 2, "offset": 1, "Hk": 1, "G": 2, "decay": 0.5}
    sizes |= {"chunk_size": None}

    @examples(6, cases(op, **sizes))
    def check(case):
        if case.options.get("feature_map") == "identity" or op == "gated" and case.options["normalize"]:
            case = case.map(
                lambda name, x: x.abs() + 0.1 if name in ("fq", "fk") or op == "gated" and name != "g" else x
            )
        case = case.map(lambda name, x: x - 0.1 if name == "g" else x)  # away from 0, which steps must not cross
        function, inputs = differentiable(case, form, past=case.map(lambda _, x: 0.9 * x.flip(1)))
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.fixture
def small_sizes(monkeypatch):
    from lizard_ops.gated_attn import chunk_torch, chunk_torch_tiles

    monkeypatch.setattr(chunk_torch, "HEAD_GATE_CHUNK", 2)
    monkeypatch.setattr(chunk_torch, "CHANNEL_GATE_CHUNK", 2)
    monkeypatch.setattr(chunk_torch_tiles, "SCAN", 2)


ROWS = {"plain": {}, "padded": {"B": 2}, "packed": {}}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "op, form", [("gated", "chunk"), ("window", "chunk"), ("hybrid", "chunk"), ("hybrid", "recurrent")]
)
def test_second_derivatives_are_those_of_finite_differences(op, form, rows, small_sizes):
    sizes = {"B": 1, "T": 5, "K": 2, "V": 2, "Fp": 2, "window": 2, "offset": 1, "Hk": 1, "G": 2, "decay": 0.5}
    sizes |= {"chunk_size": None} | ROWS[rows]
    more = {
        "plain": {},
        "padded": {"padding_mask": torch.tensor([[False, True, True, False, True], [True, True, True, True, False]])},
        "packed": {"cu_seqlens": torch.tensor([0, 2, 5])},
    }[rows]

    @examples(3, cases(op, **sizes))
    def check(case):
        if case.options.get("feature_map") == "identity" or op == "gated" and case.options["normalize"]:
            case = case.map(
                lambda name, x: x.abs() + 0.1 if name in ("fq", "fk") or op == "gated" and name != "g" else x
            )
        case = case.map(lambda name, x: x - 0.1 if name == "g" else x)
        past = case.map(lambda _, x: 0.9 * torch.cat([x, x.flip(1), x], 1))  # long enough for sums that are not empty
        past.options = case.options | ({"cu_seqlens": torch.tensor([0, 7, 15])} if rows == "packed" else {})
        case.options = case.options | more | ({"softcap": 1.5} if op != "gated" and len(case.weights) == 1 else {})
        function, inputs = differentiable(case, form, past=past)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


def test_the_curvature_of_one_softmax_is_that_of_its_formula():
    """d2 o / d q1^2 of two keys, by hand: p (1 - p) (1 - 2 p) (k1 - k0)^2 (v1 - v0) with p the weight of key 1."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([1.0, 2.0], [0.5, -1.0], [1.0, 3.0]))
    q.requires_grad_()
    first = torch.autograd.grad(window_attn(q, k, v, 2, scale=1.0)[0][0, 1].sum(), q, create_graph=True)[0]
    second = torch.autograd.grad(first[0, 1].sum(), q)[0][0, 1].item()
    p = torch.sigmoid(torch.tensor(2.0 * (-1.0 - 0.5), dtype=torch.float64)).item()
    assert abs(second - p * (1 - p) * (1 - 2 * p) * 1.5**2 * 2.0) < 1e-12


@pytest.mark.parametrize(
    "rows, length", [(rows, n) for rows in ("plain", "padded", "packed") for n in (0, 1, 4) if n or rows != "packed"]
)
@pytest.mark.parametrize(
    "op, form",
    [("gated", "chunk"), ("gated", "recurrent"), ("hybrid", "chunk"), ("hybrid", "recurrent"), ("window", "chunk")],
)
def test_every_input_has_a_gradient_where_no_key_is_eligible(op, form, rows, length):
    """Zeros, not none: what trains in several processes waits for every parameter's gradient."""
    sizes = {"B": 1, "T": length, "window": 4, "offset": 5, "sinks": True, "chunk_size": None, "coverage": "outside"}
    more = {} if rows == "plain" else {"padding_mask": torch.ones(1, length, dtype=torch.bool)}
    more = {"cu_seqlens": torch.tensor([0, 1, length])} if rows == "packed" else more

    @examples(4, cases(op, **sizes, weight="head"))
    def check(case):
        leaves = {name: x.clone().requires_grad_() for name, x in case.leaves().items()}
        found = call(case.map(lambda name, _: leaves[name], weights=True), form, **more)
        grads = torch.autograd.grad(found["o"].sum(), list(leaves.values()), allow_unused=True)
        for (name, x), d in zip(leaves.items(), grads, strict=True):
            assert d is not None and d.shape == x.shape, name
            if name in ("fq", "fk", "g") or op == "gated":
                assert not d.any(), name


@pytest.mark.parametrize("zero, at", [("q", [3]), ("k", [0]), ("k", [0, 3]), ("k", [0, 1, 2, 3, 4, 5])])
@pytest.mark.parametrize("form", ["chunk", "recurrent", "naive"])
def test_zero_features_have_gradients_of_the_size_of_the_others(zero, at, form):
    case = one_of(cases("gated", B=1, T=6, K=3, V=3, normalize=True, gate="key", anchors=0, offset=0, decay=0.5))
    leaves = {name: x.clone() for name, x in case.leaves().items()}
    leaves[zero][:, at] = 0.0
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    found = call(case.map(lambda name, _: leaves[name]), form)["o"]
    for name, d in zip(leaves, torch.autograd.grad(found.square().sum(), list(leaves.values())), strict=True):
        assert d.isfinite().all() and d.abs().max() < 1e3, name
