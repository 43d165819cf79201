"""A share of the layers kept softmax."""

from benchmarks.quality.rows.declare import PLAIN, Layers, Row, Table


def kept(percent: float, on: str = "base", even: bool = False) -> Row:
    """Chosen by the KL they save, or evenly spaced."""
    start, end = "recommended-" * (on == PLAIN), "-uniform" * even
    return Row(
        name=f"{start}softmax-{percent:g}{end}",
        about=f"{percent:g}% of the layers kept softmax, " + ("evenly spaced" if even else "those that save most KL"),
        on=on,
        kept=Layers(percent=percent, even=even),
        field="" if even else "softmax_layers",
        compared=True,
        goal="passkeys" if start and percent == 25 else "",
    )


TABLE = Table(
    name="softmax",
    about="The paper's Table 10: a share of the layers kept softmax, chosen by the KL they save, and evenly spaced.",
    title="Layers kept softmax (the paper's Table 10)",
    rows=(
        *(kept(percent, even=even) for percent in (12.5, 25, 50) for even in (False, True)),
        *(kept(percent, PLAIN) for percent in (12.5, 25, 50, 75)),
    ),
)
