"""Both branches in plain PyTorch, over the same right-padded rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.places import each
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import layout_of
from lizard_ops.gated_attn.chunk_torch import linear_rows
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, linear_inputs
from lizard_ops.hybrid_attn.expiring import with_expiries
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.window_attn.chunk_torch import window_rows
from lizard_ops.window_attn.expiring import most_living


def chunk_hybrid_torch(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``chunk_hybrid_attn``, whose arguments come here checked."""

    def op(x, lengths):
        if x.expiry is not None and checks.may_read(x.expiry):
            check_places(x.expiry, lengths, options)
        x, scored = with_expiries(x, lengths, options)
        o_lin, log_mass, linear = linear_rows(linear_inputs(x, options), lengths, options.linear)
        o_win, lse, row_max, local = window_rows(x.local, lengths, options.local)
        o = mixed(
            o_lin, log_mass, o_win, lse, row_max, mix=options.mix, weight=x.weight, merge_mass=options.merge_mass
        )  # fmt: skip
        position = layout_of(x.q, x.initial_state, None, lengths).end
        return [o], AttentionState(position, **(local | linear | scored)) if options.output_final_state else None

    (o,), state = over_rows(op, inputs, (0.0,), options.offset)
    return o.to(inputs.q.dtype), state


def check_places(expiry: Tensor, lengths: Tensor | None, options: HybridOptions) -> None:
    """Right-padded rows keep no more keys alive than there are places, and lose at most one at each query."""
    length = expiry.shape[1]
    row = torch.arange(length, device=expiry.device).view(1, -1, 1)
    is_key = row >= options.anchors if lengths is None else (row >= options.anchors) & (row < lengths.view(-1, 1, 1))
    alive = most_living(expiry.masked_fill(~is_key, 0), options.window)
    places = each(options.kept_keys or 0, expiry.shape[2])
    told = alive if isinstance(options.kept_keys, tuple) else max(alive)
    wanted = f"at least {told}: as many keys of a head are alive beyond the window at one query"
    fits = all(n <= count for n, count in zip(alive, places, strict=True))
    checks.want(fits, "kept_keys", options.kept_keys, wanted)
    leaving = torch.where(is_key & (expiry < length), expiry, length)
    count = expiry.new_zeros(expiry.shape[0], length + 1, expiry.shape[2])  # the last row is of none of these queries
    count.scatter_add_(1, leaving, torch.ones_like(leaving))
    most = int(count[:, :length].max()) if length else 0
    checks.want(most <= 1, "expiry", most, "at most one key of a head that expires at each query (this many do at one)")
