"""The step of one text on a CPU: a single row, whose position Python knows, with few operators and no masks.

What the general step looks up, hides and fills by the position (slots that hold a key, anchors that left the window,
whether a key joins the sums) is here a slice or a branch, and every product is over the key heads with the query heads
of a group as rows. The sums and the window are joined without log-masses: with w the softmax weights of the exact keys
and w* the largest of those in window and anchors, lse - m = -log w*.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lizard_ops.common.checks import has_values, work_dtype
from lizard_ops.common.direct import is_watched
from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.state import AttentionState
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions

HELD = ("s", "z", "ring_k", "ring_v", "ring_fk")  # by every state that a step here takes


def takes_one_text(inputs: HybridInputs, options: HybridOptions) -> bool:
    """Whether ``one_text_step`` has this call, which comes checked, with a state that may be overwritten."""
    q, g, state = inputs.q, inputs.g, inputs.initial_state
    if q.shape[:2] != (1, 1) or q.device.type != "cpu" or state is None or is_watched():
        return False
    if inputs.cu_seqlens is not None or inputs.padding_mask is not None or inputs.scores is not None:
        return False
    kinds = options.coverage == "outside" and options.mix == "merge" and options.feature_map in ("identity", "softmax")
    if not kinds or inputs.sinks is not None or (g is not None and (g.ndim != 3 or g.shape[2] > inputs.k.shape[2])):
        return False
    work = work_dtype(q)
    held = (*(getattr(state, name) for name in HELD), state.anchor_k, state.anchor_v, state.ring_g)
    alike = all(x.dtype == work for x in (q, inputs.k, inputs.v, inputs.fq, inputs.fk, *held) if x is not None)
    return alike and has_values(state.position) and not has_gradients(inputs)


def has_gradients(inputs: HybridInputs) -> bool:
    """Whether a graph is recorded, in which nothing may be overwritten."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors())


def one_text_step(inputs: HybridInputs, options: HybridOptions) -> Tensor:
    """o [1, 1, Hq, V] of the next token. The state, position included, is overwritten."""
    state = inputs.initial_state
    assert state is not None and state.s is not None and state.z is not None and state.ring_fk is not None
    assert state.ring_k is not None and state.ring_v is not None
    window, anchors, position = options.window, options.anchors, int(state.position)
    heads, slot = inputs.k.shape[2], position % window
    k, v, fk = inputs.k[0, 0], inputs.v[0, 0], inputs.fk[0, 0]  # [Hk, ...]
    old_k, old_v, old_fk = state.ring_k[0, slot], state.ring_v[0, slot], state.ring_fk[0, slot]

    joins = position >= window + anchors  # the key that leaves the window is no anchor
    if joins:
        phi = features(torch.cat([inputs.fq[0, 0], old_fk]), options.feature_map)  # [Hq + Hk, F]
        queries, phi_k = phi[:-heads].unflatten(0, (heads, -1)), phi[-heads:]
        s, z = state.s[0], state.z[0]
        if state.ring_g is not None:
            kept = state.ring_g[0, slot].exp().unsqueeze(-1)  # [Hg, 1]
            s.mul_(kept.unsqueeze(-1))
            torch.addcmul(phi_k, z, kept, out=z)
        else:
            z.add_(phi_k)
        s.addcmul_(phi_k.unsqueeze(-1), old_v.unsqueeze(1))
    for old, new in ((old_k, k), (old_v, v), (old_fk, fk)):
        old.copy_(new)
    if position < anchors:
        assert state.anchor_k is not None and state.anchor_v is not None
        state.anchor_k[0, position].copy_(k)
        state.anchor_v[0, position].copy_(v)
    if state.ring_g is not None:
        assert inputs.g is not None
        state.ring_g[0, slot].copy_(inputs.g[0, 0])
    state.position.add_(1)

    o, weights, scores = near(inputs.q, state, options, position)
    if not joins:
        return o.view(1, 1, -1, o.shape[-1])
    sums, mass = queries @ s, queries @ z.unsqueeze(-1)  # [Hk, G, V] and [Hk, G, 1]
    top = weights.amax(-1, keepdim=True)
    tiny = torch.finfo(mass.dtype).tiny
    log = torch.nn.functional.threshold(mass, tiny, 0.0).mul_(top).log_()
    if state.ring_g is not None:
        log += state.ring_g[0].sum(0).view(-1, 1, 1)
    if options.feature_scale != 1:
        log += math.log(options.feature_scale)
    if options.merge_mass == "absolute":
        log -= scores.amax(-1, keepdim=True)
    if inputs.merge_bias is not None:
        log += inputs.merge_bias.view(heads, -1, 1)
    return torch.lerp(o, sums.div_(mass.clamp_(min=tiny)), log.sigmoid_()).view(1, 1, -1, o.shape[-1])


def near(q: Tensor, state: AttentionState, options: HybridOptions, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """(o [Hk, G, V], weights, scores [Hk, G, M]) of window and anchors, which hold the token at ``position``."""
    assert state.ring_k is not None and state.ring_v is not None
    window = options.window
    seen, far = min(position + 1, window), min(options.anchors, max(position - window + 1, 0))
    queries = q.view(state.ring_k.shape[2], -1, q.shape[3]) * options.scale
    scores = queries @ state.ring_k[0, :seen].permute(1, 2, 0)
    if far:
        assert state.anchor_k is not None
        scores = torch.cat([scores, queries @ state.anchor_k[0, :far].permute(1, 2, 0)], -1)
    scores = soft_capped(scores, options.softcap)
    weights = scores.softmax(-1)
    o = weights[..., :seen] @ state.ring_v[0, :seen].transpose(0, 1)
    if far:
        assert state.anchor_v is not None
        o.baddbmm_(weights[..., seen:], state.anchor_v[0, :far].transpose(0, 1))
    return o, weights, scores


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi of x [H, Fp]: [H, F]."""
    if feature_map == "identity":
        return x
    return (x.unsqueeze(1) * signs(x.dtype)).softmax(-1).flatten(1)


@functools.cache
def signs(dtype: torch.dtype) -> Tensor:
    """1 and -1, [2, 1]."""
    with torch.inference_mode(False):
        return torch.tensor([[1.0], [-1.0]], dtype=dtype)
