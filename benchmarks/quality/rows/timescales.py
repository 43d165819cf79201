"""How far back the gates reach at the start, and longer texts to learn it from."""

from benchmarks.quality.rows.declare import Row, Table


def start(name: str, about: str, value: float | None, *also: str) -> Row:
    """Another start of the gate; base has 0.993, which forgets half in 99 tokens."""
    return Row(
        name=f"A6-gate-{name}", about=about, changes={"attention": {"gate_init": value}}, field="attention.gate_init",
        also=also,
    )  # fmt: skip


TABLE = Table(
    name="timescales",
    about="How far back the gates reach at the start, and longer sequences.",
    title="How far back the gates reach",
    rows=(
        start("half", "the gate from sigmoid(0), as the paper leaves it", None, "choices"),
        start("0.95", "the gate from 0.95", 0.95, "choices"),
        start("0.985", "the gate from 0.985, as plain has it", 0.985),
        start("0.999", "the gate from 0.999", 0.999, "choices"),
        Row(name="longer-x4", about="sequences four times as long, a quarter as many", longer=4),
    ),
)
