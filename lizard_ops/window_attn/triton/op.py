"""The window kernels as operators of torch.library: allocation, launches, shapes for tracing, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import by_name, differentiable_once, in_order, taken
from lizard_ops.common.sizes import cdiv
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import block_count
from lizard_ops.tiles.softcap import cap_of, units_of
from lizard_ops.tiles.strided import rows_last
from lizard_ops.window_attn.triton.bwd import window_backward_queries_kernel
from lizard_ops.window_attn.triton.bwd_keys import RowStats, key_gradients
from lizard_ops.window_attn.triton.config import WindowCall, WindowNumbers, config_for, sequences_of, shape_arguments
from lizard_ops.window_attn.triton.fwd import window_forward_kernel


def anchor_tile(anchors: int) -> int:
    return 16 if anchors <= 16 else 32


@torch.library.custom_op("lizard_ops::window_attn_forward", mutates_args=())
def window_forward(
    q: Tensor,  # [B, T, Hq, D]
    k: Tensor,  # [B, P + T, Hk, D], or [1, N P + T, Hk, D] with cu_seqlens
    v: Tensor,  # the same with V
    anchor_k: Tensor | None,  # [N, A, Hk, D]; None: the first rows of each sequence (P = 0)
    anchor_v: Tensor | None,
    sinks: Tensor | None,  # [Hq] log of each head's sink mass
    first: Tensor | None,  # [N] position of each sequence's first query; None: 0
    cu_seqlens: Tensor | None,  # [N + 1]
    window: int,
    anchors: int,
    prefix: int,
    scale: float,
    with_max: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse [B, T, Hq], lse less the largest score [B, T, Hq], its column); the last two empty without ``with_max``.

    That difference has digits that a large score would leave neither of the two. A column is numbered by its stream
    row, or -1 - a for anchor a.
    """
    given = locals()
    q, k, v, anchor_k, anchor_v = rows_last(q, k, v, anchor_k, anchor_v)
    kept = {"q": q, "k": k, "v": v, "anchor_k": anchor_k, "anchor_v": anchor_v}
    x, numbers = taken(WindowCall, given | kept), taken(WindowNumbers, given)
    batch, length, heads, _ = q.shape
    o = q.new_empty(batch, length, heads, v.shape[3])
    lse = q.new_empty(batch, length, heads, dtype=torch.float32)
    spread = torch.empty_like(lse) if with_max else lse.new_empty(0)
    arg_max = lse.new_empty(lse.shape if with_max else 0, dtype=torch.int32)
    if o.numel() == 0:
        return o, lse, spread, arg_max
    n, packed, group = sequences_of(q, cu_seqlens), cu_seqlens is not None, heads // k.shape[2]
    config = config_for("forward", q, v, group)
    blocks = block_count(length, n, 0, config.rows, packed, config.heads)
    with on_device(q, dim=q.shape[3], values=v.shape[3]):
        launch_kernel(
            window_forward_kernel, blocks * k.shape[2] * cdiv(group, config.heads),
            q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, o, lse, spread, arg_max,
            *x.strides, length, n, (n - 1).bit_length(),
            units_of(scale, softcap) * LOG2E.value, cap_of(scale, softcap),
            HB=config.heads, BA=anchor_tile(anchors), PACKED=packed, CARRIED=first is not None,
            HAS_SINKS=sinks is not None, WITH_MAX=with_max,
            **shape_arguments(x, numbers, config),
        )  # fmt: skip
    return o, lse, spread, arg_max


@window_forward.register_fake
def _(q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, window, anchors, prefix, scale, with_max, softcap=None):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    spread = torch.empty_like(lse) if with_max else lse.new_empty(0)
    return o, lse, spread, torch.empty_like(spread, dtype=torch.int32)


