"""Log-decays from one row to a later one, for gates that may reset."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

LEAST = -1.0e6  # of a log-decay of one step that is no reset: more leaves nothing, and costs sums their last digits


class Decays(NamedTuple):
    """Finite log decays and resets, summed along rows up to each and with it."""

    sums: Tensor  # [B, M, ...] float64
    resets: Tensor  # the same, int64

    def of(self, take: Callable[[Tensor], Tensor]) -> Decays:
        """Those of some rows."""
        return Decays(take(self.sums), take(self.resets))

    def since(self, then: Decays) -> Tensor:
        """Log-decay from the rows ``then`` up to these, float64; -inf after a reset."""
        return (self.sums - then.sums).masked_fill(self.resets > then.resets, -math.inf)


def row_decays(gates: Tensor) -> Decays:
    """Of gates [B, M, ...] <= 0, one a row."""
    resets = gates == -math.inf
    return Decays(_row_sums(gates.double().masked_fill(resets, 0.0).clamp(min=LEAST)), _row_sums(resets.long()))


def _row_sums(x: Tensor) -> Tensor:
    """Running sums along the rows of x [B, M, ...], which a GPU adds up in parallel only if they are its last axis."""
    return x.movedim(1, -1).contiguous().cumsum(-1).movedim(-1, 1)
