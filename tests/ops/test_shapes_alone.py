"""Tensors that hold no values of their own: on the meta device, fake, or under ``torch.func.vmap``."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lizard_ops as ops

MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}
FINAL = {"output_final_state": True}


def tensors(device):
    def rand(*shape):
        return torch.rand(*shape, device=device)

    x = {"q": rand(2, 9, 4, 4), "k": rand(2, 9, 2, 4), "v": rand(2, 9, 2, 5), "weight": rand(2, 4, 3)}
    x |= {"g": -rand(2, 9, 2), "channels": -rand(2, 9, 2, 4), "cos": rand(2, 9, 4), "logits": rand(6, 7)}
    x |= {"mask": torch.ones(2, 9, dtype=torch.bool, device=device)}
    x |= {name: torch.zeros(n, dtype=torch.int64, device=device) for name, n in (("ends", 3), ("targets", 6))}
    return x


def qkv(x, rows=slice(None)):
    return x["q"][rows], x["k"][rows], x["v"][rows]


WORK = {
    "gated": lambda x: ops.chunk_gated_attn(*qkv(x), x["g"], **FINAL),
    "gated padded": lambda x: ops.chunk_gated_attn(*qkv(x), x["channels"], padding_mask=x["mask"], window_offset=2),
    "gated steps": lambda x: ops.recurrent_gated_attn(*qkv(x), x["g"], **FINAL),
    "window": lambda x: ops.window_attn(*qkv(x), 3, anchors=1, padding_mask=x["mask"], **FINAL),
    "hybrid": lambda x: ops.chunk_hybrid_attn(*qkv(x), x["q"], x["k"], x["g"], 3, **MERGE, **FINAL),
    "hybrid steps": lambda x: ops.recurrent_hybrid_attn(*qkv(x), x["q"], x["k"], x["g"], 3, **MERGE, **FINAL),
    "rotary": lambda x: ops.apply_rotary(x["q"], x["cos"], x["cos"]),
    "projection": lambda x: ops.project_heads(x["q"], x["weight"]),
    "norm": lambda x: ops.rms_norm(x["v"], x["v"][0, 0, 0], 1e-5),
    "losses": lambda x: ops.row_losses(x["logits"], x["logits"] + 1, x["targets"], 1.0, 0.5, 0.1),
}
REFUSED = {
    "cu_seqlens": lambda x: ops.window_attn(*qkv(x, slice(1)), 3, cu_seqlens=x["ends"]),
    "g": lambda x: ops.chunk_gated_attn(*qkv(x), x["g"], gate_form="absorbed"),
    "q": lambda x: ops.naive_window_attn(*qkv(x), 3),
}


def run(op, kind):
    if kind == "meta":
        return op(tensors("meta"))
    with FakeTensorMode():
        return op(tensors("cpu"))


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", WORK)
def test_ops_give_shapes_without_values(name, kind):
    found, wanted = (torch.utils._pytree.tree_leaves(y) for y in (run(WORK[name], kind), WORK[name](tensors("cpu"))))
    for a, b in zip(found, wanted, strict=True):
        assert a is b is None or (a.shape == b.shape and a.dtype == b.dtype)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_values_refuses_tensors_without(name, kind):
    with pytest.raises(ValueError, match=f"{name}: got shape .* wanted a tensor with values"):
        run(REFUSED[name], kind)


@pytest.mark.parametrize("over", ["g", "q", "v"])
@pytest.mark.parametrize("name", ["gated", "gated steps", "window", "hybrid", "hybrid steps"])
def test_vmap_is_a_loop(name, over):
    torch.manual_seed(0)
    x = {name: t.double() if t.is_floating_point() else t for name, t in tensors("cpu").items()}
    many = torch.stack([x[over], 0.5 * x[over], 0.1 * x[over]])

    def op(y):
        return WORK[name](x | {over: y})[0]

    def loss(y):
        return op(y).square().sum()

    for function in (op, torch.func.grad(loss)):
        found, wanted = torch.func.vmap(function)(many), torch.stack([function(y) for y in many])
        torch.testing.assert_close(found, wanted)
