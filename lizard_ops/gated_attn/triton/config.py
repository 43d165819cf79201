"""Launch configurations: block shapes and warps of every kernel, by head dim and operand width."""

from __future__ import annotations

from typing import NamedTuple

import triton

from lizard_ops.tuning import tunable

CHUNK = 64  # rows of a chunk


class Launch(NamedTuple):
    """One kernel's block shape and launch options."""

    block_k: int
    block_v: int
    queries: int  # query heads stacked as rows of one tile; "key": query rows of one tile
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def blocks(self) -> dict[str, int]:
        """The keyword arguments of a kernel that stacks heads."""
        return {"GH": self.queries, "BK": self.block_k, "BV": self.block_v} | self.options


# kernel -> (most columns of K and V in a tile, queries, warps, stages); for operands of 2 bytes, then of 4
WIDE = {
    "state": (128, 128, 1, 8, 1),
    "state_reverse": (128, 128, 1, 8, 3),
    "scan": (8, 128, 1, 4, 6),
    "output": (128, 128, 1, 4, 2),
    "row": (128, 128, 2, 8, 2),
    "key": (128, 128, 32, 4, 2),
    "channel_state": (64, 128, 1, 4, 1),
    "channel_state_reverse": (64, 128, 1, 4, 2),
    "factor": (128, 128, 1, 4, 1),
    "key_sum": (128, 128, 1, 4, 1),
    "channel_output": (128, 128, 1, 4, 2),
    "channel_row": (128, 128, 1, 8, 2),
    "channel_value": (128, 128, 1, 4, 2),
    "channel_key": (128, 128, 1, 4, 2),
}
# the same where a head dim over 128 leaves less shared memory; a tile of 64 rows takes no 8 warps: docs/kernels.md
LARGE = WIDE | {
    "output": (128, 128, 1, 4, 1),
    "row": (128, 128, 1, 4, 1),
    "key": (128, 128, 32, 4, 1),
    "channel_output": (128, 128, 1, 4, 1),
    "channel_row": (128, 128, 1, 4, 1),
    "channel_value": (128, 128, 1, 4, 1),
    "channel_key": (128, 128, 1, 4, 1),
}
# the same for a chunk of over 64 rows
TALL = WIDE | {name: (*LARGE[name][:3], 8, 1) for name in LARGE if LARGE[name] != WIDE[name]}
NARROW = {
    "state": (64, 64, 1, 4, 1),
    "state_reverse": (64, 64, 1, 4, 1),
    "scan": (4, 128, 1, 2, 4),
    "output": (64, 64, 1, 4, 1),
    "row": (64, 64, 1, 4, 1),
    "key": (64, 64, 32, 4, 1),
    "channel_state": (64, 64, 1, 4, 1),
    "channel_state_reverse": (64, 64, 1, 4, 1),
    "factor": (64, 64, 1, 4, 1),
    "key_sum": (64, 64, 1, 4, 1),
    "channel_output": (64, 64, 1, 4, 1),
    "channel_row": (64, 64, 1, 4, 1),
    "channel_value": (64, 64, 1, 4, 1),
    "channel_key": (64, 64, 1, 4, 1),
}


@tunable("gated")
def launch(kernel: str, k_dim: int, v_dim: int, group: int, chunk: int, operand_bytes: int) -> Launch:
    """The configuration of a kernel, by its name in the tables, for these head dims, heads a group and rows a chunk."""
    wide = TALL if chunk > 64 else LARGE if max(k_dim, v_dim) > 128 else WIDE
    block_k, block_v, queries, warps, stages = (NARROW if operand_bytes > 2 else wide)[kernel]
    block_k, block_v = min(block_k, triton.next_power_of_2(k_dim)), min(block_v, triton.next_power_of_2(v_dim))
    # narrower tiles beside wider ones compile wrong, for wgmma (64 rows) and for mma: docs/kernels.md
    least = 64 if chunk >= 64 else 32 if max(block_k, block_v) >= 128 else 16
    return Launch(
        max(least, block_k),
        max(least, block_v),
        min(queries, chunk if kernel == "key" else triton.next_power_of_2(group)),
        warps,
        stages,
    )


@tunable("gated scan")
def scan_launch(v_dim: int, operand_bytes: int) -> Launch:
    """The scan's: every column of V, and as many rows of K as keep the tile's size."""
    rows, columns, _, warps, stages = (WIDE if operand_bytes == 2 else NARROW)["scan"]
    block_v = triton.next_power_of_2(v_dim)
    return Launch(max(1, rows * columns // block_v), block_v, 1, warps, stages)
