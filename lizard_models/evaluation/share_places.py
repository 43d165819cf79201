"""Places of kept keys shared out where they save most: arithmetic on errors that were measured.

Each place of a head saves less than the one before it. Where a measured curve says otherwise its concave hull is taken,
by which places that save nothing are a step on the way to more that do. Of hulls, taking what saves most per byte next
is best.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Curve = Sequence[float]  # errors of a head, one for each number of places


def savings_hull(levels: Sequence[int], errors: Curve) -> list[tuple[int, float]]:
    """Corners (places, error saved) of the least concave curve above what is saved, from (0, 0) to the most.

    levels: numbers of places, rising from 0; errors: what is lost with each of them.
    """
    corners: list[tuple[int, float]] = []
    for point in zip(levels, (errors[0] - error for error in errors), strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    best = max(range(len(corners)), key=lambda n: corners[n][1])  # the first of the largest
    return corners[: best + 1]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def share_places(
    errors: Sequence[Sequence[Curve]],
    levels: Sequence[int],
    budget: int,
    place_bytes: Sequence[int],
    layer_bytes: Sequence[int],
    step: int = 8,
) -> list[tuple[int, ...]]:
    """Places of every key head of every layer, whose savings by their hulls add up to the most within ``budget`` bytes.

    errors: by layer and key head, one for each of ``levels``, which rise from 0 in multiples of ``step``. place_bytes:
    of a place of a key head, by layer; layer_bytes: what a layer with any place takes besides. Places are given
    ``step`` at a time, and none that save nothing. Where every place has one price and layers have none, no other table
    within the budget saves more. A layer that gets no place pays nothing: what it would have paid is shared out again,
    and where the budget holds no place beside what layers pay, the one with least to save goes first.

    Raises ValueError for levels that are no such numbers, and errors that are not one for each of them.
    """
    rising = all(a < b for a, b in zip(levels, levels[1:], strict=False))
    if not levels or levels[0] != 0 or not rising or any(n % step for n in levels):
        raise ValueError(f"levels must rise from 0 in multiples of {step}, got {list(levels)}")
    if any(len(curve) != len(levels) for layer in errors for curve in layer):
        raise ValueError(f"errors must be one for each of the {len(levels)} levels of every head")
    hulls = [[savings_hull(levels, curve) for curve in layer] for layer in errors]
    paying = [n for n, layer in enumerate(hulls) if any(len(hull) > 1 for hull in layer)]
    while True:
        left = budget - sum(layer_bytes[n] for n in paying)
        table = _shared(hulls, paying, left, place_bytes, step)
        some = [n for n in paying if any(table[n])]
        if some == paying:
            return [tuple(heads) for heads in table]
        least = min(paying, key=lambda n: sum(hull[-1][1] for hull in hulls[n]))
        paying = some or [n for n in paying if n != least]


def _shared(
    hulls: Sequence[Sequence[Sequence[tuple[int, float]]]],
    layers: Sequence[int],
    left: int,
    place_bytes: Sequence[int],
    step: int,
) -> list[list[int]]:
    """The best saving per byte first, the earlier head of equal ones, as long as a step of it fits."""
    table = [[0] * len(layer) for layer in hulls]
    heap = [
        (-_slope(*hull[:2]) / place_bytes[n], n, h, 1) for n in layers for h, hull in enumerate(hulls[n]) if hull[1:]
    ]
    heapq.heapify(heap)
    while heap:
        _, n, h, corner = heapq.heappop(heap)
        hull = hulls[n][h]
        given = max(0, min((hull[corner][0] - table[n][h]) // step, left // (step * place_bytes[n])))
        table[n][h] += given * step
        left -= given * step * place_bytes[n]
        if corner + 1 < len(hull):
            heapq.heappush(heap, (-_slope(hull[corner], hull[corner + 1]) / place_bytes[n], n, h, corner + 1))
    return table
