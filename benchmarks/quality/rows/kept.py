"""Kept keys, chosen by a learned score, and beside each number of them as many more keys of a plain window.

Then the same bytes again, a number of places of its own for every layer and key head. A place of either takes a key, a
value, inputs of the linear branch and a gate; a kept key has a score and a position besides, 12 bytes of about a
thousand.
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


def kept(places: int) -> Row:
    """Those bytes, spent on the keys with the best scores of all that left the window."""
    return Row(
        name=f"recommended-kept-{places}",
        about=f"{places} kept keys",
        on="recommended",
        changes={"attention": {"kept_keys": places}},
        beside=f"recommended-w{WINDOW + places}",
        costs="a stage 0",
        compared=True,
    )


def shared(places: int) -> Row:
    """Those bytes once more, given to the layers and heads where kept keys save most."""
    return Row(
        name=f"recommended-shared-{places}",
        about=f"the bytes of {places} kept keys, shared out by what they save",
        on="recommended",
        changes={"attention": {"kept_keys": places}},
        shared=True,
        beside=f"recommended-kept-{places}",
        compared=True,
    )


TABLE = Table(
    name="kept",
    about="Keys that stay exact because a learned score says so, beside the same bytes of a wider window.",
    title="Kept keys, beside the same bytes of window",
    rows=tuple(row for places in PLACES for row in (window(places), kept(places), shared(places))),
)
