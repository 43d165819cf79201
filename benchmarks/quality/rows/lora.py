"""Rank of the adapters, and which projections have one."""

from benchmarks.quality.rows.declare import Row, Table

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MORE = "more trained weights"


def rank(value: int) -> Row:
    """base has 8."""
    return Row(
        name=f"lora-r{value}",
        about=f"adapters of rank {value}",
        changes={"stage2": {"lora_rank": value, "lora_alpha": 2 * value}},
        field="stage2.lora_rank",
        costs=MORE if value > 8 else "",
    )


def projections(name: str, *targets: str) -> Row:
    """base has q, k, v and o."""
    return Row(
        name=f"lora-{name}",
        about=f"adapters on {', '.join(target.removesuffix('_proj') for target in targets)}",
        changes={"stage2": {"lora_targets": list(targets)}},
        field="stage2.lora_targets",
        costs=MORE if len(targets) > 4 else "",
    )


TABLE = Table(
    name="lora",
    about="The paper's Table 8: rank of the adapters, and which projections have one.",
    title="Adapters: rank and projections (the paper's Table 8)",
    rows=(
        *(rank(value) for value in (4, 16, 32, 64)),
        projections("qk", "q_proj", "k_proj"),
        projections("vo", "v_proj", "o_proj"),
        projections("qkv", "q_proj", "k_proj", "v_proj"),
        projections("all", *ALL_PROJECTIONS),
    ),
)
