"""Stage 3: a quarter of stage 2's tokens again, in sequences four times as long or in no longer ones.

Stages 1 and 2 have the budget's own sequences; those of ``recommended`` are as long from the start as stage 3's here.
Longer ones would leave the context of the teacher that these rows have, 8192 tokens.
"""

from benchmarks.quality.rows.declare import Row, Table

SHARE = 0.25


def stage3(end: str, about: str, longer: int) -> Row:
    return Row(
        name=f"recommended-stage3{end}",
        about=f"stages 1 and 2 of the budget's length, then a quarter of stage 2's tokens again{about}",
        on="recommended",
        stage3=SHARE,
        stage3_longer=longer,
        costs="a quarter of stage 2 again",
        compared=True,
    )


TABLE = Table(
    name="stage3",
    about="Stage 3: longer sequences at the end, beside as many tokens of stage 2's length.",
    title="Stage 3: longer sequences at the end",
    rows=(
        stage3("", ", in sequences four times as long", 4),
        stage3("-same-length", ", in sequences of that length", 1),
    ),
)
