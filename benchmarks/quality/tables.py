"""The tables: which rows stand together, in the form of the paper's tables and of its open choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.rows import TEACHER, Budget, RowSpec, controls

PASSKEYS = 10_000
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NARROW: dict[str, Any] = {
    "learning_rate": 5e-4,
    "new_learning_rate": None,
    "gate_learning_rate": None,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
FULL = {
    "trained": "full",
    "lora_targets": list(ALL_PROJECTIONS),
    "learning_rate": 5e-5,  # a tenth of the adapters', and the new parameters at what they have beside adapters
    "new_learning_rate": 5e-4,
}
STAGES = ("stage1", "stage2")
FASTER = {"new_learning_rate": 5e-3, "gate_learning_rate": 1e-3}
WIDE = {**FASTER, "learning_rate": 1e-3, "lora_rank": 32, "lora_alpha": 64, "lora_targets": list(ALL_PROJECTIONS)}
SPREAD: dict[str, Any] = {"gate": "channel", "gate_init": 0.996, "gate_spread": 256.0}
Order = Sequence[int] | None  # layers, the most worth keeping softmax first; None where it is not known yet


def _row(name: str, preset: str = "recommended", *, without: Sequence[str] = (), **changes: Any) -> RowSpec:
    """changes: as ``LizardConfig.replace`` takes them; of ``recommended``, on top of ``BASE``. without: stages left
    out."""
    if preset == "recommended":
        attention = {"gate_init": 0.993} | changes.get("attention", {})
        stage1 = {"attention_weight": 0.0} | changes.get("stage1", {})
        changes = {**changes, "attention": attention, "stage1": stage1, "stage2": NARROW | changes.get("stage2", {})}
    stages = {stage: stage not in without for stage in STAGES}
    return RowSpec(name=name, preset=preset, changes=changes, **stages)


def _attention(name: str, preset: str = "recommended", **fields: Any) -> RowSpec:
    return _row(name, preset, attention=fields)


TEACHER_ROW = _row(TEACHER, TEACHER, without=STAGES)
RECOMMENDED = RowSpec(name="recommended")
BASE = _row("base")
"""``recommended`` with the narrower and slower stage 2, the start of the gate and the error of stage 1 that it had when
its other fields were chosen: what the rows that change one thing stand beside."""
PAPER = _row("paper", "paper")


def presets(order: Order, layers: int) -> list[RowSpec]:
    """Every preset beside teacher and window control."""
    names = ("paper_literal", "paper", "lolcats", "liger")
    return [
        TEACHER_ROW,
        _row("control-w128", "window_only", without=STAGES, attention={"window": 128}),
        *(_row(name, name) for name in names),
        RECOMMENDED,
    ]


def gates(order: Order, layers: int) -> list[RowSpec]:
    """The paper's Table 4 and A7: how wide the gate is and what it reads."""
    kinds = ("scalar", "query_head", "mamba2", "channel", "pooling", "none")
    starts: dict[str, dict[str, Any]] = {"pooling": {"gate_init": None, "gate_temperature": 16.0}}
    return [BASE, *(_attention(f"gate-{kind}", gate=kind, **starts.get(kind, {})) for kind in kinds)]


def parts(order: Order, layers: int) -> list[RowSpec]:
    """The paper's Table 6: each part left out, and whole projections fine-tuned in place of adapters."""
    return [
        BASE,
        _attention("no-window", window=1, anchors=0),
        _attention("no-anchors", anchors=0),
        _attention("gate-none", gate="none"),
        _attention("merge-bias-none", merge_bias="none"),
        _row("no-stage1", without=["stage1"]),
        _row("no-stage2", without=["stage2"]),
        _row("full-finetuning", stage2=FULL),
    ]


