"""The state with which a rank's part begins, from what the ranks send each other: two exchanges.

First the edges of the parts: rings and anchors are rows of them. With its ring a rank knows which keys enter the sums
in its part, those between the window's end at its start and that at its end, and sums them; then the sums, the decays
over the parts, and the best keys.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.row_decays import row_decays
from lizard_ops.common.state import AttentionState, map_fields
from lizard_ops.common.streams import Layout, key_stream, spread_to
from lizard_ops.context_parallel.kept import Best, best_of, is_in, kept_fields, one_list, ranked, sent_keys
from lizard_ops.context_parallel.part import Before, Part, PartOptions, Sent, edges_of
from lizard_ops.context_parallel.sums import PartSums, added, behind, prefix, sums_of


def incoming_state(part: Part, options: PartOptions, rank: int) -> Generator[Sent, Sent, AttentionState]:
    """The state before the first token of a part, with padded places; differentiable.

    Yields what this rank sends and wants what all ranks sent, stacked in their order; all of them take the same turns.
    """
    edges = yield edges_of(part, options)
    before = Before.of(edges["lengths"], rank)
    state = AttentionState(before.position)
    rings = {"ring_k": "k", "ring_v": "v", "ring_fk": "fk", "ring_g": "g", "ring_scores": "scores"}
    held = {f: before.ring(edges[name]) for f, name in rings.items() if name in edges and edges[name].shape[2]}
    firsts = {f"anchor_{name}": before.first(edges[f"first_{name}"]) for name in "kv" if f"first_{name}" in edges}
    state = state._replace(**held, **firsts)
    if part.fk is not None:
        state = yield from _with_sums(part, options, state, before)
    return map_fields(Tensor.contiguous, state)


def _with_sums(
    part: Part, options: PartOptions, state: AttentionState, before: Before
) -> Generator[Sent, Sent, AttentionState]:
    """The state with linear sums and kept keys."""
    assert part.fk is not None
    layout = Layout(part.lengths, part.lengths, state.position, None)
    decays, total = _decays(part, options, state, layout)
    is_summed, sent = _leaving(part, options, options.offset, state), Sent()
    if options.places:
        best, sent = _best(part, options, state, layout, decays)
        if options.late:
            is_summed = is_summed & ~is_in(best, part.v.shape[1])
    fk = _entering(part.fk, state.ring_fk, layout)
    v = _entering(part.v, state.ring_v if options.offset else None, layout)
    sums = sums_of(fk, v, _logs(decays, is_summed), options.feature_map, options.logs)
    sent["s"] = sums.s
    sent |= {} if sums.log_scale is None else {"log_scale": sums.log_scale}
    sent |= {} if total is None else {"decay": total}

    got = yield sent
    passed = behind(got["decay"], before.rank) if total is not None else None
    found = prefix(PartSums(got["s"], got.get("log_scale")), passed, before.rank)
    if options.places:
        got |= {name: before.of_earlier(x) for name, x in got.items() if name.startswith("best_")}
        if "best_g" in got and passed is not None:
            since = passed if part.g is not None and part.g.ndim == 4 else passed.squeeze(-1)
            got["best_g"] = got["best_g"].double() + since.unsqueeze(2)
        fields, displaced = kept_fields(got, before.earlier, options)
        state = state._replace(**fields)
        if options.late:
            log = one_list(got["best_g"]) if "best_g" in got else None
            late = _logs(log, displaced)
            found = added(
                found, sums_of(one_list(got["best_fk"]), one_list(got["best_v"]), late, options.feature_map, True)
            )
        if state.kept_g is not None:
            state = state._replace(kept_g=state.kept_g.to(found.s.dtype))
    s, log_scale = found.rounded()
    return state._replace(s=s[..., :-1], z=s[..., -1], log_scale=log_scale)


def _entering(x: Tensor, ring: Tensor | None, layout: Layout) -> Tensor:
    """[B, T, ...]: the rows that leave a window in this part, of x [B, T, ...] and the ring of those before it."""
    return key_stream(x, ring, layout)[:, : x.shape[1]]


def _leaving(part: Part, options: PartOptions, window: int, state: AttentionState) -> Tensor:
    """[B, T, Hk] bool: which of these rows are keys, and do leave."""
    row = torch.arange(part.v.shape[1], device=part.v.device)
    position = (state.position - window).unsqueeze(1) + row
    is_key = (row < part.lengths.unsqueeze(1)) & (position >= options.anchors)
    return is_key.unsqueeze(-1).expand(-1, -1, part.v.shape[2])


def _decays(
    part: Part, options: PartOptions, state: AttentionState, layout: Layout
) -> tuple[Tensor | None, Tensor | None]:
    """(log-decay of the rows that leave, up to where the sums are decayed to, float64 [B, T, H] or [B, T, Hk, F]; that
    over the part [B, Hs, 1 or F] in the dtype of the gates), None without a gate."""
    if part.g is None:
        return None, None
    rows, heads = part.v.shape[1:3]

    def each(g: Tensor) -> Tensor:  # gates of all heads as those of every key head
        return g.expand(-1, -1, heads) if g.ndim == 3 and g.shape[2] == 1 else g

    own = each(part.g)
    stream = key_stream(own, None if state.ring_g is None else each(state.ring_g), layout)
    if not options.newest:  # what has not left has no part in it
        row = torch.arange(rows, device=own.device)
        inside = spread_to(row < part.lengths.unsqueeze(1), own)
        own = stream = stream[:, :rows].masked_fill(~inside, 0.0)
    so_far = row_decays(F.pad(stream, (0, 0) * (stream.ndim - 2) + (1, 0)))
    end = so_far.of(lambda x: x[:, -1:])
    ring = stream.shape[1] - rows
    total = end.since(so_far.of(lambda x: x[:, ring : ring + 1])).to(part.g.dtype)
    total = _by_head(total, heads).squeeze(1).flatten(1, 2)
    return end.since(so_far.of(lambda x: x[:, 1 : rows + 1])), total


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, M, Hk, y, 1] of [B, M, Hk y], [B, M, Hk, 1, F] of [B, M, Hk, F]."""
    return x.unflatten(2, (heads, -1)).unsqueeze(-1) if x.ndim == 3 else x.unsqueeze(3)


def _logs(decays: Tensor | None, which: Tensor) -> Tensor:
    """Log-decays as ``sums_of`` takes them, for the keys of which [B, M, Hk] is True."""
    if decays is None:
        log = torch.zeros(*which.shape, 1, 1, dtype=torch.float64, device=which.device)
    else:
        log = _by_head(decays, which.shape[2])
    return log.masked_fill(~which[..., None, None], -math.inf)


def _best(
    part: Part, options: PartOptions, state: AttentionState, layout: Layout, decays: Tensor | None
) -> tuple[Best, Sent]:
    """The best keys of those that leave the window in this part, and what others need of them."""
    assert part.k is not None and part.scores is not None
    scores = _entering(part.scores, state.ring_scores, layout)
    row = torch.arange(scores.shape[1], device=scores.device)
    position = (state.position - options.window).unsqueeze(1) + row
    best = best_of(ranked(scores, position, _leaving(part, options, options.window, state)), options)
    k, v = _entering(part.k, state.ring_k, layout), _entering(part.v, state.ring_v, layout)
    if not options.late:
        return best, sent_keys(best, k, v, None, None)
    assert part.fk is not None
    decays = None if decays is None or part.g is None else decays.to(part.g.dtype)
    return best, sent_keys(best, k, v, _entering(part.fk, state.ring_fk, layout), decays)
