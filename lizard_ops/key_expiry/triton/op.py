"""The key expiry kernels as an operator of torch.library: allocation, launches, shapes for tracing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.key_expiry.stream import LOWEST, blocked_ranks
from lizard_ops.key_expiry.triton.kernels import (
    best_kernel,
    displaced_kernel,
    last_kernel,
    rank_kernel,
    scan_kernel,
    tell_kernel,
)
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.places import block_count

LEAST_BLOCK = 64  # keys
LEAST_LIST = 32  # of the best: layers differ in their places, and each length of lists is a kernel of its own


def config_for(places: int) -> Launch:
    """rows: keys compared at a time, a divisor of the columns: keys in a block, at least the places. Not tuned."""
    block = max(LEAST_BLOCK, triton.next_power_of_2(places))
    warps = max(4, min(16, block // 256))  # a thread sorts eight keys, or code and registers grow with the places
    return Launch(rows=max(1, min(16, block, 4096 // block)), columns=block, warps=warps, stages=1)


def parts_of(config: Launch) -> int:
    """Programs that share a block's displaced keys, of eight comparisons each: blocks are few where places are many."""
    return max(1, config.columns // (8 * config.rows))


def of_scan(places: int, wide: int) -> dict[str, int]:
    """Options of ``scan_kernel`` alone. Few warps: what a step takes is the time until its numbers have changed places,
    longest between warps."""
    return {"P": places, "LEVELS": wide.bit_length() - 1, "num_warps": max(1, min(16, wide // 256))}


def list_length(places: int, block: int) -> int:
    return min(block, max(LEAST_LIST, triton.next_power_of_2(places)))


@torch.library.custom_op("lizard_ops::key_expiry", mutates_args=())
def displaced(
    kept: Tensor,  # [N, H, P] ranks, descending
    ranks: Tensor,  # [H, R] of the rows of all streams
    ends: Tensor | None,  # [N + 1] where packed streams start and end; None: R / N rows each
    judged: Tensor | None,  # [N] the rows after which ``last`` is asked for
) -> tuple[Tensor, Tensor, Tensor]:
    """(by_kept [N, H, P], by_row [H, R], last [N, H, P]): the row that displaces each kept key, by number, and each
    row, int32, -1 where none does; ranks of the best P of kept keys and judged rows, descending, or empty.
    """
    kept, ranks = kept.contiguous(), ranks.contiguous()
    (n, heads, places), rows = kept.shape, ranks.shape[1]
    by_kept = torch.full(kept.shape, -1, dtype=torch.int32, device=kept.device)
    by_row = torch.full(ranks.shape, -1, dtype=torch.int32, device=ranks.device)
    last = kept.new_full((0,) if judged is None else kept.shape, LOWEST)
    if rows == 0:
        return by_kept, by_row, last if judged is None else kept.clone()
    length = rows // n
    with on_device(kept, kept_keys=places):
        before, config, sizes = _find(ranks, kept, by_kept, by_row, ends, n, length, places)
        if judged is not None:
            launch_kernel(
                last_kernel, n * heads,
                ranks, kept, before, judged, last, ends, rows, length, P=places, X=min(config.rows, before.shape[2]),
                **sizes, **config.launch,
            )  # fmt: skip
    return by_kept, by_row, last


def _find(
    ranks: Tensor, kept: Tensor | None, by_kept: Tensor | None, by_row: Tensor, ends: Tensor | None, n: int,
    length: int, places: int,
) -> tuple[Tensor, Launch, dict[str, Any]]:  # fmt: skip
    """Launches what finds who is displaced, into ``by_kept`` and ``by_row``: n streams of ``length`` rows, or as
    ``ends`` says. Returns the best before each block [blocks, H, BP], the launch and the sizes that all share."""
    heads, rows = ranks.shape
    config, packed, steps = config_for(places), ends is not None, (n - 1).bit_length()
    block, wide = config.columns, list_length(places, config.columns)
    blocks = block_count(rows if packed else length, n, 0, block, packed)
    best, before = (ranks.new_empty(blocks, heads, width) for width in (block, wide))
    of_blocks = {"H": heads, "C": block, "PACKED": packed}
    sizes = of_blocks | {"BP": wide}
    launch_kernel(
        best_kernel, blocks * heads, ranks, best, ends, rows, length, n, steps, **of_blocks, **config.launch,
    )  # fmt: skip
    launch_kernel(scan_kernel, n * heads, kept, best, before, ends, length, **sizes, **of_scan(places, wide))
    launch_kernel(
        displaced_kernel, blocks * heads * parts_of(config),
        ranks, best, before, by_kept, by_row, ends, rows, length, n, steps, P=places, X=config.rows,
        PARTS=parts_of(config), **sizes, **config.launch,
    )  # fmt: skip
    return before, config, sizes


@displaced.register_fake
def _(kept, ranks, ends, judged):
    by_kept, by_row = kept.new_empty(kept.shape, dtype=torch.int32), ranks.new_empty(ranks.shape, dtype=torch.int32)
    return by_kept, by_row, kept.new_empty((0,) if judged is None else kept.shape)


@functools.lru_cache(maxsize=1024)
def blocked(places: tuple[int, ...], device: torch.device) -> Tensor:
    """[H, P] ranks, descending, of before the first key where heads have different numbers of places."""
    return blocked_ranks(places, device).T.sort(descending=True)[0].contiguous()


@torch.library.custom_op("lizard_ops::key_expiry_fresh", mutates_args=())
def fresh(
    scores: Tensor, lengths: Tensor | None, window: int, anchors: int, places: int, each: Sequence[int] | None = None
) -> Tensor:
    """Expiries [N, T, H] of float32 scores [N, T, H] that nothing came before, right-padded to ``lengths`` [N].

    each: places of every head, where they differ; ``places`` is the most of them.

    Five launches: called once a layer, what PyTorch takes to rank and to tell would be most of the time.
    """
    n, length, heads = scores.shape
    expiry = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    if not expiry.numel():
        return expiry
    rows, tile = n * length, 128
    programs = n * triton.cdiv(length, tile)
    ranks = torch.empty(heads, rows, dtype=torch.int64, device=scores.device)
    by_row = torch.empty(heads, rows, dtype=torch.int32, device=scores.device)
    kept = None if each is None else blocked(tuple(each), scores.device).expand(n, -1, -1).contiguous()
    of_rows = {"H": heads, "BH": triton.next_power_of_2(heads), "BLOCK": tile}
    with on_device(scores, kept_keys=places):
        launch_kernel(
            rank_kernel, programs,
            scores, ranks, by_row, lengths, rows, length, *scores.stride(), ANCHORS=anchors, P=places, **of_rows,
        )  # fmt: skip
        _find(ranks, kept, None, by_row, None, n, length, places)
        launch_kernel(tell_kernel, programs, by_row, expiry, rows, length, W=window, **of_rows)
    return expiry


@fresh.register_fake
def _(scores, lengths, window, anchors, places, each=None):
    return scores.new_empty(scores.shape, dtype=torch.int64)