def windows(order: Order, layers: int) -> list[RowSpec]:
    """The paper's Table 7: window by meta memory, and anchors in its place."""
    rows = [BASE]
    for window in (32, 64, 128, 256):
        if window != 128:  # which is BASE
            rows.append(_attention(f"w{window}-a4", window=window))
        for sinks in (2, 4, 6):
            name = f"w{window}-m{sinks}"
            rows.append(_attention(name, window=window, anchors=0, num_sinks=sinks, sink_init=-2.0))
    return rows


def lora(order: Order, layers: int) -> list[RowSpec]:
    """The paper's Table 8: rank of the adapters, and which projections have one."""
    projections = {
        "qk": ("q_proj", "k_proj"),
        "vo": ("v_proj", "o_proj"),
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "all": ALL_PROJECTIONS,
    }
    return [
        BASE,
        *(_row(f"lora-r{r}", stage2={"lora_rank": r, "lora_alpha": 2 * r}) for r in (4, 16, 32, 64)),
        *(_row(f"lora-{name}", stage2={"lora_targets": list(targets)}) for name, targets in projections.items()),
    ]


def rates(order: Order, layers: int) -> list[RowSpec]:
    """How fast and how widely stage 2 trains: rates of adapters and of new parameters, and more of both."""
    return [
        BASE,
        _row("stage2-lr-1e-3", stage2={"learning_rate": 1e-3}),
        _row("stage2-new-5e-3", stage2=FASTER),
        _row("stage2-wide", stage2=WIDE),
        _row("stage2-wide-lr-2e-3", stage2={**WIDE, "learning_rate": 2e-3}),
        _row("stage2-wide-r128", stage2={**WIDE, "lora_rank": 128, "lora_alpha": 256}),
        _row("stage2-full-2e-4", stage2={**FULL, **FASTER, "learning_rate": 2e-4}),
        RECOMMENDED,
    ]


def weights(order: Order, layers: int) -> list[RowSpec]:
    """The divergence of attention weights in stage 1's error, and what the maps gain from more size with it."""

    def row(change: str = "", weight: float = 3.0, **changes: Any) -> RowSpec:
        stage1 = {"attention_weight": weight} | changes.pop("stage1", {})
        return _row(f"weights-{weight:g}{change}", attention=changes, stage1=stage1)

    return [
        BASE,
        *(row(weight=weight) for weight in (0.3, 3.0, 10.0)),
        row("-one-sided", feature_activation="one_sided_softmax", feature_dim=256),
        row("-query-head-keys", key_map="query_head"),
        row("-gate-0.998", gate_init=0.998),
        RECOMMENDED,
        *(
            RowSpec(name=f"recommended-weights-{weight:g}", changes={"stage1": {"attention_weight": weight}})
            for weight in (0.3, 3.0)
        ),
    ]


def timescales(order: Order, layers: int) -> list[RowSpec]:
    """How far back the gates reach at the start, how widely spread over features or heads, and what goes with that."""
    spread = "channel-spread256-0.996"
    return [
        BASE,
        _attention("A6-gate-0.985", gate_init=0.985),
        _attention("gate-channel", gate="channel"),
        _attention("channel-spread64", gate="channel", gate_spread=64.0),
        _attention(spread, **SPREAD),
        _attention("channel-spread1024-0.996", **{**SPREAD, "gate_spread": 1024.0}),
        _attention("head-spread64", gate_spread=64.0),
        _row(f"{spread}-gate-1e-2", attention=SPREAD, stage1={"gate_learning_rate": 1e-2}),
        RowSpec(name=f"{spread}-wide", changes={"attention": SPREAD}),
        replace(_attention(f"{spread}-longer-x4", **SPREAD), longer=4),
        replace(BASE, name="longer-x4", longer=4),
    ]


def _measured(table: str, order: Order) -> Sequence[int]:
    if order is None:
        raise ValueError(
            f"{table}: which layers save most KL is not measured yet; run `python -m benchmarks.quality run "
            "recommended --measures loss,kl,restore` first"
        )
    return order


