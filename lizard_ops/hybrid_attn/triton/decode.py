"""The decode step of hybrid attention on the GPU, as an operator that updates the state where it lies."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.direct import direct
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.features import feature_dim
from lizard_ops.common.pages import page_bytes
from lizard_ops.common.sizes import power_of_2
from lizard_ops.common.state import AttentionState, map_fields
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.triton import decode_parts
from lizard_ops.hybrid_attn.triton.decode_kernel import hybrid_decode_kernel
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.softcap import cap_of, units_of
from lizard_ops.tuning import tunable


@tunable("decode", fixed=("warps",))
def config_for(q: Tensor, features: int, v_dim: int) -> Launch:
    """The configuration by dims and dtype, picked on an H200: features of a state tile, ring slots of a score tile.

    A state tile has at least four numbers a thread, lest two threads update one number.
    """
    if q.dtype == torch.float32 or max(q.shape[3], v_dim) > 128:
        return Launch(32, 32, 4, 1, None)
    return Launch(32, 64, 4, 2, 128 if q.dtype == torch.bfloat16 else None)


FIELDS = AttentionState._fields


@functools.lru_cache(maxsize=1024)
def list_starts(places: tuple[int, ...], device: torch.device) -> Tensor:
    """[Hk + 1] int32: where the places of each head begin in the list of all, and where it ends.

    Made once, and so before a CUDA graph is captured, which follows a step that is not.
    """
    return torch.tensor([0, *itertools.accumulate(places)], dtype=torch.int32, device=device)


def in_sixteens(x: Tensor) -> bool:
    """Whether every row of a contiguous tensor, or one in pages, begins at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0


