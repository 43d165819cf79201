"""How fast and how widely stage 2 trains."""

from benchmarks.quality.rows.declare import Row, Table
from benchmarks.quality.rows.lora import ALL_PROJECTIONS, MORE
from benchmarks.quality.rows.parts import FULL

FASTER = {"new_learning_rate": 5e-3, "gate_learning_rate": 1e-3}
WIDE = {**FASTER, "learning_rate": 1e-3, "lora_rank": 32, "lora_alpha": 64, "lora_targets": list(ALL_PROJECTIONS)}

TABLE = Table(
    name="rates",
    about="How fast and how widely stage 2 trains: rates of adapters and of new parameters, and more of both.",
    title="How fast and how widely stage 2 trains",
    rows=(
        Row(
            name="stage2-lr-1e-3",
            about="adapters at twice the rate",
            changes={"stage2": {"learning_rate": 1e-3}},
            field="stage2.learning_rate",
        ),
        Row(
            name="stage2-new-5e-3",
            about="new parameters at ten times the rate, gates at twice",
            changes={"stage2": FASTER},
            field="stage2.new_learning_rate",
        ),
        Row(
            name="stage2-wide",
            about="both, and rank 32 on every projection: the stage 2 of plain",
            changes={"stage2": WIDE},
            costs=MORE,
            compared=True,
        ),
        Row(
            name="stage2-wide-lr-2e-3",
            about="stage2-wide at twice the rate",
            changes={"stage2": {**WIDE, "learning_rate": 2e-3}},
            costs=MORE,
        ),
        Row(
            name="stage2-wide-r128",
            about="stage2-wide with rank 128",
            changes={"stage2": {**WIDE, "lora_rank": 128, "lora_alpha": 256}},
            costs=MORE,
        ),
        Row(
            name="stage2-full-2e-4",
            about="every projection trained whole, four times as fast",
            changes={"stage2": {**FULL, **FASTER, "learning_rate": 2e-4}},
            costs=MORE,
        ),
    ),
)