def softmax(order: Order, layers: int) -> list[RowSpec]:
    """The paper's Table 10: a share of the layers kept softmax, chosen by the KL they save, and evenly spaced.

    Raises ValueError where the order of the layers has not been measured.
    """
    order = _measured("softmax", order)
    rows, last = [BASE], [RECOMMENDED]
    for percent in (12.5, 25.0, 50.0):
        count = int(layers * percent / 100 + 0.5)
        chosen, even = sorted(order[:count]), [int((i + 0.5) * layers / count) for i in range(count)]
        rows.append(_row(f"softmax-{percent:g}", softmax_layers=chosen))
        rows.append(_row(f"softmax-{percent:g}-uniform", softmax_layers=even))
        last.append(RowSpec(name=f"recommended-softmax-{percent:g}", changes={"softmax_layers": chosen}))
    return rows + last


def wide(order: Order, layers: int) -> list[RowSpec]:
    """A wider window in the layers that would save most KL as softmax ones: exact recall nearby, in constant memory.

    ``wide`` rows have it from the start, ``widened`` ones after stage 1. In text no longer than the window nothing
    leaves it, so that rows which are wide from the start would not train what the linear branch there holds: at the
    budget ``quick`` only ``longer`` sequences do. ``stretch``: what the wide layers' log-decays are divided by.

    Raises ValueError where the order of the layers is not measured.
    """
    order = _measured("wide", order)
    rows = [RECOMMENDED]
    for count, window in ((4, 1024), (4, 2048), (8, 512), (8, 1024)):
        changes = {"wide_layers": sorted(order[:count]), "wide_window": window}
        for stretch in (1, 8, 32) if (count, window) == (8, 1024) else (1,):
            own = changes | ({"wide_gate_stretch": float(stretch)} if stretch > 1 else {})
            name = f"{count}x{window}" + f"-stretch{stretch}" * (stretch > 1)
            rows.append(RowSpec(name=f"recommended-wide-{name}", changes=own))
            rows.append(RowSpec(name=f"recommended-widened-{name}", changes=own, widened=True))
    return [*rows, *(replace(row, name=f"{row.name}-longer-x4", longer=4) for row in rows)]


def choices(order: Order, layers: int) -> list[RowSpec]:
    """What the paper leaves open, A1 to A13: one line a reading (A7 is the table ``gates``)."""
    return [
        BASE,
        PAPER,
        _attention("A1-sink-linear", "paper", sink_form="linear", sink_init=1.0, sink_spread=0.1),
        _attention("A2-exp", feature_activation="exp", merge_mass="absolute"),
        _attention("A3-no-denominator", "paper", normalize=False),
        _attention("A4-shared", feature_projection="shared"),
        _attention("A4-tied", tie_features=True),
        _attention("A4-query-head-keys", key_map="query_head"),
        _attention("A5-alpha-fixed", "paper", alpha="fixed"),
        _attention("A5-alpha-per-head", "paper", alpha="per_head"),
        _attention("A6-gate-half", gate_init=None),
        _attention("A6-gate-0.95", gate_init=0.95),
        _attention("A6-gate-0.999", gate_init=0.999),
        _attention("A8-features-64", feature_dim=64, feature_dim_counts="features"),
        _attention("A8-features-128", feature_dim=128, feature_dim_counts="features"),
        _attention("features-512", feature_dim=256),
        _attention("A9-sinks-per-head", "paper", sinks_per_head=True),
        _attention("A10-no-rope", window_rope=False),
        _attention("A10-linear-rope", linear_rope=True),
        _attention("A10-paper-rope", "paper", window_rope=True),
        _row("A11-adapters-alone", stage2={"train_new_parameters": False}),
        _row("A12-before-o-proj", stage1={"target": "heads"}),
        _row("A12-student-inputs", stage1={"inputs": "student"}),
        _row("A12-mse", stage1={"error": "mse"}),
        _attention("A13-all-keys", coverage="all"),
        _attention("A13-paper-outside", "paper", coverage="outside"),
        _attention("mix-sum", mix="sum", merge_bias="none", alpha="per_head"),
        _attention("mass-absolute", merge_mass="absolute"),
        _attention("merge-bias-none", merge_bias="none"),
        _attention("merge-bias-head", merge_bias="head"),
        _row("stage2-ce", stage2={"cross_entropy_weight": 1.0, "kl_weight": 0.0}),
    ]


