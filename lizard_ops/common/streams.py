"""The keys a chunked op walks over, and the state it leaves, for rows of a batch and for packed rows alike.

A *key stream* is what a kernel sees of one sequence: P prefix rows, then its new rows, in position order. P is the
window W with a carried state (its ring, oldest row first) and 0 without. Stream row r stands at absolute position
``first + r`` with ``first = position - P``; a negative position is a ring slot never written (zeros). New token t is
stream row P + t.

Window branch: the query of stream row r sees stream rows r - W < r' <= r of non-negative position, and the anchors.

Linear branch with offset W (0 for an op that covers every key): the query of stream row r reads the sums of stream
rows up to r - W, so row t of the keys *meets* query row t + W. Without a state only queries t >= W have keys; with one,
every query has. A row is a key if its position is at least max(anchors, 0), whatever its gate, which counts always.
The final sums hold stream rows below P + length - W, decayed up to the last of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.sizes import is_known
from lizard_ops.common.state import AttentionState


class Layout(NamedTuple):
    """Where the new tokens of N sequences stand in rows [B, T, ...]."""

    start: Tensor  # [N] int64, first token of each sequence, counted through the flattened [B * T] rows
    length: Tensor  # [N] int64, new tokens
    position: Tensor  # [N] int64, tokens seen before them
    cu_seqlens: Tensor | None  # [N + 1], as given, of packed rows
    whole: bool = False  # full rows of the batch that begin at position 0: the host knows where everything is

    @property
    def end(self) -> Tensor:
        """[N] tokens seen after the new ones: the position of the final state."""
        return self.length if self.whole else self.position + self.length


def layout_of(
    rows: Tensor, state: AttentionState | None, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None
) -> Layout:
    """Describe rows [B, T, ...]: packed (cu_seqlens, B = 1), right-padded (lengths [B]) or full."""
    batch, length = rows.shape[:2]
    # torch.compile fuses what the host saves here, and would compile again for lengths on either side of a comparison
    whole = state is None and cu_seqlens is None and lengths is None and not torch.compiler.is_compiling()
    if whole and batch == 1:  # with two operators in place of five
        lengths = torch.full((1,), length, dtype=torch.int64, device=rows.device)
        start = torch.zeros_like(lengths)
        return Layout(start, lengths, start, None, True)
    if cu_seqlens is not None:
        ends = cu_seqlens.long()
        start, lengths = ends[:-1], ends.diff()
    else:
        start = torch.arange(batch, device=rows.device) * length
        lengths = torch.full_like(start, length) if lengths is None else lengths
    return Layout(start, lengths, torch.zeros_like(start) if state is None else state.position, cu_seqlens, whole)


def take_rows(rows: Tensor, layout: Layout, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, M, ...] number ``index`` [N, M] of each sequence, zero where there is none, and [N, M] whether there is.

    index counts from the first new token; what lies outside [0, length) is not there.
    """
    there = (index >= 0) & (index < layout.length.unsqueeze(1))
    flat_rows = rows.flatten(0, 1)
    if flat_rows.shape[0] == 0:
        return rows.new_zeros(*index.shape, *rows.shape[2:]), there
    flat = (layout.start.unsqueeze(1) + index).where(there, 0).flatten()
    taken = flat_rows.index_select(0, flat).view(*index.shape, *rows.shape[2:])
    return taken.masked_fill(~spread_to(there, taken), 0), there


def spread_to(mask: Tensor, like: Tensor) -> Tensor:
    """mask [N, M] with enough trailing axes of size 1 to broadcast over ``like`` [N, M, ...]."""
    return mask.view(*mask.shape, *[1] * (like.ndim - mask.ndim))


def ring_in_order(ring: Tensor, position: Tensor) -> Tensor:
    """The ring [N, W, ...] oldest first: row r holds position ``position - W + r``, zero if that is negative."""
    window = ring.shape[1]
    slot = (position.unsqueeze(1) + torch.arange(window, device=ring.device)) % window
    flat = (slot + window * torch.arange(ring.shape[0], device=ring.device).unsqueeze(1)).flatten()
    return ring.flatten(0, 1).index_select(0, flat).view_as(ring)


def key_stream(rows: Tensor, ring: Tensor | None, layout: Layout) -> Tensor:
    """Put each sequence's ring [N, W, ...] before its new rows, in their dtype; rows itself without a ring.

    Rows of a batch: [B, T, ...] -> [B, W + T, ...]. Packed rows: [1, T, ...] -> [1, N W + T, ...], whose sequences
    lie between ``stream_seqlens``.
    """
    if ring is None:
        return rows
    old = ring_in_order(ring, layout.position).to(rows.dtype)
    if layout.cu_seqlens is None:
        return torch.cat([old, rows], 1)
    n, window = ring.shape[:2]
    ends = stream_seqlens(layout, window)
    at = torch.arange(n * window + rows.shape[1], device=rows.device)
    owner = torch.searchsorted(ends, at, right=True) - 1
    local = at - ends[owner]
    source = torch.where(local < window, owner * window + local, n * window + at - (owner + 1) * window)
    return torch.cat([old.flatten(0, 1), rows.squeeze(0)]).index_select(0, source).unsqueeze(0)


def with_kept(stream: Tensor, kept: Tensor | None) -> Tensor:
    """Kept keys [N, P, H, ...] before the ring and the new rows [N, M, H, ...], in their dtype."""
    return stream if kept is None else torch.cat([kept.to(stream.dtype), stream], 1)


