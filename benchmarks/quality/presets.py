"""Train every preset with the same data and steps, generate from each, and print one table.

    python benchmarks/quality/presets.py --data books/ --eval-data held-out/ --out presets.json

Steps, lengths and presets are options; every run is resumable and finished ones are not repeated. The rows share
seed, data order, evaluation text and both stages' number of steps; all else is each preset's own recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lizard_models import LizardConfig
from lizard_models.evaluation import Report, Row
from lizard_models.evaluation.report import CONTROL, TEACHER
from lizard_models.loading import load_model
from lizard_models.pipeline import Plan, run, work_folder

PRESETS = ("paper", "paper_literal", "lolcats", "liger", "window_only", "recommended")


def recipe(steps: int, length: int, batch: int) -> dict[str, int | None]:
    return {"max_steps": steps, "epochs": None, "sequence_length": length, "batch_size": batch}


def trained(preset: str, options: argparse.Namespace, console: Console) -> Path:
    """The folder of a preset's finished model; trains it unless it is there."""
    folder = options.work / preset
    if not folder.exists():
        size = (options.seq_len, options.batch_size)
        config = LizardConfig.preset(preset).replace(
            stage1=recipe(options.stage1_steps, *size), stage2=recipe(options.stage2_steps, *size)
        )
        plan = Plan(
            teacher=options.teacher,
            config=config,
            out=folder,
            data=options.data,
            eval_data=options.eval_data,
            eval_length=options.eval_length,
            eval_documents=options.eval_documents,
            device=options.device,
            resume=work_folder(folder).exists(),
        )
        run(plan, console)
    return folder


@torch.no_grad()
def continuation(folder: Path, prompt: str) -> str:
    """Forty greedy tokens after the prompt."""
    loaded = load_model(str(folder), device="cpu")
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    made = loaded.model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
    return loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--data", action="append", required=True, help="training text; may be repeated")
    parser.add_argument("--eval-data", action="append", required=True, help="held-out documents; may be repeated")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--stage1-steps", type=int, default=400)
    parser.add_argument("--stage2-steps", type=int, default=150)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-length", type=int, default=4096)
    parser.add_argument("--eval-documents", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("presets-work"), help="folder for the models")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompt", default="The old house at the end of the road had been empty for years, and")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    console = Console(soft_wrap=True)
    rows: dict[str, Row] = {}
    samples: dict[str, str] = {}
    settings: dict[str, object] = {}
    for preset in options.presets.split(","):
        folder = trained(preset, options, console)
        saved = json.loads((folder / "evaluation.json").read_text())
        settings[preset] = saved["settings"]
        for values in saved["rows"]:
            shared = values["name"] in (TEACHER, CONTROL)
            name = values["name"] if shared else f"{preset}, {values['name']}"
            rows.setdefault(name, Row.from_dict(values))
        samples[preset] = continuation(folder, options.prompt)

    report = Report("every preset", list(rows.values()), settings)
    for table in report.tables():
        console.print(table)
    generated = Table("preset", f"forty greedy tokens after {options.prompt!r}")
    for preset, text in samples.items():
        generated.add_row(preset, text)
    console.print(generated)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draft = options.out.with_suffix(".writing")
    draft.write_text(json.dumps(report.to_dict() | {"generated": samples}, indent=1) + "\n")
    shutil.move(draft, options.out)
    console.print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
