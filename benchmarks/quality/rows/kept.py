"""Kept keys, chosen by a learned score, and beside each number of them as many more keys of a plain window.

Then the same bytes again, a number of places of its own for every layer and key head. A place of either takes a key, a
value, inputs of the linear branch and a gate; a kept key has a score and a position besides, 12 bytes of about a
thousand.
"""

import dataclasses
from typing import Any

from benchmarks.quality.rows.declare import PASSKEYS, PLAIN, Row, Table

PLACES = (64, 128, 256, 512)
WINDOW = 128  # of plain


def window(places: int) -> Row:
    """The bytes of ``places`` kept keys, spent on the newest keys."""
    return Row(
        name=f"recommended-w{WINDOW + places}",
        about=f"a window of {WINDOW + places}",
        on=PLAIN,
        changes={"attention": {"window": WINDOW + places}},
        compared=True,
    )


def kept(places: int, suffix: str = "", about: str = "", **more: Any) -> Row:
    """Those bytes, spent on the keys with the best scores of all that left the window. more: fields of the row, and
    of its attention."""
    fields: dict[str, Any] = {
        name: more.pop(name) for name in ("longer", "passkeys", "stage2", "beside") if name in more
    }
    changes: dict[str, Any] = {"attention": {"kept_keys": places, **more}}
    if "stage2" in fields:
        changes["stage2"] = fields.pop("stage2")
    return Row(
        name=f"recommended-kept-{places}{suffix}",
        about=f"{places} kept keys{about}",
        on=PLAIN,
        changes=changes,
        costs="a stage 0",
        compared=True,
        **({"beside": f"recommended-w{WINDOW + places}"} | fields),
    )


def foretold(places: int, learned: str, suffix: str = "", about: str = "", **more: Any) -> Row:
    """Those bytes for the keys that later queries do need: a bound for scores, not a model. learned: the row whose
    score it stands beside. more: as for ``kept``."""
    return dataclasses.replace(
        kept(places, suffix, about, **more),
        name=f"recommended-kept-{places}-oracle{suffix}",
        about=f"{places} kept keys{about}, chosen by what later queries lose without them",
        oracle=True,
        beside=learned,
        costs="the text to come",
    )


def shared(places: int, suffix: str = "", about: str = "", **more: Any) -> Row:
    """Those bytes once more, given to the layers and heads where kept keys save most. more: as for ``kept``."""
    even = kept(places, suffix, about, **more)
    return dataclasses.replace(
        even,
        name=f"recommended-shared-{places}{suffix}",
        about=f"the bytes of {places} kept keys{about}, shared out by what they save",
        changes={**even.changes, "stage0": {"share_places": True}},
        beside=even.name,
        costs="",
    )


# A sequence of 1024 tokens hardly leaves 128 + 256 exact keys: longer ones show the linear branch what it is for.
LONG: dict[str, Any] = {"longer": 4, "score_received": True}
RECEIVED = ", whose score reads the attention received in the window"
LEFT = ", in the sums too while they are kept, longer sequences"
NO_QK = {"lora_targets": ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
SLOWER = {"learning_rate": 2e-4, "new_learning_rate": 1e-3, "gate_learning_rate": 2e-4}
NEAR = {"sequence_length": 4096, "batch_size": 2}  # of stage 0, whose labels see no use beyond their own sequences
SCORES = (
    kept(256, "-received", RECEIVED, score_received=True),
    kept(256, "-wide-score", ", a score of 512 units", score_dim=512),
    *(kept(places, "-received-longer-x4", RECEIVED + ", longer sequences", **LONG) for places in (256, 512)),
    *(
        kept(places, "-left-longer-x4", LEFT, beside="recommended-kept-256-received-longer-x4", coverage="left", **LONG)
        for places in (160, 256, 480)
    ),
    foretold(256, "recommended-kept-256"),
    foretold(256, "recommended-kept-256-received-longer-x4", "-longer-x4", ", longer sequences", longer=4),
    foretold(480, "recommended-kept-480-left-longer-x4", "-left-longer-x4", LEFT, coverage="left", longer=4),
    kept(
        256,
        "-received-longer-x4-passkeys",
        RECEIVED + ", longer sequences with passkeys among them",
        passkeys=PASSKEYS // 4,
        **LONG,
    ),
    kept(
        256,
        "-received-longer-x4-no-qk",
        RECEIVED + ", longer sequences, no adapters on q and k",
        stage2=NO_QK,
        **LONG,
    ),
)

CHANGED = tuple(
    Row(
        name=f"recommended-{name}",
        about=f"`recommended` {about}",
        on="recommended",
        longer=LONG["longer"],
        compared=True,
        **more,
    )
    for name, about, more in (
        ("look-ups", "with passages and records that come again in half of its rows", {"look_ups": True}),
        ("scores-4096", "with scores fitted on sequences of 4096", {"changes": {"stage0": NEAR}}),
        ("slower", "with a stage 2 at a fifth of its rates", {"changes": {"stage2": SLOWER}}),
        ("no-qk", "without adapters on q and k", {"changes": {"stage2": NO_QK}}),
        (
            "features-128",
            "with the features of `plain`, paid for with 128 of its places",
            {"changes": {"attention": {"kept_keys": 480, "feature_dim": 128}}},
        ),
        (
            "moved",
            "with keys that stay past the context and follow as the anchors do",
            {"changes": {"attention": {"kept_past": "moved"}}},
        ),
        ("176", "in half the bytes, 176 places", {"changes": {"attention": {"kept_keys": 176}}}),
        (
            "272-w64",
            "in half the bytes, half the window and 272 places",
            {"changes": {"attention": {"kept_keys": 272, "window": 64}}},
        ),
    )
)
"""``recommended`` with one thing changed."""

TABLE = Table(
    name="kept",
    about="Keys that stay exact because a learned score says so, beside the same bytes of a wider window.",
    title="Kept keys, beside the same bytes of window",
    rows=tuple(row for places in PLACES for row in (window(places), kept(places), shared(places))) + SCORES + CHANGED,
)
