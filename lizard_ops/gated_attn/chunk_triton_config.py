"""Launch configurations: block shapes and warps of every kernel, by head dim and operand width."""

from __future__ import annotations

from typing import NamedTuple

import triton

CHUNK = 64  # rows of a chunk
SEGMENT = 16  # chunks of a segment: fixed, so that a row's bits never depend on its neighbours in the batch


class Launch(NamedTuple):
    """One kernel's block shape and launch options."""

    block_k: int
    block_v: int
    heads: int  # query heads stacked as rows of one tile
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def blocks(self) -> dict[str, int]:
        """The keyword arguments of a kernel that stacks heads."""
        return {"GH": self.heads, "BK": self.block_k, "BV": self.block_v} | self.options


# kernel -> (most columns of K and V in a tile, heads, warps, stages); for operands of 2 bytes, then of 4
WIDE = {
    "walk": (128, 64, 1, 4, 3),
    "walk_reverse": (128, 64, 1, 4, 3),
    "output": (128, 128, 2, 8, 2),
    "row": (128, 128, 2, 8, 1),
    "key": (128, 128, 1, 4, 1),
    "channel_walk": (128, 64, 1, 4, 1),
    "channel_walk_reverse": (128, 64, 1, 4, 1),
    "channel_output": (128, 128, 2, 8, 1),
    "channel_row": (128, 128, 1, 8, 1),
    "channel_key": (128, 128, 1, 8, 1),
}
NARROW = {
    "walk": (64, 64, 1, 4, 1),
    "walk_reverse": (64, 64, 1, 4, 1),
    "output": (64, 64, 1, 4, 1),
    "row": (64, 64, 1, 4, 1),
    "key": (64, 64, 1, 4, 1),
    "channel_walk": (64, 64, 1, 4, 1),
    "channel_walk_reverse": (64, 64, 1, 4, 1),
    "channel_output": (64, 64, 1, 4, 1),
    "channel_row": (64, 64, 1, 4, 1),
    "channel_key": (64, 64, 1, 4, 1),
}


def launch(kernel: str, k_dim: int, v_dim: int, group: int, operand_bytes: int) -> Launch:
    """The configuration of a kernel, by its name in the tables, for these head dims and heads a group."""
    block_k, block_v, heads, warps, stages = (WIDE if operand_bytes == 2 else NARROW)[kernel]
    return Launch(
        max(16, min(block_k, triton.next_power_of_2(k_dim))),
        max(16, min(block_v, triton.next_power_of_2(v_dim))),
        min(heads, triton.next_power_of_2(group)),
        warps,
        stages,
    )
