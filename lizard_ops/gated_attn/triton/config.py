"""Launch configurations: block shapes and warps of every kernel, by head dim and operand width."""

from __future__ import annotations

from lizard_ops.common.sizes import power_of_2
from lizard_ops.tiles.launch import Launch
from lizard_ops.tuning import tunable

CHUNK = 64  # rows of a chunk


# kernel -> (most channels of K and of V in a tile, query heads stacked in its rows, warps, stages), but for "key" the
# query rows of a tile; for operands of 2 bytes, then of 4
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


@tunable("gated", fixed=("registers",))
def launch(kernel: str, k_dim: int, v_dim: int, group: int, chunk: int, operand_bytes: int) -> Launch:
    """The configuration of a kernel, by its name in the tables; group: query heads that share a state.

    Its tile is one of the state: rows of K and columns of V.
    """
    wide = TALL if chunk > 64 else LARGE if max(k_dim, v_dim) > 128 else WIDE
    block_k, block_v, queries, warps, stages = (NARROW if operand_bytes > 2 else wide)[kernel]
    block_k, block_v = min(block_k, power_of_2(k_dim)), min(block_v, power_of_2(v_dim))
    # narrower tiles beside wider ones compile wrong, for wgmma (64 rows) and for mma: docs/kernels.md
    least = 64 if chunk >= 64 else 32 if max(block_k, block_v) >= 128 else 16
    queries = min(queries, chunk if kernel == "key" else power_of_2(group))
    return Launch(max(least, block_k), max(least, block_v), warps, stages, heads=queries)


@tunable("gated scan", fixed=("registers",))
def scan_launch(v_dim: int, operand_bytes: int) -> Launch:
    """The scan's: every column of V, and as many rows of K as keep the tile's size."""
    rows, columns, _, warps, stages = (WIDE if operand_bytes == 2 else NARROW)["scan"]
    block_v = power_of_2(v_dim)
    return Launch(max(1, rows * columns // block_v), block_v, warps, stages)
