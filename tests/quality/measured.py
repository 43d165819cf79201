"""Records of rows as if they had been measured, and plans that measure them on a tiny teacher."""

import dataclasses
from pathlib import Path

from readable import save_teacher, save_texts

from benchmarks.quality.bench import Bench
from benchmarks.quality.records import merge_records
from benchmarks.quality.rows import BUDGETS, ROWS, Budget, RowSpec

EDGES = (0, 128, 2048, 4096)
BUDGET = BUDGETS["quick"]
BASE = ROWS["base"].spec(None, 30)


def tiny_plan(places: Path, budget: Budget, **more) -> Bench:
    """Rows of a tiny teacher and short texts, all of it in the folder ``places``."""
    save_teacher(places / "teacher")
    save_texts(places / "texts", characters=1500)
    texts = [str(places / "texts")]
    return Bench(
        teacher=str(places / "teacher"), data=texts, eval_data=texts, budget=budget, out=places / "results",
        work=places / "work", eval_documents=2, **more,
    )  # fmt: skip


def loss(value: float, edges=EDGES) -> dict:
    return {"edges": edges, "means": [4.0] + [value] * (len(edges) - 2), "errors": [0.1] * (len(edges) - 1)}


def write_row(folder, spec: RowSpec, value: float, **measures) -> None:
    record = {
        "settings": {"row": dataclasses.asdict(spec), "budget": dataclasses.asdict(BUDGET)},
        "measures": {"loss": loss(value), "kl": loss(value - 3), **measures},
        "stages": {},
        "hashes": {"validation": "abcdef0123456789"},
        "after_stage1": {"relative_error": 0.0321},
        "environment": {"device": "a chip", "dtype": "bfloat16", "versions": {"torch": "1", "transformers": "2"}},
    }
    merge_records(folder / f"{BUDGET.name}.jsonl", {spec.stem: record})
