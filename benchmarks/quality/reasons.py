"""Why each field of ``recommended`` is what it is: the rows that changed it, and what they lost or gained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.quality.results import Results, markdown
from benchmarks.quality.rows import BUDGETS
from benchmarks.quality.tables import BASE, TABLES
from lizard_models.config import LizardConfig

FIELDS: dict[str, tuple[str, ...]] = {
    "attention.window": ("w32-a4", "w64-a4", "w256-a4"),
    "attention.anchors": ("no-anchors", "w128-m2", "w128-m4", "w128-m6"),
    "attention.window_rope": ("A10-no-rope",),
    "attention.linear_rope": ("A10-linear-rope",),
    "attention.coverage": ("A13-all-keys",),
    "attention.feature_activation": ("A2-exp",),
    "attention.feature_projection": ("A4-shared",),
    "attention.tie_features": ("A4-tied",),
    "attention.key_map": ("A4-query-head-keys",),
    "attention.feature_dim": ("A8-features-64", "A8-features-128", "features-512"),
    "attention.gate": ("gate-scalar", "gate-query_head", "gate-mamba2", "gate-channel", "gate-pooling", "gate-none"),
    "attention.gate_init": ("A6-gate-half", "A6-gate-0.95", "A6-gate-0.985", "A6-gate-0.999"),
    "attention.gate_spread": ("head-spread64",),
    "attention.memory": ("memory-delta", "memory-delta-beta0.5"),
    "attention.key_conv": ("key-conv4",),
    "attention.feature_norm": ("feature-norm",),
    "attention.mix": ("mix-sum",),
    "attention.merge_mass": ("mass-absolute",),
    "attention.merge_bias": ("merge-bias-none", "merge-bias-head"),
    "wide_layers": (
        "recommended-wide-4x1024-longer-x4",
        "recommended-wide-8x512-longer-x4",
        "recommended-wide-8x1024-longer-x4",
        "recommended-wide-4x2048-longer-x4",
    ),
    "wide_gate_stretch": ("recommended-wide-8x1024-stretch8-longer-x4", "recommended-wide-8x1024-stretch32-longer-x4"),
    "softmax_layers": ("softmax-12.5", "softmax-25", "softmax-50"),
    "stage1.error": ("A12-mse",),
    "stage1.target": ("A12-before-o-proj",),
    "stage1.inputs": ("A12-student-inputs",),
    "stage1.attention_weight": ("weights-0.3", "weights-3", "weights-10"),
    "stage1.max_steps": ("no-stage1",),
    "stage2.max_steps": ("no-stage2",),
    "stage2.learning_rate": ("stage2-lr-1e-3",),
    "stage2.new_learning_rate": ("stage2-new-5e-3",),
    "stage2.lora_rank": ("lora-r4", "lora-r16", "lora-r32", "lora-r64"),
    "stage2.lora_targets": ("lora-qk", "lora-vo", "lora-qkv", "lora-all"),
    "stage2.train_new_parameters": ("A11-adapters-alone",),
    "stage2.kl_weight": ("stage2-ce",),
}
"""Fields of the preset, and the rows of the tables in which that field alone differs."""

BESIDE = {"wide_layers": "recommended-longer-x4", "wide_gate_stretch": "recommended-wide-8x1024-longer-x4"}
"""The row that a field's rows stand beside, where it is not ``BASE``."""

COSTLIER = {"w256-a4", "softmax-12.5", "softmax-25", "softmax-50", "A4-query-head-keys",
            "gate-query_head", "features-512", "lora-all", "lora-r16", "lora-r32", "lora-r64",
            "weights-0.3", "weights-3", "weights-10", *FIELDS["wide_layers"], *FIELDS["wide_gate_stretch"]}  # fmt: skip
"""Rows that take more memory, more trained weights, with attention weights compared a longer stage 1 or, with decays
stretched, lose more from 16,384 tokens on (full budget): better past 2048 is not enough to choose them."""


def differences(results: Results, field: str) -> dict[str, tuple[float, float]]:
    """Loss past 2048 of the rows that change a field, minus that of the row they stand beside (each above the teacher
    trained alike), and the noise of the difference.

    The noise is twice the standard deviation over seeds, of both rows together; 0 for one seed each. Only rows measured
    in both are there.
    """
    beside = BESIDE.get(field, BASE.name)
    base = results.past(beside)
    found = {}
    for name in FIELDS[field]:
        number, change = results.past(name), results.beside(name, beside)
        if base is not None and number is not None and change is not None:
            noise = 2 * ((base.spread or 0.0) ** 2 + (number.spread or 0.0) ** 2) ** 0.5
            found[name] = change, noise
    return found


def better_rows(results: Results) -> dict[str, list[str]]:
    """Fields whose value the tables would not choose: rows with another value that lose less, beyond the noise, at no
    higher cost."""
    own, values = _value(LizardConfig.preset("recommended")), _row_values()
    found = {}
    for field in FIELDS:
        gains = [
            name
            for name, (change, noise) in differences(results, field).items()
            if change < -noise and name not in COSTLIER and values[name](field) != own(field)
        ]
        if gains:
            found[field] = gains
    return found


def reasons(results: Results) -> str:
    """A Markdown table: field, value, and the evidence beside it, as far as it was measured."""
    own, before = _value(LizardConfig.preset("recommended")), _value(BASE.config(BUDGETS["quick"], 0))
    better = better_rows(results)
    rows = []
    for field in FIELDS:
        changes = differences(results, field)
        if not changes:
            continue
        evidence = [
            f"`{name}` {change:+.3f}" + (f" (noise {noise:.3f})" if noise else "")
            for name, (change, noise) in changes.items()
        ]
        verdict = "kept" if own(field) == before(field) else f"changed, `{_short(before(field))}` before"
        costlier = [name for name, (change, noise) in changes.items() if change < -noise and name in COSTLIER]
        if costlier and own(field) == before(field):
            verdict += f"; better, but costlier: {', '.join(f'`{n}`' for n in costlier)}"
        if field in better:
            verdict = f"{', '.join(f'`{n}`' for n in better[field])} is better"
        rows.append([f"`{field}`", f"`{_short(own(field))}`", ", ".join(evidence), verdict])
    return markdown(["field", "value", "loss past 2048 when it is changed", "the tables say"], rows) if rows else ""


def _value(config: LizardConfig) -> Callable[[str], Any]:
    def value(field: str) -> Any:
        found: Any = config
        for part in field.split("."):
            found = getattr(found, part)
        return found

    return value


@functools.cache
def _row_values() -> dict[str, Callable[[str], Any]]:
    """The fields of every row by its name."""
    layers = 30  # of the rows' teacher; no field but softmax_layers depends on it
    rows = [row for table in TABLES.values() for row in table(range(layers), layers)]
    return {row.name: _value(row.config(BUDGETS["quick"], layers)) for row in rows}


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(part).removesuffix("_proj") for part in value) or "none"
    return str(value)
