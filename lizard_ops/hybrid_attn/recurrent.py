"""Both branches one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.checks import window_state_shapes
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState, overwrite
from lizard_ops.common.steps import blank_state, take_at, where_active
from lizard_ops.gated_attn.recurrent import blank_linear_state, linear_step
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.window_attn.recurrent import window_step


def recurrent_hybrid_torch(
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
    inplace: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``recurrent_hybrid_attn``, whose arguments come here checked.

    With ``inplace`` one token a row updates the state where it lies; padding, packing and other lengths work on copies
    and overwrite it at the end.
    """
    weight = alpha if mix == "sum" else merge_bias
    token_weight = weight if weight is not None and weight.ndim == 3 else None  # moves with the rows
    offset = window if coverage == "outside" else 0
    direct = inplace and q.shape[1] == 1 and cu_seqlens is None and padding_mask is None

    def op(rows, lengths, state):
        q, k, v, fq, fk, g, by_token = rows
        if state is None:
            local = blank_state(k, window_state_shapes(q.shape[0], k, v, window, anchors), {})
            linear = blank_linear_state(fq, fk, v, g, offset, feature_map)
            state = AttentionState._make(b if a is None else a for a, b in zip(local, linear, strict=True))
        outputs = []
        for t in range(q.shape[1]):
            leaving_v = take_at(state.ring_v, state.position % window) if offset else None
            o_win, lse, row_max, local = window_step(
                q[:, t], k[:, t], v[:, t], state,
                window=window, anchors=anchors, sinks=sinks, sink_form=sink_form, scale=scale,
                softcap=softcap,
                inplace=direct,
            )  # fmt: skip
            shared = (local["ring_v"], leaving_v) if offset else None
            o_lin, log_mass, linear = linear_step(
                fq[:, t], fk[:, t], v[:, t], None if g is None else g[:, t], state, feature_map=feature_map,
                scale=feature_scale, normalize=normalize, offset=offset, anchors=anchors, shared=shared,
                inplace=direct,
            )  # fmt: skip
            o = mixed(
                o_lin, log_mass, o_win, lse, row_max,
                mix=mix, weight=weight if by_token is None else by_token[:, t], merge_mass=merge_mass,
            )  # fmt: skip
            active = None if lengths is None else t < lengths
            position = state.position.add_(1) if direct else state.position + 1
            new = state._replace(position=position, **(local | linear))
            state = where_active(active, new, state)
            outputs.append(o)
        return [torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])], state

    rows = (q, k, v, fq, fk, g, token_weight)
    (o,), state = over_rows(op, rows, (0.0,), initial_state, cu_seqlens, padding_mask)
    if inplace and not direct:
        assert initial_state is not None and state is not None
        state = overwrite(initial_state, state)
    return o.to(q.dtype), state if output_final_state else None
