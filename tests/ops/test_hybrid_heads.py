"""Heads before RoPE in one call: the bits of the ops that it stands for, and who goes through these."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import checked, chunk_hybrid_attn, hybrid_heads, project_both, rotary_both
from lizard_ops.hybrid_attn import heads
from lizard_ops.hybrid_attn.triton import op

B, T, HQ, HK, D, F = 1, 9, 2, 1, 8, 6
MERGE = dict(mix="merge", coverage="outside", feature_map="softmax", anchors=2, impl="triton")
FORMS = {
    "merge": MERGE,
    "sum": dict(coverage="all", feature_map="softmax", softcap=5.0, impl="triton"),
    "absolute": MERGE | dict(merge_mass="absolute", scale=0.3, anchors=0),
}


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    monkeypatch.setattr(heads, "_known", {})


def inputs(dtype=torch.float32, biased=True, gates=HK, requires=()):
    torch.manual_seed(0)
    joined = torch.randn(B, T, (HQ + 2 * HK) * D, device=DEVICE).to(dtype)  # as of one product
    q, k, v = (t.unflatten(-1, (-1, D)) for t in joined.split([HQ * D, HK * D, HK * D], -1))
    angles = torch.randn(1, T, D // 2, device=DEVICE).repeat(1, 1, 2)
    given = dict(q=q, k=k, v=v, query_map=torch.randn(1, D, F, device=DEVICE))
    given |= dict(key_map=torch.randn(HK, D, F, device=DEVICE), cos=angles.cos(), sin=angles.sin())
    given |= dict(g=-torch.rand(B, T, gates, device=DEVICE))
    given |= dict(merge_bias=torch.randn(B, T, HQ, device=DEVICE) if biased else None)
    return {n: x.detach().requires_grad_() if n in requires else x for n, x in given.items()}


def one_by_one(q, k, v, query_map, key_map, cos, sin, g, window, merge_bias=None, **choices):
    impl = choices["impl"]
    q, k, fq, fk = project_both(q, k, query_map, key_map, reuse_gradient=True, impl=impl)
    q, k = rotary_both(q, k, cos, sin, impl=impl)
    return chunk_hybrid_attn(q, k, v, fq, fk, g, window, merge_bias=merge_bias, **choices)


def fields(found):
    o, state = found
    return [o, *(x for x in state or () if x is not None)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("final", [False, True])
def test_the_bits_of_the_ops(form, final, monkeypatch):
    dtype = torch.float16 if final else torch.float32
    given, choices = inputs(dtype, biased=form != "sum"), FORMS[form] | {"output_final_state": final}
    wanted = fields(one_by_one(**given, window=3, **choices))
    assert same(fields(hybrid_heads(**given, window=3, **choices)), wanted)
    monkeypatch.setattr(heads, "chunk_hybrid_attn", pytest.fail)
    for _ in range(5 if DEVICE == "cuda" else 1):  # the fourth is launched at once
        assert same(fields(hybrid_heads(**given, window=3, **choices)), wanted)
    given["g"] = given["g"] + 2
    with checked(), pytest.raises(ValueError, match="g: got"):
        hybrid_heads(**given, window=3, **choices)


@pytest.mark.parametrize(
    ("form", "requires"),
    [
        ("merge", ("q", "k", "v", "query_map", "key_map", "g", "merge_bias")),
        ("merge", ("query_map", "key_map", "g", "merge_bias")),  # as in stage 1
        ("sum", ("q", "k", "v", "g")),
    ],
)
def test_the_gradients_of_the_ops(form, requires, monkeypatch):
    dtype = (
        torch.float16 if len(requires) == 7 else torch.float32
    )  # in which both projections' gradients are one launch
    given = inputs(dtype, biased=form != "sum", requires=requires)
    leaves = [given[name] for name in requires]
    draw = torch.randn(B, T, HQ, D, device=DEVICE).to(dtype)
    wanted = torch.autograd.grad(one_by_one(**given, window=3, **FORMS[form])[0], leaves, draw)
    hybrid_heads(**given, window=3, **FORMS[form])
    monkeypatch.setattr(heads, "chunk_hybrid_attn", pytest.fail)
    for graph in (False, True) if form == "merge" else (False,):
        o, state = hybrid_heads(**given, window=3, **FORMS[form])
        assert state is None and same(torch.autograd.grad(o, leaves, draw, create_graph=graph), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_window_has_no_backward_where_heads_need_none(dtype, monkeypatch):
    """As in stage 1, which trains what is not in the window; in float32 its sums are in the gradient of the merge."""
    requires = ("query_map", "key_map", "g", "merge_bias")
    given = inputs(dtype, requires=requires)
    leaves = [given[name] for name in requires]
    draw = torch.randn(B, T, HQ, D, device=DEVICE).to(dtype)
    wanted = torch.autograd.grad(one_by_one(**given, window=3, **MERGE)[0], leaves, draw)
    hybrid_heads(**given, window=3, **MERGE)
    monkeypatch.setattr(op, "window_keys", pytest.fail)
    if dtype == torch.float16:
        monkeypatch.setattr(op, "window_queries", pytest.fail)
    found = torch.autograd.grad(hybrid_heads(**given, window=3, **MERGE)[0], leaves, draw)
    assert same(found, wanted)


def test_second_derivatives_are_refused():
    given = inputs(requires=("q", "key_map"))
    for _ in range(2):
        o, _ = hybrid_heads(**given, window=3, **MERGE)
        (first,) = torch.autograd.grad(o.square().sum(), given["q"], create_graph=True)
        with pytest.raises(ValueError, match="second derivative"):
            first.sum().backward()


@pytest.mark.parametrize(
    "changes",
    [
        {"impl": "torch"},
        {"padding_mask": torch.ones(B, T, dtype=torch.bool, device=DEVICE)},
        {"merge_bias": torch.zeros(HQ, device=DEVICE)},
        {"sinks": torch.zeros(HQ, 1, device=DEVICE)},
        {"g": -torch.rand(B, T, device=DEVICE)},
        {"kept_keys": [0]},
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_other_calls_go_through_the_ops(changes, monkeypatch):
    given, calls = inputs() | {"window": 3} | MERGE | changes, []
    monkeypatch.setattr(heads, "chunk_hybrid_attn", lambda *a, **k: calls.append(1) or chunk_hybrid_attn(*a, **k))
    refused = "kept_keys" in changes
    for _ in range(2):
        if refused:
            with pytest.raises(ValueError, match="kept_keys"):
                hybrid_heads(**given)
        else:
            assert same(fields(hybrid_heads(**given)), fields(one_by_one(**given)))
    assert len(calls) == 2 and not heads._known


def test_what_torch_watches_goes_through_the_ops(monkeypatch):
    given = inputs()
    wanted = hybrid_heads(**given, window=3, **MERGE)[0]
    assert len(heads._known) == 1
    monkeypatch.setattr(heads, "_known", dict.fromkeys(heads._known, None))  # no call may take it
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(hybrid_heads(**given, window=3, **MERGE)[0], wanted)


def test_saved_tensors_may_come_back_with_other_strides():
    def gradients():
        given = inputs(requires=("q", "k", "v", "query_map", "key_map", "g", "merge_bias"))
        o, _ = hybrid_heads(**given, window=3, **MERGE)
        return torch.autograd.grad(o.square().sum(), [x for x in given.values() if x.requires_grad])

    wanted = gradients()
    assert same(gradients(), wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        found = [gradients() for _ in range(2)]
    assert same(found[0], wanted) and same(found[1], wanted)
    assert same(gradients(), wanted)


@pytest.mark.parametrize("most", [256, 1], ids=["remembered", "forgotten"])
def test_calls_of_one_kind_save_the_same(most, monkeypatch):
    """The first too: a layer under gradient checkpointing is called in the forward and once more in the backward."""
    monkeypatch.setattr(heads, "MOST", most)
    given = inputs(requires=("q", "k", "v", "query_map", "key_map", "g", "merge_bias"))
    leaves = [x for x in given.values() if x is not None and x.requires_grad]

    def layer(**given):
        return hybrid_heads(**given, window=3, **MERGE)[0]

    wanted = torch.autograd.grad(one_by_one(**given, window=3, **MERGE)[0].square().sum(), leaves)
    for again in (False, True):
        if again:
            layer(**given)
        o = torch.utils.checkpoint.checkpoint(layer, **given, use_reentrant=False)
        if most == 1:  # another kind takes its place
            hybrid_heads(**inputs(biased=False), window=3, **FORMS["sum"])
        found = torch.autograd.grad(o.square().sum(), leaves)
        assert same(found, wanted), again
