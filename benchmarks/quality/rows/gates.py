"""How wide the gate is and what it reads."""

from typing import Any

from benchmarks.quality.rows.declare import Row, Table

FIELD = "attention.gate"


def gate(kind: str, about: str, *also: str, **fields: Any) -> Row:
    """also: other tables. fields: what must change along."""
    return Row(
        name=f"gate-{kind}", about=about, changes={"attention": {"gate": kind, **fields}}, field=FIELD, also=also
    )


TABLE = Table(
    name="gates",
    about="The paper's Table 4 and A7: how wide the gate is and what it reads.",
    title="Gates (the paper's Table 4, A7)",
    rows=(
        gate("scalar", "one gate for all heads"),
        gate("mamba2", "the form of Mamba-2"),
        gate("channel", "one per channel", "timescales", "retrieval"),
        gate("pooling", "pooled from the keys, without parameters", gate_init=None, gate_temperature=16.0),
        gate("none", "no decay", "parts"),
    ),
)
