"""Each part of ``base`` left out, and whole projections fine-tuned in place of adapters."""

from benchmarks.quality.rows.declare import Row, Table
from benchmarks.quality.rows.lora import ALL_PROJECTIONS

FULL = {
    "trained": "full",
    "lora_targets": list(ALL_PROJECTIONS),
    "learning_rate": 5e-5,  # a tenth of the adapters', and the new parameters at what they have beside adapters
    "new_learning_rate": 5e-4,
}

TABLE = Table(
    name="parts",
    about="The paper's Table 6: each part left out, and whole projections fine-tuned in place of adapters.",
    title="Parts left out (the paper's Table 6)",
    rows=(
        Row(name="no-window", about="the linear branch alone", changes={"attention": {"window": 1, "anchors": 0}}),
        Row(
            name="no-anchors",
            about="the first tokens leave the window as others do",
            changes={"attention": {"anchors": 0}},
            field="attention.anchors",
        ),
        Row(name="no-stage1", about="stage 2 alone", without=("stage1",), field="stage1.max_steps"),
        Row(name="no-stage2", about="stage 1 alone", without=("stage2",), field="stage2.max_steps"),
        Row(
            name="full-finetuning",
            about="projections trained whole in stage 2",
            changes={"stage2": FULL},
            costs="every number of the projections trained",
        ),
    ),
)
