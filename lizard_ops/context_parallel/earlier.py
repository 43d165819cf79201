"""Tokens that earlier ranks hold, for what is not an op: a convolution's reach, a running mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.padding import compact, compaction
from lizard_ops.context_parallel.exchange import gathered, process_group
from lizard_ops.context_parallel.part import Before, Part, Sent, take


class EarlierTokens(NamedTuple):
    """What comes before a rank's part of every row, in the order of what was asked for."""

    position: Tensor  # [B] int64, real tokens before this part
    last: list[Tensor]  # [B, count, ...] the last of them, oldest first; zeros where there are fewer
    first: list[Tensor]  # [B, count, ...] the first of the sequence, as far as they come before this part, else zeros
    sums: list[Tensor]  # [B, ...] over all earlier ranks

    def there(self, count: int) -> Tensor:
        """[B, count] bool: which of the last ``count`` rows are tokens."""
        back = torch.arange(count, 0, -1, device=self.position.device)
        return back <= self.position.unsqueeze(1)

    def ring(self, rows: Tensor) -> Tensor:
        """rows [B, W, ...] of ``last`` as a state's ring holds them: slot t % W has position t."""
        window = rows.shape[1]
        slot = torch.arange(window, device=rows.device)
        return take(rows, (slot - self.position.unsqueeze(1)) % max(window, 1))


@torch.no_grad()
def earlier_tokens(
    *,
    context_group: Any,
    padding_mask: Tensor | None = None,
    last: Sequence[tuple[Tensor, int]] = (),
    first: Sequence[tuple[Tensor, int]] = (),
    sums: Sequence[Tensor] = (),
) -> EarlierTokens:
    """Rows and sums of what the ranks before this one hold of a sequence, by one all-gather and without a gradient.

    Args:
        context_group: as for ``chunk_gated_attn``.
        padding_mask: [B, T] bool, True at real tokens, which alone count.
        last: pairs of a tensor [B, T, ...] with a row per token of this part and how many of the last rows before the
            part are wanted of it.
        first: the same, of the first rows of the sequence.
        sums: [B, ...] each, of which the sums over earlier ranks are wanted.

    Raises ValueError for a group of which this rank is none, and a part without positions.
    """
    group = process_group("context_group", context_group)
    rows = [x for x, _ in (*last, *first)]
    checks.want(len(rows) > 0, "last", last, "a tensor at least, or one of first")
    checks.want(rows[0].shape[1] > 0, "last", rows[0], "at least one position on every rank of context_group")
    plan = None if padding_mask is None else compaction(padding_mask)
    rows = [x.detach() if plan is None else compact(x.detach(), plan) for x in rows]
    lengths = Part(rows[0]).lengths if plan is None else plan.lengths
    end = lengths.unsqueeze(1)
    sent: Sent = {"lengths": lengths}
    for n, ((_, count), x) in enumerate(zip((*last, *first), rows, strict=True)):
        row = torch.arange(count, device=x.device)
        index = end - count + row if n < len(last) else torch.where(row < end, row, -1)
        sent[f"rows {n}"] = take(x, index)
    sent |= {f"sum {n}": x.detach() for n, x in enumerate(sums)}
    got = gathered(sent, group)
    before = Before.of(got["lengths"], group.rank())
    found = []
    for n, (_, count) in enumerate((*last, *first)):
        row = torch.arange(count, device=end.device).expand(len(end), -1)
        at = before.position.unsqueeze(1) - count + row if n < len(last) else row
        found.append(before.find(got[f"rows {n}"], at, newest=n < len(last)))
    totals = [before.of_earlier(got[f"sum {n}"]).sum(0) for n in range(len(sums))]
    return EarlierTokens(before.position, found[: len(last)], found[len(last) :], totals)
