"""What may raise recall: passkeys among the training text (the paper's Figure 2), with softmax layers and without."""

from typing import Any

from benchmarks.quality.rows.declare import PASSKEYS, PLAIN, Layers, Row, Table

BOTH = {"stage2": {"cross_entropy_weight": 0.5}}  # the teacher's answers are not all right


def hybrid(end: str, about: str, changes: dict[str, Any], longer: int = 1) -> Row:
    """A quarter of the layers kept softmax, and passkeys in training."""
    return Row(
        name=f"recommended-softmax-25-passkeys{end}",
        about=f"passkeys among the text{about}",
        on=PLAIN,
        kept=Layers(percent=25),
        changes=changes,
        passkeys=PASSKEYS // longer,
        longer=longer,
        beside="recommended-softmax-25",
        compared=True,
        goal="passkeys",
    )


TABLE = Table(
    name="retrieval",
    about="What may raise recall: passkeys in training (the paper's Figure 2), more state, softmax layers.",
    title="What may raise recall",
    rows=(
        Row(
            name="recommended-passkeys",
            about="passkeys among the text",
            on=PLAIN,
            passkeys=PASSKEYS,
            compared=True,
        ),
        Row(name="lolcats-passkeys", about="passkeys among the text", on="lolcats", passkeys=PASSKEYS, compared=True),
        hybrid("", "", {}),
        hybrid("-ce", ", cross-entropy beside KL", BOTH),
        hybrid("-longer-x4", ", longer sequences", {}, longer=4),
        hybrid("-ce-longer-x4", ", cross-entropy beside KL, longer sequences", BOTH, longer=4),
    ),
)
