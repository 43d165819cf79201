"""Which layers to keep softmax: those whose restoration saves most of the KL to the teacher."""

from __future__ import annotations

import json

from lizard_models.quality.bench import Bench
from lizard_models.quality.tables import RECOMMENDED


def layer_order(bench: Bench) -> list[int] | None:
    """Layers from the most KL saved to the least, as the row ``recommended`` (seed 0) measured it, or None."""
    path = bench.record_path(RECOMMENDED)
    if not path.is_file():
        return None
    measured = json.loads(path.read_text())["measures"].get("restore")
    return measured["order"] if measured else None
