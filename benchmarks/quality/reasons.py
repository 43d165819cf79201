"""Why each field of ``plain`` is what it is, and so of ``recommended``: by the rows that change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.quality.costs import config_of, costs
from benchmarks.quality.results import Results, markdown
from benchmarks.quality.rows import BASE, PLAIN, ROWS
from lizard_models.config import LizardConfig


def fields() -> dict[str, list[str]]:
    """Fields that rows tell about, in the order in which a configuration has them, and the names of these rows."""
    found: dict[str, list[str]] = {}
    for row in ROWS.values():
        if row.field:
            found.setdefault(row.field, []).append(row.name)
    config = LizardConfig.preset(PLAIN).to_dict()
    known = [f"{part}.{name}" for part in config if isinstance(config[part], dict) for name in config[part]]
    known += [name for name in config if not isinstance(config[name], dict)]
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"rows: {', '.join(unknown)} are no fields of a configuration")
    return {name: found[name] for name in known if name in found}


def differences(results: Results, field: str) -> dict[str, tuple[float, float]]:
    """Loss past 2048 of the rows that tell about a field, minus that of the row each stands beside (each above the
    teacher trained alike), and the noise of the difference.

    The noise is twice the standard deviation over seeds, of both rows together; 0 for one seed each. Only rows measured
    in both are there.
    """
    found = {}
    for name in fields()[field]:
        beside = ROWS[name].reference
        number, base, change = results.past(name), results.past(beside), results.beside(name, beside)
        if number is not None and base is not None and change is not None:
            noise = 2 * ((base.spread or 0.0) ** 2 + (number.spread or 0.0) ** 2) ** 0.5
            found[name] = change, noise
    return found


def better_rows(results: Results) -> dict[str, list[str]]:
    """Fields whose value the tables would not choose: rows with another value that lose less, beyond the noise, at no
    higher cost."""
    own = _value(LizardConfig.preset(PLAIN))
    found = {}
    for field in fields():
        gains = [
            name
            for name, (change, noise) in differences(results, field).items()
            if change < -noise and not costs(name) and _value(config_of(name))(field) != own(field)
        ]
        if gains:
            found[field] = gains
    return found


def reasons(results: Results) -> str:
    """A Markdown table: field, value, and the evidence beside it, as far as it was measured."""
    own, before = _value(LizardConfig.preset(PLAIN)), _value(config_of(BASE))
    better = better_rows(results)
    rows = []
    for field in fields():
        changes = differences(results, field)
        if not changes:
            continue
        evidence = [_evidence(name, *change) for name, change in changes.items()]
        verdict = "kept" if own(field) == before(field) else f"changed, `{_short(before(field))}` before"
        costlier = [name for name, (change, noise) in changes.items() if change < -noise and costs(name)]
        if costlier and own(field) == before(field):
            verdict += "; better, but costlier: " + "; ".join(f"`{name}` ({costs(name)})" for name in costlier)
        if field in better:
            verdict = f"{', '.join(f'`{n}`' for n in better[field])} is better"
        rows.append([f"`{field}`", f"`{_short(own(field))}`", ", ".join(evidence), verdict])
    return markdown(["field", "value", "loss past 2048 when it is changed", "the tables say"], rows) if rows else ""


def _evidence(name: str, change: float, noise: float) -> str:
    text = f"`{name}` {change:+.3f}"
    beside = ROWS[name].reference
    notes = [f"noise {noise:.3f}"] * (noise > 0) + [f"beside `{beside}`"] * (beside != BASE)
    return text + f" ({', '.join(notes)})" * bool(notes)


def _value(config: LizardConfig) -> Callable[[str], Any]:
    def value(field: str) -> Any:
        found: Any = config
        for part in field.split("."):
            found = getattr(found, part)
        return found

    return value


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(part).removesuffix("_proj") for part in value) or "none"
    return str(value)
