"""Both branches in plain PyTorch, over the same right-padded rows."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import layout_of
from lizard_ops.gated_attn.chunk_torch import linear_rows
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.window_attn.chunk_torch import window_rows


def chunk_hybrid_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    window: int,
    *,
    anchors: int,
    sinks: Tensor | None,
    sink_form: str,
    mix: str,
    alpha: Tensor | None,
    merge_bias: Tensor | None,
    merge_mass: str,
    coverage: str,
    feature_map: str,
    normalize: bool,
    scale: float,
    softcap: float | None,
    feature_scale: float,
    initial_state: AttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    gate_form: str,
) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``chunk_hybrid_attn``, whose arguments come here checked."""
    weight = alpha if mix == "sum" else merge_bias
    token_weight = weight if weight is not None and weight.ndim == 3 else None  # moves with the rows

    def op(rows, lengths, state):
        q, k, v, fq, fk, g, by_token = rows
        offset = window if coverage == "outside" else 0
        o_lin, log_mass, linear = linear_rows(
            fq, fk, v, g, lengths, state, feature_map=feature_map, scale=feature_scale, normalize=normalize,
            offset=offset, anchors=anchors, gate_form=gate_form, chunk_size=None,
        )  # fmt: skip
        o_win, lse, row_max, local = window_rows(
            q, k, v, lengths, state, window=window, anchors=anchors, sinks=sinks, sink_form=sink_form, scale=scale,
            softcap=softcap,
        )  # fmt: skip
        o = mixed(
            o_lin, log_mass, o_win, lse, row_max,
            mix=mix, weight=weight if by_token is None else by_token, merge_mass=merge_mass,
        )  # fmt: skip
        position = layout_of(q, state, None, lengths).end
        return [o], AttentionState(position, **(local | linear)) if output_final_state else None

    rows = (q, k, v, fq, fk, g, token_weight)
    (o,), state = over_rows(op, rows, (0.0,), initial_state, cu_seqlens, padding_mask)
    return o.to(q.dtype), state
