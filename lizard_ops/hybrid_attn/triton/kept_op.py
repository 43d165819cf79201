"""The hybrid kernels for keys with an expiry, as operators of torch.library. There is no state yet.

The window branch is that of every call, and each block of queries goes on over the keys that it has kept. The linear
branch of coverage="outside" runs the kernels of coverage="all" on the keys in the order in which they expire, with the
gates of ``kept_gates.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import taken
from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions, describe
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.fwd import hybrid_output
from lizard_ops.hybrid_attn.triton.kept_gates import KeptShape, entering_gates
from lizard_ops.hybrid_attn.triton.kept_index import Index, empty_index, entering, index_of
from lizard_ops.hybrid_attn.triton.op import empty
from lizard_ops.hybrid_attn.triton.state import chunk_states, running_gates
from lizard_ops.hybrid_attn.triton.units import unit_gates
from lizard_ops.tiles.places import Stream, slot_count

ABSENT = dict.fromkeys(("anchor_k", "anchor_v", "s", "z", "position"))  # what a carried state brings


def described(given: dict[str, Any]) -> tuple[FusedInputs, FusedOptions, FusedShape, Stream]:
    """A call's tensors and choices, and the shape and stream of its linear rows: each query's own."""
    x, options = taken(FusedInputs, ABSENT | given), taken(FusedOptions, given)
    shape, stream = describe(x, options._replace(outside=False))
    if options.outside:
        shape = KeptShape(**vars(shape))
    return x, options, shape, stream


@torch.library.custom_op("lizard_ops::hybrid_kept_forward", mutates_args=())
def kept_forward(
    q: Tensor,  # [B, T, Hq, D]
    k: Tensor,  # [B, T, Hk, D]
    v: Tensor,  # [B, T, Hk, V]
    fq: Tensor,  # [B, T, Hq, Fp]
    fk: Tensor,  # [B, T, Hk, Fp]
    g: Tensor | None,  # [B, T, Hg]
    weight: Tensor | None,  # alpha or merge bias [B, T, Hq] float32
    sink: Tensor | None,  # [Hq] log of the sink mass
    cu_seqlens: Tensor | None,  # [N + 1]
    lengths: Tensor | None,  # [N] tokens of right-padded rows
    expiry: Tensor,  # [B, T, Hk] int64
    kept_keys: int,
    window: int,
    anchors: int,
    outside: bool,
    mix: str,  # "sum", "absolute" or "relative"
    normalize: bool,
    feature_map: str,
    scale: float,
    feature_scale: float,
    softcap: float | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """(o, running gates, masses..., index...)."""
    x, options, shape, stream = described(locals())
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        index = index_of(expiry, kept_keys, stream, shape)
        gates, fk, linear_v = linear_rows(x, options, index, None, stream, shape)
        states = chunk_states(fk, v if linear_v is None else linear_v, gates, None, stream, shape, end=False)
        o, masses = hybrid_output(x, options, states, gates, stream, shape, linear_v, index.kept)
    return o, gates, *masses, *index


def linear_rows(
    x: FusedInputs, options: FusedOptions, index: Index, gates: Tensor | None, stream: Stream, shape: FusedShape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gates, fk and v of the linear rows), v None where it is that of the keys; gates unless they are given."""
    if options.outside:
        fk, v = entering(x.fk, index.source, stream), entering(x.v, index.source, stream)
        return entering_gates(fk, x.g, index, stream, shape) if gates is None else gates, fk, v
    if gates is None:
        exp = options.feature_map == "exp"
        gates = unit_gates(x.fk, x.g, None, stream, shape)[0] if exp else running_gates(x.g, stream, shape)
    return gates, x.fk, None


@kept_forward.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, cu_seqlens, lengths, expiry, kept_keys, window, anchors, outside, mix, normalize,
    feature_map, scale, feature_scale, softcap,
):  # fmt: skip
    _, _, shape, stream = described(locals())
    full = (q.shape[0], q.shape[2], q.shape[1])
    some = full if mix == "relative" else (0,)
    gate_heads = shape.state_heads if shape.keyed else 1 if g is None else g.shape[2]
    return (
        empty(q, *q.shape[:3], v.shape[3], dtype=q.dtype),
        empty(q, 5 if shape.keyed else 3, slot_count(stream, shape.chunk), gate_heads, shape.chunk),
        empty(q, *full), empty(q, *full), empty(q, *some), empty(q, *some, dtype=torch.int32),
        *empty_index(expiry, kept_keys, stream, shape),
    )  # fmt: skip