def per_head(index: Tensor, like: Tensor) -> Tensor:
    """index [B, M, Hk] for x.gather(1, .) of like [B, ..., H, ...], whose heads are those or a multiple of them."""
    index = index.repeat_interleave(like.shape[2] // index.shape[2], 2)
    return index.view(*index.shape, *[1] * (like.ndim - 3))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B, P, H, ...]: the rows of x [B, M, H, ...] that rows [B, P, Hk] names by head, zero where it is -1."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], rows.shape[1], *x.shape[2:])
    index = per_head(rows, x)
    return x.gather(1, index.clamp(min=0).expand(-1, -1, *x.shape[2:])).masked_fill(index < 0, 0)


def stream_seqlens(layout: Layout, prefix: int) -> Tensor:
    """[N + 1] int64: where the packed key streams start and end, each ``prefix`` rows longer than its new tokens."""
    assert layout.cu_seqlens is not None
    ends = layout.cu_seqlens.long()
    return ends + prefix * torch.arange(ends.shape[0], device=ends.device)


def anchor_rows(rows: Tensor, kept: Tensor | None, anchors: int, layout: Layout) -> Tensor:
    """The first rows of each sequence [N, A, ...]: from the state where it has seen them, else from the new rows.

    Those not seen yet are zero. The result is both what the window branch reads and what the final state keeps.
    """
    if layout.whole:
        return _with_zeros(rows[:, :anchors], anchors)
    index = torch.arange(anchors, device=rows.device) - layout.position.unsqueeze(1)
    new, _ = take_rows(rows, layout, index)
    return new if kept is None else torch.where(spread_to(index < 0, new), kept.to(rows.dtype), new)


def _with_zeros(rows: Tensor, count: int) -> Tensor:
    """rows [N, M, ...] and zeros after them, [N, count, ...] in memory of its own; M <= count."""
    missing = count - rows.shape[1]
    if not missing:
        return rows.clone(memory_format=torch.contiguous_format)
    return torch.cat([rows, rows.new_zeros(rows.shape[0], missing, *rows.shape[2:])], 1)


def final_ring(rows: Tensor, ring: Tensor | None, window: int, layout: Layout) -> Tensor:
    """The ring [N, W, ...] after the new rows: slot t % W holds position t, slots never written are zero."""
    length = rows.shape[1]
    if layout.whole and length < window:
        return _with_zeros(rows, window)
    if layout.whole:
        oldest = length - length % window  # of those that stay, after which come the slots from 0 on
        if not torch.compiler.is_compiling() and oldest == length:  # which would be a trace for such lengths alone
            return rows[:, length - window :].clone(memory_format=torch.contiguous_format)
        return torch.cat([rows[:, oldest:], rows[:, length - window : oldest]], 1)
    slot = torch.arange(window, device=rows.device)
    back = (layout.end.unsqueeze(1) - 1 - slot) % window  # rows between the slot's position and the newest
    index = layout.length.unsqueeze(1) - 1 - back
    new, _ = take_rows(rows, layout, index)
    return new if ring is None else torch.where(spread_to(index >= 0, new), new, ring.to(rows.dtype))


def window_fields(
    k: Tensor, v: Tensor, anchor_k: Tensor | None, anchor_v: Tensor | None, state: AttentionState | None,
    window: int, layout: Layout,
) -> dict[str, Tensor | None]:  # fmt: skip
    """The fields of the final state that a window branch keeps; anchor_k and anchor_v come from ``anchor_rows``."""
    return {
        "ring_k": final_ring(k, None if state is None else state.ring_k, window, layout),
        "ring_v": final_ring(v, None if state is None else state.ring_v, window, layout),
        "anchor_k": anchor_k,
        "anchor_v": anchor_v,
    }


def offset_fields(
    fk: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: AttentionState | None,
    offset: int,
    layout: Layout,
    ring_v: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The fields of the final state that hold keys still on their way into the linear sums; none without an offset.

    fk as given (pre-activations), g as ``check_gate`` returns it; ring_v: the field of that name, where a window branch
    of this size has made it.
    """
    if not offset:
        return {}
    held = AttentionState(layout.position) if state is None else state
    return {
        "ring_v": final_ring(v, held.ring_v, offset, layout) if ring_v is None else ring_v,
        "ring_fk": final_ring(fk, held.ring_fk, offset, layout),
        "ring_g": None if g is None else final_ring(g, held.ring_g, offset, layout),
    }


def sliding_sum(x: Tensor, window: int) -> Tensor:
    """Sums over the last ``window`` rows, [B, L, ...]: row r holds x[r - window + 1] + ... + x[r].

    No difference of running sums: nothing cancels and -inf stays where it belongs. O(L), open lengths O(L window).
    """
    length = x.shape[1]
    if not is_known(length):  # whose blocks are no whole number of them in symbols
        before = x.new_zeros(x.shape[0], window - 1, *x.shape[2:])
        return torch.cat([before, x], 1).unfold(1, window, 1).sum(-1)
    blocks = -(-(length + window) // window)
    tail = blocks * window - (window - 1) - length
    head, end = (x.new_zeros(x.shape[0], rows, *x.shape[2:]) for rows in (window - 1, tail))
    padded = torch.cat([head, x, end], 1)
    tiles = padded.unflatten(1, (blocks, window))
    within = tiles.cumsum(2)
    before = torch.cat([torch.zeros_like(within[:, :, :1]), within[:, :, :-1]], 2).flatten(1, 2)
    after = tiles.flip(2).cumsum(2).flip(2).flatten(1, 2)
    return after[:, :length] + before[:, window : window + length]
