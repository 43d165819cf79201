"""Count what the backward of kept keys and their expiries go through, on a CPU: tiles of 64 keys by 8 queries, and
tiles of 16 keys for which ``displaced_kernel`` asks when they are displaced, of the 32 of a block.

    python benchmarks/gpu/kept_tiles.py [--lengths 2048,32768] [--segments 512,1024]

The shape of docs/kernels.md: 32,768 tokens in all, 8 key heads of 4 query heads, window 128, 4 anchors, 256 kept keys,
the scores of kept.py. "least" is what the pairs of a key and a query that sees it would fill; the buffer holds the
parts of gradients that wait, float32 keys and values of 128 dims.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import lizard_ops

TOKENS, HEADS, WINDOW, ANCHORS, PLACES, DIM = 32768, 8, 128, 4, 256, 128
KEYS, BLOCK, QUERIES = 64, 60, 8  # of a tile; keys of a block of the kernel of window keys; queries of a tile


def scores_of(kind: str, length: int) -> Tensor:
    """[rows, length, 1]."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(TOKENS // length, length, 1, generator=generator)
    rising = torch.arange(length).view(1, -1, 1)
    return {"random": random, "rising": random * 0 + rising, "drift": random + rising / 512}[kind]


def expiries(scores: Tensor) -> Tensor:
    """[rows, length] of one head."""
    length = scores.shape[1]
    expiry = lizard_ops.key_expiry(scores, WINDOW, ANCHORS, PLACES, impl="torch").expiry[..., 0]
    expiry[:, :ANCHORS] = 0
    return expiry.clamp(max=length)


def tiles_of(expiry: Tensor, segment: int) -> tuple[int, float]:
    """(tiles of one row [length] in the order of ``sort_kernel``, the least)."""
    (length,) = expiry.shape
    j = torch.arange(length)
    beyond = j // BLOCK * BLOCK + BLOCK - 1 + WINDOW  # from here on the kernel of window keys leaves a key alone
    found, least = 0, 0.0
    for t in range(0, length, segment):
        last = min(t + segment, length)
        start, stop = beyond.clamp(min=t), expiry.clamp(max=last)
        carried = (j <= t - WINDOW) & (expiry > t)
        new = (j > t - WINDOW) & (j < last - WINDOW) & (start < stop)
        order = torch.cat([carried.nonzero(), new.nonzero()]).flatten()
        order = order[stop[order].sort(stable=True)[1]]
        for tile in order.split(KEYS):
            lives = tile[start[tile] < stop[tile]]
            if len(lives):
                found += -(-int(stop[lives].max() - start[lives].min()) // QUERIES)
                least += (stop[lives] - start[lives]).sum().item() / (KEYS * QUERIES)
    return found, least


def asked(scores: Tensor) -> float:
    """Tiles of a block of one row [length] for which it is asked when, on average."""
    kept, found, blocks = torch.full((PLACES,), -torch.inf), 0, scores[ANCHORS:].split(PLACES)
    for new in blocks:
        new = new.sort()[0]
        lacking = PLACES - torch.arange(PLACES)
        gone = [(kept > -torch.inf) & (len(new) - torch.searchsorted(new, kept, right=True) >= lacking)]
        lacking = PLACES - (kept > new.unsqueeze(1)).sum(1)
        gone.append((lacking > 0) & (torch.arange(len(new)).flip(0) >= lacking))
        found += sum(int(tile.any()) for part in gone for tile in part.split(16))
        kept = torch.cat([kept, new]).topk(PLACES)[0]
    return found / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--segments", default="256,512,1024,2048")
    options = parser.parse_args()
    for length in map(int, options.lengths.split(",")):
        for kind in ("random", "rising", "drift"):
            scores = scores_of(kind, length)
            expiry, shown = expiries(scores), []
            for segment in map(int, options.segments.split(",")):
                counts = [tiles_of(row, segment) for row in expiry]
                tiles, least = (HEADS * sum(part) for part in zip(*counts, strict=True))
                buffer = -(-length // segment) * (TOKENS // length) * HEADS * PLACES * DIM * 2 * 4 / 2**20
                shown.append(f"{segment}: {tiles:,} ({buffer:.0f} MiB)")
            when = sum(asked(row[:, 0]) for row in scores) / len(scores)
            print(f"T = {length}, {kind}: {', '.join(shown)}; least {least:,.0f}; expiries: {when:.1f} of 32")


if __name__ == "__main__":
    main()
