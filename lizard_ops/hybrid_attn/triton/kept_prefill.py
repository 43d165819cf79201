"""The hybrid kernels for kept keys between states, as operators of torch.library.

Rows of keys are those of a carried state, its kept ones in order of position and its ring, before the new ones.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.streams import Layout, layout_of
from lizard_ops.hybrid_attn.triton.fwd import hybrid_output
from lizard_ops.hybrid_attn.triton.kept_gates import entering_gates
from lizard_ops.hybrid_attn.triton.kept_index import entering, index_of
from lizard_ops.hybrid_attn.triton.kept_op import described
from lizard_ops.hybrid_attn.triton.op import empty
from lizard_ops.hybrid_attn.triton.state import chunk_states, running_gates
from lizard_ops.hybrid_attn.triton.units import unit_gates


@torch.library.custom_op("lizard_ops::hybrid_kept_prefill", mutates_args=())
def kept_prefill(
    q: Tensor,  # [B, T, Hq, D]
    k: Tensor,  # [B, rows, Hk, D]
    v: Tensor,  # [B, rows, Hk, V]
    fq: Tensor,  # [B, T, Hq, Fp]
    fk: Tensor,  # [B, rows, Hk, Fp] if outside, else [B, T, Hk, Fp]
    g: Tensor | None,  # [B, T, Hg]
    weight: Tensor | None,  # alpha or merge bias [B, T, Hq] float32
    sink: Tensor | None,  # [Hq] log of the sink mass
    anchor_k: Tensor | None,  # [B, A, Hk, D]; None: the first rows
    anchor_v: Tensor | None,
    s: Tensor | None,  # [B, Hs, F, V]
    z: Tensor | None,  # [B, Hs, F]
    log_scale: Tensor | None,  # [B, Hs] of s and z
    past: Tensor | None,  # [B, Hs, rows - T] of the carried keys, as ``past_of`` gives it
    position: Tensor | None,  # [B] of the first query; None: 0, and no carried state
    lengths: Tensor | None,  # [B] tokens of right-padded rows
    expiry: Tensor,  # [B, rows, Hk] int64 from the first query on, -1 for what is no key
    kept_keys: int,
    window: int,
    anchors: int,
    outside: bool,
    late: bool,
    mix: str,  # "sum", "absolute" or "relative"
    normalize: bool,
    feature_map: str,
    scale: float,
    feature_scale: float,
    softcap: float | None,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final s, final z, their log scale); the last three are empty without ``final``, the log without any."""
    x, options, shape, stream = described(locals() | {"cu_seqlens": None})
    prefix = expiry.shape[1] - q.shape[1]
    stream = stream._replace(prefix=prefix, start=prefix)
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        index = index_of(expiry, kept_keys, stream, shape, late or not outside)
        linear_v, end_log = None, empty(q, 0)
        if outside:
            fk, linear_v = entering(fk, index.source, stream), entering(v, index.source, stream)
            gates, end_log = entering_gates(fk, g, index, stream, shape, past, log_scale)
            rows = stream._replace(position=None, prefix=0, start=0)  # of which none is an anchor
            states = chunk_states(fk, linear_v, gates, x.start, rows, dataclasses.replace(shape, anchors=0), final)
        else:
            if feature_map == "exp":
                gates, end_log = unit_gates(fk, g, log_scale, stream, shape)
            else:
                gates = running_gates(g, stream, shape)
            states = chunk_states(fk, v, gates, x.start, stream, shape, final)
        o, _ = hybrid_output(x, options, states, gates, stream, shape, linear_v, index.kept)
    if states.end_s is None or states.end_z is None:
        return o, empty(q, 0), empty(q, 0), empty(q, 0)
    if outside and g is not None and q.shape[1]:
        lost = lost_sums(gates, layout_of(q, None, None, lengths), shape.chunk)
        end_log = end_log.masked_fill(lost, -math.inf)
        states.end_s.masked_fill_(lost[..., None, None], 0.0)
        states.end_z.masked_fill_(lost[..., None], 0.0)
    return o, states.end_s, states.end_z, end_log


def lost_sums(gates: Tensor, layout: Layout, chunk: int) -> Tensor:
    """[B, Hs] whether no key of a sequence's sums has outlived its last reset, as its last row's log mass tells."""
    batch = layout.length.shape[0]
    of_rows = gates[2].unflatten(0, (batch, -1))
    last = ((layout.length - 1).clamp(min=0) // chunk).view(-1, 1, 1).expand(-1, 1, gates.shape[2])
    lost = of_rows[..., -1].gather(1, last).squeeze(1) == -math.inf
    return lost & (layout.length > 0).unsqueeze(1)


@kept_prefill.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, anchor_k, anchor_v, s, z, log_scale, past, position, lengths, expiry, kept_keys,
    window, anchors, outside, late, mix, normalize, feature_map, scale, feature_scale, softcap, final,
):  # fmt: skip
    _, _, shape, _ = described(locals() | {"cu_seqlens": None})
    end, logs = (q.shape[0], shape.state_heads, shape.features), final and (outside or feature_map == "exp")
    return (
        empty(q, *q.shape[:3], v.shape[3], dtype=q.dtype),
        empty(q, *end, v.shape[3]) if final else empty(q, 0),
        empty(q, *end) if final else empty(q, 0),
        empty(q, *end[:2]) if logs else empty(q, 0),
    )  # fmt: skip
