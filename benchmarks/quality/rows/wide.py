"""A wider window in the layers that would save most KL as softmax ones: exact recall nearby, in constant memory.

``wide`` rows have it from the start, ``widened`` ones after stage 1. In text no longer than the window nothing leaves
it, so that rows which are wide from the start would not train what the linear branch there holds: at the budget
``quick`` only ``longer`` sequences do. ``stretch``: what the wide layers' log-decays are divided by.
"""

from benchmarks.quality.rows.declare import PLAIN, Layers, Row, Table


def wide(count: int, window: int, *, late: bool, stretch: int = 1, longer: int = 1) -> Row:
    """late: widened after stage 1."""
    end = f"-longer-x{longer}" * (longer > 1)
    plain = f"recommended-{'widened' if late else 'wide'}-{count}x{window}"
    about = f"{count} layers with a window of {window}" + " after stage 1" * late
    return Row(
        name=plain + f"-stretch{stretch}" * (stretch > 1) + end,
        about=about + f", decays divided by {stretch}" * (stretch > 1) + f", {longer} times the length" * (longer > 1),
        on=PLAIN,
        wide=Layers(count=count),
        changes={"wide_window": window, **({"wide_gate_stretch": float(stretch)} if stretch > 1 else {})},
        widened=late,
        longer=longer,
        beside=plain + end if stretch > 1 else f"recommended{end}" if end else PLAIN,
        field="wide_gate_stretch" if stretch > 1 else "wide_layers",
        costs="more loss from 16,384 tokens on with the full budget" if stretch > 1 else "",
        compared=True,
    )


FORMS = (
    (4, 1024, (1,)),
    (4, 2048, (1,)),
    (8, 512, (1,)),
    (8, 1024, (1, 8, 32)),
)

TABLE = Table(
    name="wide",
    about="A wider window in the layers that would save most KL as softmax ones, in constant memory.",
    title="A wider window in a few layers, in constant memory",
    rows=tuple(
        row
        for longer in (1, 4)
        for row in (
            *(
                [
                    Row(
                        name="recommended-longer-x4",
                        about="sequences four times as long, a quarter as many",
                        on=PLAIN,
                        longer=4,
                        compared=True,
                    )
                ]
                if longer > 1
                else []
            ),
            *(
                wide(count, window, late=late, stretch=stretch, longer=longer)
                for count, window, stretches in FORMS
                for stretch in stretches
                for late in (False, True)
            ),
        )
    ),
)
