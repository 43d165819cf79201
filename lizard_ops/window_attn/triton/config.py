"""What a call of the window kernels is given, and the launch configuration that each kernel gets for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.sizes import power_of_2
from lizard_ops.tiles.launch import Launch
from lizard_ops.tuning import tunable


class WindowCall(NamedTuple):
    """The tensors of a call of the window kernels, as ``window_forward`` describes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    anchor_k: Tensor | None
    anchor_v: Tensor | None
    sinks: Tensor | None
    first: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Tensor | None = None  # [N] queries of right-padded rows, which the backward of keys alone asks for

    @property
    def anchor_rows(self) -> tuple[Tensor, Tensor]:
        """The anchors, or the stream whose first rows they are."""
        own = self.anchor_k is not None and self.anchor_v is not None
        return (self.anchor_k, self.anchor_v) if own else (self.k, self.v)

    @property
    def strides(self) -> list[int]:
        """What the kernels take of q, k, v and the anchors."""
        return strides(self.q, self.k, self.v, *self.anchor_rows)


class WindowNumbers(NamedTuple):
    """The numbers of such a call."""

    window: int
    anchors: int
    prefix: int
    scale: float
    softcap: float | None


@tunable("window")
def config_for(kernel: str, q: Tensor, v: Tensor, group: int) -> Launch:
    """The configuration of a kernel ("forward", "queries" or "keys") by head dims and dtype, picked on an H200.

    Rows and columns of a score tile; heads: query heads in a tile of query rows.
    """
    dim, full = max(q.shape[3], v.shape[3]), q.dtype == torch.float32
    if full:  # no tensor cores: a tile that is too large for the registers is spilled whole
        rows, columns, warps, stages = (16, 16, 8, 1) if dim > 128 else (16, 16, 4, 1) if dim > 64 else (32, 32, 4, 1)
    elif dim > 128:  # never 8 warps on 64 rows: docs/kernels.md
        rows, columns, warps, stages = (32, 32, 4, 1) if kernel == "keys" else (64, 32, 4, 1)
    else:
        rows, columns, warps, stages = (64, 32, 4, 2 if kernel != "keys" else 1 if dim > 64 else 3)
    if kernel == "keys":  # its tiles hold a power of two of heads
        return Launch(rows, columns, warps, stages, heads=min(power_of_2(group), columns))
    few = kernel == "forward" and power_of_2(group) == group  # other groups would spill: docs/kernels.md
    registers = None if full or dim > 128 else 128 if few else 168
    return Launch(rows, columns, warps, stages, registers, heads=min(group, rows))


def shape_arguments(x: WindowCall, numbers: WindowNumbers, config: Launch) -> dict:
    """The compile-time arguments that every window kernel takes."""
    q, k, v = x.q, x.k, x.v
    dim, value = q.shape[3], v.shape[3]
    least = 16 if max(dim, value) <= 64 else 32  # 16 beside 128 is read out of bounds: docs/kernels.md
    return {
        "HK": k.shape[2], "G": q.shape[2] // k.shape[2], "D": dim, "V": value, "W": numbers.window,
        "A": numbers.anchors, "P": numbers.prefix, "BM": config.rows, "BN": config.columns,
        "BD": max(least, power_of_2(dim)), "BV": max(least, power_of_2(value)),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    } | config.options  # fmt: skip


def sequences_of(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]
