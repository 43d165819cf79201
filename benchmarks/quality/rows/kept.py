"""Kept keys, chosen by a learned score, and beside each number of them as many more keys of a plain window.

A place of either takes a key, a value, inputs of the linear branch and a gate; a kept key has a score and a position
besides, 12 bytes of about a thousand.
"""

from benchmarks.quality.rows.declare import Row, Table

PLACES = (64, 128, 256, 512)
WINDOW = 128  # of recommended


def window(places: int) -> Row:
    """The bytes of ``places`` kept keys, spent on the newest keys."""
    return Row(
        name=f"recommended-w{WINDOW + places}",
        about=f"a window of {WINDOW + places}",
        on="recommended",
        changes={"attention": {"window": WINDOW + places}},
        compared=True,
    )


def kept(places: int, suffix: str = "", about: str = "", **changes: object) -> Row:
    """Those bytes, spent on the keys with the best scores of all that left the window."""
    return Row(
        name=f"recommended-kept-{places}{suffix}",
        about=f"{places} kept keys{about}",
        on="recommended",
        changes={"attention": {"kept_keys": places, **changes}},
        beside=f"recommended-w{WINDOW + places}",
        costs="a stage 0",
        compared=True,
    )


SCORES = (
    kept(256, "-received", ", whose score reads the attention received in the window", score_received=True),
    kept(256, "-wide-score", ", a score of 512 units", score_dim=512),
)

TABLE = Table(
    name="kept",
    about="Keys that stay exact because a learned score says so, beside the same bytes of a wider window.",
    title="Kept keys, beside the same bytes of window",
    rows=tuple(row for places in PLACES for row in (window(places), kept(places))) + SCORES,
)