def retrieval(order: Order, layers: int) -> list[RowSpec]:
    """What may raise recall: passkeys in training (the paper's Figure 2), more state, finer gates, a delta memory,
    a convolution on the keys, softmax layers."""
    rows = [
        BASE,
        replace(RECOMMENDED, name="recommended-passkeys", passkeys=PASSKEYS),
        replace(_row("lolcats", "lolcats"), name="lolcats-passkeys", passkeys=PASSKEYS),
        _attention("A4-query-head-keys", key_map="query_head"),
        _attention("gate-channel", gate="channel"),
        _attention("w256-a4", window=256),
        _attention("memory-delta", memory="delta"),
        _attention("memory-delta-beta0.5", memory="delta", beta_init=0.5),
        _attention("key-conv4", key_conv=4),
        _attention("memory-delta-conv4", memory="delta", key_conv=4),
        _attention("feature-norm", feature_norm=True),
    ]
    if order is None:
        return rows
    kept = next(row for row in softmax(order, layers) if row.name == "recommended-softmax-25")
    both = {**kept.changes, "stage2": {"cross_entropy_weight": 0.5}}  # the teacher's answers are not all right
    trained = [
        replace(kept, name=f"{kept.name}-passkeys{name}", passkeys=PASSKEYS, changes=changes)
        for name, changes in (("", kept.changes), ("-ce", both))
    ]
    longer = [replace(row, name=f"{row.name}-longer-x4", passkeys=PASSKEYS // 4, longer=4) for row in trained]
    return [*rows, kept, *trained, *longer]


TABLES: dict[str, Callable[[Order, int], list[RowSpec]]] = {
    table.__name__: table
    for table in (presets, gates, parts, windows, lora, rates, weights, timescales, softmax, wide, choices, retrieval)
}


BY_ORDER = ("softmax", "wide")  # tables that need the order of the layers


def find_rows(
    names: Iterable[str], seeds: Sequence[int], budget: Budget, *, order: Order, layers: int, with_controls: bool = True
) -> list[RowSpec]:
    """The rows of tables or single rows and controls by name, each with its controls before it, every seed, none twice.

    Untrained rows have no seed but 0. Raises ValueError for a name that is neither table nor row.
    """
    names = list(names)
    known: dict[str, RowSpec] = {}
    for name, table in TABLES.items():
        if order is not None or name not in BY_ORDER:
            known |= {row.name: row for row in table(order, layers)}
    rows = list(known.values())
    if set(names) - set(TABLES) - set(known):  # controls, which take a while to name
        for row in rows:
            known |= {one.name: one for one in controls(row, budget).values() if one.name not in known}
    found: dict[str, RowSpec] = {}
    for name in names:
        if name not in TABLES and name not in known:
            if name.startswith(("softmax-", "recommended-softmax-", "recommended-wide")):
                _measured(name, order)  # says what is missing
            listed = ", ".join(row.name for row in rows)
            raise ValueError(f"no table or row {name!r}; tables: {', '.join(TABLES)}; rows: {listed}")
        for row in TABLES[name](order, layers) if name in TABLES else [known[name]]:
            for seed in seeds if row.stage1 or row.stage2 else [0]:
                seeded = replace(row, seed=seed)
                control = row.preset in (TEACHER, "window_only")
                beside = controls(seeded, budget).values() if with_controls and not control else []
                for one in (*beside, seeded):
                    found.setdefault(one.stem, one)
    return list(found.values())
