"""What a row of a table is: a preset, what is changed in it, a seed, and how long each stage trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lizard_models.config import LizardConfig
from lizard_models.evaluation.report import TEACHER

MEASURES = (
    "loss", "kl", "branches", "restore", "length", "source", "passkey", "passkeys5", "found", "ruler", "lines", "tasks"
)  # fmt: skip
SPACED = "_and_space"
"""Ends the names of measures of passkeys in records of before 2026-11-30, which asked for the token of the space before
a key as well: a lower bound of what is asked now."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long each stage trains. A row may leave a stage out, never train it longer."""

    name: str
    stage1_steps: int
    stage2_steps: int
    batch_size: int
    sequence_length: int
    stage0_steps: int = 0
    """Of rows with kept keys, in rows of the recipe's own length; 0 leaves their scores at the start."""

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of stage 1 and of stage 2."""
        step = self.batch_size * self.sequence_length
        return self.stage1_steps * step, self.stage2_steps * step


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(name="quick", stage1_steps=400, stage2_steps=150, batch_size=4, sequence_length=1024, stage0_steps=240),
        Budget(name="full", stage1_steps=1221, stage2_steps=1221, batch_size=8, sequence_length=2048, stage0_steps=240),
    )
}
"""quick: 1.6M and 0.6M tokens. full: the paper's 20M tokens a stage."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One trained and measured model."""

    name: str
    preset: str = "plain"
    """A preset, or ``teacher``: all layers kept softmax, so that stage 2 fine-tunes the teacher alike."""
    changes: dict[str, Any] = field(default_factory=dict)
    """As ``LizardConfig.replace`` takes them."""
    seed: int = 0
    stage1: bool = True
    stage2: bool = True
    passkeys: int = 0
    """Synthetic examples of five passkeys among the training text of both stages."""
    look_ups: bool = False
    """Passages and records come again in half of the rows of both stages, as in those of stage 0."""
    widened: bool = False
    """Wide layers get their window after stage 1, which trains every layer with the others' (see ``widen``)."""
    oracle: bool = False
    """No score is fitted: the labels that it would learn choose the keys, in training and in what is measured."""
    longer: int = 1
    """Training sequences are this many times as long as the budget's, and as many times fewer a step."""
    stage3: float = 0.0
    """Tokens of stage 3 as a share of those of stage 2; 0 leaves it out."""
    stage3_longer: int = 4
    """Its sequences are this many times as long as those of stage 2, and four by as many a step."""

    @property
    def stem(self) -> str:
        """Name of the row's files."""
        return f"{self.name}.s{self.seed}"

    def config(self, budget: Budget, num_layers: int) -> LizardConfig:
        """The preset with the changes, the budget and the seed in it."""
        common = {
            "epochs": None,
            "batch_size": max(1, budget.batch_size // self.longer),
            "sequence_length": budget.sequence_length * self.longer,
        }
        recipes: dict[str, dict[str, Any]] = {
            "stage1": {**common, "max_steps": budget.stage1_steps, "seed": self.seed},
            "stage2": {**common, "max_steps": budget.stage2_steps, "seed": self.seed},
        }
        if self.stage3:
            rows, length = max(1, 4 // self.stage3_longer), budget.sequence_length * self.longer * self.stage3_longer
            recipes["stage3"] = {
                "epochs": None,
                "max_steps": max(1, round(self.stage3 * budget.tokens[1] / (rows * length))),
                "batch_size": rows,
                "sequence_length": length,
                "seed": self.seed,
            }
        if budget.stage0_steps:
            recipes["stage0"] = {"epochs": None, "max_steps": budget.stage0_steps, "seed": self.seed}
        if self.preset == TEACHER:
            config = LizardConfig.preset("window_only", softmax_layers=list(range(num_layers)))
        else:
            config = LizardConfig.preset(self.preset)
        return config.replace(**recipes).replace(**self.changes)


def stage2_recipe(config: LizardConfig) -> dict[str, Any]:
    """Every field of how stage 2 trains, but for its data, its length and its seed, which a row has from elsewhere."""
    elsewhere = {"max_steps", "epochs", "batch_size", "sequence_length", "seed", "examples", "dataset"}
    return {key: value for key, value in config.to_dict()["stage2"].items() if key not in elsewhere}


def recipe_name(config: LizardConfig) -> str:
    """A short name for how stage 2 trains: objective, projections, rank or "full", rate."""
    recipe = config.stage2
    objective = "ce" * bool(recipe.cross_entropy_weight) + "kl" * bool(recipe.kl_weight)
    targets = "".join(
        name[0] if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) else name.split("_")[0]
        for name in recipe.lora_targets
    )
    kind = "full" if recipe.trained == "full" else f"r{recipe.lora_rank}"
    return f"{objective}-{targets}-{kind}-{recipe.learning_rate:.0e}"


def controls(spec: RowSpec, budget: Budget) -> dict[str, RowSpec]:
    """The rows that a row is compared with: ``teacher`` and ``control``, each trained as it was.

    The control is the same windows and four anchors without a linear branch, after the same stage 2. The teacher gets
    that stage too where it trains on text (cross-entropy); a teacher distilled to itself would stay as it is.
    """
    config = spec.config(budget, 0)
    window = config.attention.window
    windows: dict[str, Any] = {"attention": {"window": window}}
    name = f"control-w{window}"
    if config.wide_layers:
        windows |= {"wide_layers": list(config.wide_layers), "wide_window": config.wide_window}
        name += f"-wide{len(config.wide_layers)}x{config.wide_window}"
    base: dict[str, Any] = {"seed": spec.seed, "stage1": False, "passkeys": spec.passkeys, "longer": spec.longer}
    suffix = f"-longer-x{spec.longer}" * (spec.longer > 1) + f"-passkeys{spec.passkeys}" * (spec.passkeys > 0)
    if not spec.stage2 or not budget.stage2_steps:
        return {
            "teacher": RowSpec(name=TEACHER, preset=TEACHER, stage1=False, stage2=False),
            "control": RowSpec(
                name=name,
                preset="window_only",
                changes=windows,
                stage1=False,
                stage2=False,
            ),
        }
    recipe = stage2_recipe(config) | {  # they have no new parameters
        "train_new_parameters": True,
        "new_learning_rate": None,
        "gate_learning_rate": None,
    }
    if config.stage2.cross_entropy_weight:
        teacher = RowSpec(
            name=f"teacher-{recipe_name(config)}{suffix}", preset=TEACHER, changes={"stage2": recipe}, **base
        )
    else:
        teacher = RowSpec(name=TEACHER, preset=TEACHER, stage1=False, stage2=False)
    control = RowSpec(
        name=f"{name}-{recipe_name(config)}{suffix}",
        preset="window_only",
        changes={**windows, "stage2": recipe},
        **base,
    )
    return {"teacher": teacher, "control": control}
