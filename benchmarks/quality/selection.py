"""Which layers to keep softmax: those whose restoration saves most of the KL to the teacher."""

from __future__ import annotations

from benchmarks.quality.bench import Bench
from benchmarks.quality.rows import BASE, PLAIN, RowSpec


def layer_order(bench: Bench) -> list[int] | None:
    """Layers from the most KL saved to the least, as the row ``plain`` or ``base`` (seed 0) measured it after
    stage 1, which both train alike. None where neither has, of this teacher."""
    for name in (PLAIN, BASE):
        for record in bench.records(RowSpec(name=name)):
            measured = record["measures"].get("restore")
            if measured and record["settings"]["teacher"] == bench.teacher:
                return measured["order"]
    return None