@torch.library.custom_op("lizard_ops::window_attn_backward", mutates_args=())
def window_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchor_k: Tensor | None,
    anchor_v: Tensor | None,
    sinks: Tensor | None,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    arg_max: Tensor,
    d_o: Tensor,  # [B, T, Hq, V]
    d_lse: Tensor | None,  # [B, T, Hq]
    d_max: Tensor | None,  # [B, T, Hq]
    window: int,
    anchors: int,
    prefix: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d anchor_k, d anchor_v, d sinks); those of absent inputs are empty."""
    given = locals()
    q, k, v, anchor_k, anchor_v = rows_last(q, k, v, anchor_k, anchor_v)
    kept = {"q": q, "k": k, "v": v, "anchor_k": anchor_k, "anchor_v": anchor_v}
    x, numbers = taken(WindowCall, given | kept), taken(WindowNumbers, given)
    d_o = d_o.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    d_max = None if d_max is None else d_max.contiguous()
    (_, length, heads, _), key_heads = q.shape, k.shape[2]
    group = heads // key_heads
    n, packed, carried = sequences_of(q, cu_seqlens), cu_seqlens is not None, first is not None
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dq.numel() == 0:
        d_sinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        zeros = (q.new_empty(0) if t is None else torch.zeros_like(t) for t in (k, v, anchor_k, anchor_v))
        return dq, *zeros, d_sinks
    rows = config_for("queries", q, v, group)
    programs = block_count(length, n, 0, rows.rows, packed, rows.heads) * key_heads * cdiv(group, rows.heads)
    term = torch.empty_like(lse)
    d_sinks = q.new_empty(0) if sinks is None else torch.empty_like(lse)
    steps = (n - 1).bit_length()
    with on_device(q, dim=q.shape[3], values=v.shape[3]):
        launch_kernel(
            window_backward_queries_kernel, programs,
            q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, o, lse, arg_max, d_o, d_lse, d_max,
            dq, term, d_sinks, *x.strides, length, n, steps, scale, cap_of(scale, softcap),
            HB=rows.heads, BA=anchor_tile(anchors), PACKED=packed, CARRIED=carried, HAS_SINKS=sinks is not None,
            HAS_LSE=d_lse is not None, HAS_MAX=d_max is not None,
            **shape_arguments(x, numbers, rows),
        )  # fmt: skip
        has_max = d_max is not None
        stats = RowStats(
            lse=lse, term=term, share=None, arg_max=arg_max if has_max else None, d_max=d_max,
            strides=(length * heads, heads, 1), to_log2=LOG2E.value,
        )  # fmt: skip
        found = key_gradients(x, numbers, d_o, stats, beyond=False)
    if sinks is not None:
        d_sinks = d_sinks.sum((0, 1)).to(sinks.dtype)
    return dq, *found, d_sinks


@window_backward.register_fake
def _(
    q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, o, lse, arg_max, d_o, d_lse, d_max, window, anchors,
    prefix, scale, softcap,
):  # fmt: skip
    def like(x):
        return q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return like(q), like(k), like(v), like(anchor_k), like(anchor_v), like(sinks)


FORWARD = torch.ops.lizard_ops.window_attn_forward.default
# the gradients that ``window_backward`` returns, in its order
DIFFERENTIABLE = ("q", "k", "v", "anchor_k", "anchor_v", "sinks")


def _save(ctx, inputs, output):
    given = by_name(FORWARD, inputs)
    o, lse, _, arg_max = output
    tensors = {name: given[name] for name in WindowCall._fields if name in given}
    tensors |= {"o": o, "lse": lse, "arg_max": arg_max}
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.numbers = {name: given[name] for name in WindowNumbers._fields}
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_lse, d_spread, _):
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    d_max = None
    if d_spread is not None:
        d_lse, d_max = d_spread if d_lse is None else d_lse + d_spread, -d_spread
    d_o = torch.zeros_like(saved["o"]) if d_o is None else d_o
    found = window_backward(**saved, **ctx.numbers, d_o=d_o, d_lse=d_lse, d_max=d_max)
    wanted = {name: grad for name, grad in zip(DIFFERENTIABLE, found, strict=True) if saved[name] is not None}
    return in_order(FORWARD, wanted)


window_forward.register_autograd(_backward, setup_context=_save)
differentiable_once(window_backward, "window_attn")
