"""What one call of the gated kernels is made of: which rows meet, and the sizes that kernels are compiled for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lizard_ops.common.sizes import cdiv
from lizard_ops.gated_attn.triton.config import launch
from lizard_ops.tiles.launch import Launch

GATE_NONE, GATE_HEAD, GATE_CHANNEL = 0, 1, 2


class ChunkPlan(NamedTuple):
    """Which rows meet, cut into chunks; the trailing arguments of every kernel."""

    table: Tensor | None  # [N, 4] int64: first query row, first key row, rows, first chunk
    owner: Tensor | None  # [chunks] int32, sequence of each chunk, -1 past the last
    q_rows: int
    k_rows: int
    q_shift: int
    k_shift: int
    pairs: int
    sequences: int
    chunks: int

    @property
    def place(self) -> tuple[int, ...]:
        return self.q_rows, self.k_rows, self.q_shift, self.k_shift, self.pairs


def plan_chunks(
    q: Tensor, k: Tensor, table: Tensor | None, q_shift: int, k_shift: int, pairs: int, chunk: int
) -> ChunkPlan:
    """Chunks of N equal sequences, or of those in table [N, 3]; never asks the device for a number."""
    batch, q_rows, k_rows = q.shape[0], q.shape[1], k.shape[1]
    place = (q_rows, k_rows, q_shift, k_shift, pairs)
    if table is None:
        return ChunkPlan(None, None, *place, batch, batch * cdiv(pairs, chunk))
    n, total = table.shape[0], batch * min(q_rows, k_rows)
    ends = ((table[:, 2] + chunk - 1) // chunk).cumsum(0)
    owner = torch.searchsorted(ends, torch.arange(total // chunk + n, device=q.device), right=True)
    owner = torch.where(owner < n, owner, -1).int()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return ChunkPlan(torch.cat([table, starts.unsqueeze(1)], 1), owner, *place, n, owner.shape[0])


class GatedShape(NamedTuple):
    """Head counts, dims and dtypes that all kernels of one call share."""

    hq: int
    hk: int
    hs: int
    hg: int
    k: int
    v: int
    chunk: int
    gate: int
    operand: torch.dtype
    precision: str
    gate_precision: str  # of the products that d g of a channel is a difference of

    @property
    def operand_tl(self):
        return tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32

    def launch(self, kernel: str, group: int = 1) -> Launch:
        """The kernel's configuration for this call; group: query heads that could be stacked in one tile."""
        return launch(kernel, self.k, self.v, group, self.chunk, self.operand.itemsize)

    @property
    def dims(self) -> dict:
        """What every kernel takes."""
        return {
            "HQ": self.hq, "K": self.k, "V": self.v, "C": self.chunk, "OPERAND": self.operand_tl,
            "PRECISION": self.precision,
        }  # fmt: skip

    @property
    def constants(self) -> dict:
        """What the kernels for one number per head take."""
        return self.dims | {"HK": self.hk, "HS": self.hs, "HG": self.hg, "GATED": self.gate != GATE_NONE}

    @property
    def channel_constants(self) -> dict:
        """What the kernels for one number per channel take."""
        return self.dims | {"HK": self.hk, "LEVELS": self.chunk.bit_length() - 1}

    @property
    def score_constants(self) -> dict:
        """The same for the kernels that pair rows of scores: 16 of them by tensor cores compile wrong."""
        short = self.operand.itemsize > 2 and self.chunk < 32  # docs/kernels.md
        return self.channel_constants | ({"PRECISION": "ieee"} if short else {})


def shape_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunk: int) -> GatedShape:
    """Computed factors of a product are bfloat16 for bfloat16 inputs only: float16 would overflow."""
    hq, hk = q.shape[2], k.shape[2]
    gate = GATE_NONE if g is None else (GATE_CHANNEL if g.ndim == 4 else GATE_HEAD)
    hg = 1 if g is None else g.shape[2]
    hs = hq if gate == GATE_HEAD and hg == hq else hk
    operand = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    precision = "tf32" if operand == torch.bfloat16 else "tf32x3"
    gate_precision = "ieee" if q.dtype == torch.float32 else precision
    return GatedShape(hq, hk, hs, hg, k.shape[3], v.shape[3], chunk, gate, operand, precision, gate_precision)
