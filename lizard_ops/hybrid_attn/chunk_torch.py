"""Both branches in plain PyTorch, over the same right-padded rows."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import layout_of
from lizard_ops.gated_attn.chunk_torch import linear_rows
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.window_attn.chunk_torch import window_rows


def chunk_hybrid_torch(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``chunk_hybrid_attn``, whose arguments come here checked."""

    def op(x, lengths):
        o_lin, log_mass, linear = linear_rows(x.linear, lengths, options.linear)
        o_win, lse, row_max, local = window_rows(x.local, lengths, options.local)
        o = mixed(
            o_lin, log_mass, o_win, lse, row_max, mix=options.mix, weight=x.weight, merge_mass=options.merge_mass
        )  # fmt: skip
        position = layout_of(x.q, x.initial_state, None, lengths).end
        return [o], AttentionState(position, **(local | linear)) if options.output_final_state else None

    (o,), state = over_rows(op, inputs, (0.0,), options.offset)
    return o.to(inputs.q.dtype), state
