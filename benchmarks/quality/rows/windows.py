"""Window by meta memory, and anchors in its place."""

from benchmarks.quality.rows.declare import Row, Table


def anchored(window: int) -> Row:
    """Another window, four anchors as ``base`` has."""
    return Row(
        name=f"w{window}-a4",
        about=f"a window of {window} and four anchors",
        changes={"attention": {"window": window}},
        field="attention.window",
        also=("retrieval",) if window > 128 else (),
    )


def remembering(window: int, sinks: int) -> Row:
    """Meta memory in place of the anchors."""
    return Row(
        name=f"w{window}-m{sinks}",
        about=f"a window of {window} and {sinks} learned sink logits",
        changes={"attention": {"window": window, "anchors": 0, "num_sinks": sinks, "sink_init": -2.0}},
        field="attention.anchors" if window == 128 else "",
    )


TABLE = Table(
    name="windows",
    about="The paper's Table 7: window by meta memory, and anchors in its place.",
    title="Window by meta memory, and anchors in its place (the paper's Table 7)",
    rows=tuple(
        row
        for window in (32, 64, 128, 256)
        for row in (
            *([anchored(window)] if window != 128 else []),  # which is base
            *(remembering(window, sinks) for sinks in (2, 4, 6)),
        )
    ),
)
