"""Every preset beside teacher and window control, and ``base``, which the rows that change one thing stand beside."""

from benchmarks.quality.rows.declare import PLAIN, STAGES, Row, Table
from benchmarks.quality.rows.spec import TEACHER

TABLE = Table(
    name="presets",
    about="Every preset beside teacher and window control.",
    rows=(
        Row(name=TEACHER, about="the teacher as it is", on=TEACHER, without=STAGES, compared=True),
        Row(
            name="control-w128",
            about="its last 128 keys and first four, untrained",
            on="window_only",
            changes={"attention": {"window": 128}},
            without=STAGES,
            compared=True,
        ),
        Row(
            name="paper_literal",
            about="the paper's equations as printed",
            on="paper_literal",
            beside="recommended",
            compared=True,
        ),
        Row(name="paper", about="the paper's Table 13", on="paper", beside="recommended", compared=True),
        Row(name="lolcats", about="LoLCATs", on="lolcats", beside="recommended", compared=True, goal="rival"),
        Row(name="liger", about="Liger", on="liger", beside="recommended", compared=True, goal="rival"),
        Row(
            name=PLAIN,
            about="recommended without kept keys",
            on=PLAIN,
            beside="base",
            also=("rates",),
            compared=True,
        ),
        Row(
            name="recommended",
            about="what these tables show best",
            on="recommended",
            longer=4,
            beside=PLAIN,
            costs="a stage 0",
            also=("kept",),
            compared=True,
        ),
    ),
)

REFERENCES = Table(
    name="references",
    about="What the rows that change one thing stand beside.",
    rows=(Row(name="base", about="plain as it was while its fields were chosen", compared=True),),
)
