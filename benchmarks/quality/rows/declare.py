"""How a row is declared: in one place, with its tables, what it changes, what it stands beside and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.rows.spec import TEACHER, RowSpec

Order = Sequence[int] | None  # layers, the most worth keeping softmax first; None where it is not known yet
STAGES = ("stage1", "stage2")
PASSKEYS = 10_000  # of the paper's Figure 2
BASE, PLAIN = "base", "plain"
BASE_CHANGES: dict[str, dict[str, Any]] = {
    "attention": {"gate_init": 0.993},
    "stage2": {
        "learning_rate": 5e-4,
        "new_learning_rate": None,
        "gate_learning_rate": None,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
}
"""What ``base`` changes in ``plain``: the narrower and slower stage 2 and the start of the gate that it had when
its other fields were chosen."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Some of a teacher's layers: by number or share, those that save most KL as softmax ones or evenly spaced ones."""

    count: int = 0
    percent: float = 0.0
    even: bool = False

    def pick(self, order: Order, layers: int) -> list[int]:
        """Their indices in ascending order. ``order`` is needed unless they are evenly spaced."""
        count = self.count or int(layers * self.percent / 100 + 0.5)
        if self.even:
            return [int((i + 0.5) * layers / count) for i in range(count)]
        assert order is not None
        return sorted(order[:count])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the tables, declared. Nothing else needs to know of it."""

    name: str
    about: str
    """What it is, in a few words."""
    on: str = BASE
    """What it starts from: ``base``, a preset, or ``teacher``, all of whose layers are kept softmax."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """As ``LizardConfig.replace`` takes them, on top of what it starts from."""
    kept: Layers | None = None
    """Layers kept softmax."""
    wide: Layers | None = None
    """Layers with a window of ``wide_window``."""
    without: tuple[str, ...] = ()
    """Stages left out."""
    passkeys: int = 0
    """See ``RowSpec``; so are the next six."""
    look_ups: bool = False
    widened: bool = False
    oracle: bool = False
    longer: int = 1
    stage3: float = 0.0
    stage3_longer: int = 4
    beside: str | None = None
    """The row whose loss is taken from its loss, and which its tables show too; None is that of the name of what it
    starts from, "" none. Teacher and window control follow from what it changes (``controls``)."""
    field: str = ""
    """The field of ``plain`` that the row tells about: it alone differs, with what must change along."""
    costs: str = ""
    """What it costs beyond the row it stands beside, but for the memory of a sequence, which is counted: it is not
    chosen for losing less."""
    also: tuple[str, ...] = ()
    """Other tables that show it."""
    compared: bool = False
    """Shown in the tables of every measure, not in those of its own alone."""
    goal: str = ""
    """passkeys: the goals for them are held against this row. rival: ``recommended`` is to be above it on tasks."""

    @property
    def reference(self) -> str:
        """Name of the row it stands beside, "" where there is none."""
        if self.beside is not None:
            return self.beside
        return "" if self.on in (self.name, TEACHER, "window_only") else self.on

    @property
    def needs_order(self) -> bool:
        """Whether its layers are chosen by a measurement."""
        return any(layers is not None and not layers.even for layers in (self.kept, self.wide))

    @property
    def group(self) -> str:
        """What is drawn of it: "preset" always, of the rows of a group that which loses least, "" nothing."""
        if self.on not in (PLAIN, "recommended") or self.passkeys:
            return ""
        return "wide" if self.wide else "softmax" if self.kept else ""

    def spec(self, order: Order, layers: int) -> RowSpec:
        """What is trained, with a teacher of so many layers.

        Raises ValueError where the order of the layers is needed and not measured.
        """
        if self.needs_order and order is None:
            raise ValueError(
                f"{self.name}: which layers save most KL is not measured yet; run `python -m benchmarks.quality run "
                f"{PLAIN} --measures loss,kl,restore` first"
            )
        changes = _merged(BASE_CHANGES, self.changes) if self.on == BASE else dict(self.changes)
        for name, chosen in (("softmax_layers", self.kept), ("wide_layers", self.wide)):
            if chosen is not None:
                changes[name] = chosen.pick(order, layers)
        return RowSpec(
            name=self.name,
            preset=PLAIN if self.on == BASE else self.on,
            changes=changes,
            stage1="stage1" not in self.without,
            stage2="stage2" not in self.without,
            passkeys=self.passkeys,
            look_ups=self.look_ups,
            widened=self.widened,
            oracle=self.oracle,
            longer=self.longer,
            stage3=self.stage3,
            stage3_longer=self.stage3_longer,
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that stand together."""

    name: str
    about: str
    rows: tuple[Row, ...]
    title: str = ""
    """Heading of its table of ablations, "" where it has none. Such a table shows the rows that its rows stand beside,
    too."""


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The second's values, and the first's where it has none, one level down as well."""
    both = {**first, **second}
    for key in first.keys() & second.keys():
        both[key] = {**first[key], **second[key]}
    return both
