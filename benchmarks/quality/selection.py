"""Which layers to keep softmax: those whose restoration saves most of the KL to the teacher."""

from __future__ import annotations

from benchmarks.quality.bench import Bench
from benchmarks.quality.tables import BASE, RECOMMENDED


def layer_order(bench: Bench) -> list[int] | None:
    """Layers from the most KL saved to the least, as the row ``recommended`` or ``base`` (seed 0) measured it after
    stage 1, which both train alike. None where neither has."""
    for row in (RECOMMENDED, BASE):
        for record in bench.records(row):
            if measured := record["measures"].get("restore"):
                return measured["order"]
    return None