def decode_hybrid_triton(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o [B, 1, Hq, V], state) of one token per row for ``recurrent_hybrid_attn``, whose arguments come here checked.

    One launch for both branches, the mix and the state, behind another where a head has many places. With ``inplace``
    the tensors of the state, which must be contiguous, are overwritten, the position too, so that a CUDA graph of the
    step can be replayed; else copies are. The pages of a pool are always overwritten.
    """
    state, indices = inputs.initial_state, inputs.state_indices
    if not options.inplace and indices is None:
        state = map_fields(lambda x: x.clone(memory_format=torch.contiguous_format), state)
    for name in ("k", "v", "fk"):
        kept, ring = getattr(state, f"kept_{name}"), getattr(state, f"ring_{name}")
        fits = kept is None or kept.dtype == ring.dtype
        checks.want(fits, f"initial_state.kept_{name}", kept, f"the dtype of ring_{name} in a step of the kernel")
    step = direct(hybrid_decode, *inputs.tensors())
    o = step(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        fq=inputs.fq,
        fk=inputs.fk,
        g=inputs.g,
        sinks=inputs.sinks,
        weight=inputs.weight,
        **{name: getattr(state, name) for name in FIELDS},
        window=options.window,
        anchors=options.anchors,
        merge=options.mix == "merge",
        relative=options.merge_mass == "relative",
        outside=options.outside,
        feature_map=options.feature_map,
        normalize=options.normalize,
        scale=options.scale,
        feature_scale=options.feature_scale,
        softcap=options.softcap,
        scores=inputs.scores,
        places=options.kept_keys if isinstance(options.kept_keys, tuple) else None,
        indices=indices,
        page=0 if indices is None else page_bytes(state),
    )
    if step is not hybrid_decode:
        torch.autograd.graph.increment_version([x for x in state if x is not None])
    return o, state if options.output_final_state or indices is not None else None


@torch.library.custom_op("lizard_ops::hybrid_decode", mutates_args=FIELDS)
def hybrid_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    sinks: Tensor | None,
    weight: Tensor | None,
    position: Tensor,
    s: Tensor,
    z: Tensor,
    log_scale: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_fk: Tensor | None,
    ring_g: Tensor | None,
    anchor_k: Tensor | None,
    anchor_v: Tensor | None,
    kept_k: Tensor | None,
    kept_v: Tensor | None,
    kept_fk: Tensor | None,
    kept_g: Tensor | None,
    kept_scores: Tensor | None,
    kept_positions: Tensor | None,
    ring_scores: Tensor | None,
    window: int,
    anchors: int,
    merge: bool,
    relative: bool,
    outside: bool,
    feature_map: str,
    normalize: bool,
    scale: float,
    feature_scale: float,
    softcap: float | None = None,
    scores: Tensor | None = None,
    places: Sequence[int] | None = None,
    indices: Tensor | None = None,
    page: int = 0,
) -> Tensor:
    """One step, in place on the fields of the state; returns o [B, 1, Hq, V]. scores [B, 1, Hk] where keys are kept.

    places: of each key head, where they differ. indices: [B] rows of the state, -1 for nobody; page: bytes from one to
    the next where they are in one storage.
    """
    k, v = k.to(ring_k.dtype), v.to(ring_v.dtype)
    fk = fk if ring_fk is None else fk.to(ring_fk.dtype)
    q, k, v, fq, fk = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, fq, fk))
    g, sinks, weight, scores, indices = (
        None if x is None else x.contiguous() for x in (g, sinks, weight, scores, indices)
    )
    batch, _, heads, dim = q.shape
    key_heads, v_dim, pre = v.shape[2], v.shape[3], fq.shape[3]
    features, group = feature_dim(pre, feature_map), heads // v.shape[2]
    channel, starts = g is not None and g.ndim == 4, None
    most = 0 if kept_scores is None else kept_scores.shape[1]
    if places is not None:
        starts, most = list_starts(tuple(places), q.device), power_of_2(max(places))  # few kernels
    o = q.new_empty(batch, 1, heads, v_dim)
    if batch == 0:
        return o
    config = config_for(q, features, v_dim)
    numbers = units_of(scale, softcap) / math.log(2), cap_of(scale, softcap)
    sizes: dict[str, Any] = {
        "HK": key_heads, "G": group, "D": dim, "V": v_dim, "P": most, "BG": max(16, power_of_2(group)),
        "BD": max(16, power_of_2(dim)), "BV": max(16, power_of_2(v_dim)), "PAGE": page,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    with on_device(q, dim=dim, values=v_dim, features=features):
        part, at_once, *found = decode_parts.NOTHING
        if most > decode_parts.UNDIVIDED:
            kept, each = (kept_k, kept_v, kept_scores, kept_positions), most if places is None else tuple(places)
            part, at_once, *found = decode_parts.in_parts(q, kept, starts, indices, each, numbers, sizes)
        launch_kernel(
            hybrid_decode_kernel, batch * key_heads,
            q, k, v, fq, fk, g, sinks, weight, o,
            position, s, z, log_scale, ring_k, ring_v, ring_fk, ring_g, anchor_k, anchor_v,
            kept_k, kept_v, kept_fk, kept_g, kept_scores, kept_positions, ring_scores, scores, starts, indices,
            *found,
            *(step for x in (q, k, v, fq, fk) for step in (x.stride(0), x.stride(2))),
            heads if weight is not None and weight.ndim == 3 else 0, *numbers, math.log(feature_scale),
            FP=pre, F=features, W=window, A=anchors, M=0 if sinks is None else sinks.shape[1],
            GATES=0 if g is None else g[0, 0].numel(), STATES=s.shape[1] // key_heads, CHANNEL=channel,
            BP=power_of_2(pre), BX=power_of_2(features), BF=config.rows, BN=config.columns, BW=power_of_2(window),
            BM=1 if sinks is None else power_of_2(sinks.shape[1]), OUTSIDE=outside, MAP=feature_map,
            MERGE=merge, RELATIVE=relative, NORMALIZE=normalize, HAS_WEIGHT=weight is not None,
            BA=max(16, power_of_2(anchors + 1)), ROUND=q.dtype == torch.bfloat16,
            SLOTS=window if ring_scores is None else ring_scores.shape[1], BK=power_of_2(max(most, 1)),
            PART=part, BJ=at_once, ALIGNED=most > 0 and all(map(in_sixteens, (ring_k, ring_v, kept_k, kept_v))),
            **sizes, **config.options,
        )  # fmt: skip
    return o


@hybrid_decode.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[3])
