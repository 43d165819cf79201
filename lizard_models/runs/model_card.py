"""The model card of a saved Lizard, written from the run's own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from lizard_models.files.environment import environment
from lizard_models.model.layer_configs import attention_config, converted_layers
from lizard_models.runs.memory import kept_bytes, lizard_bytes, told_places
from lizard_models.teachers.loading import TRAINING

CARD, EVALUATION = "README.md", "evaluation.json"
TEXT = """---
{metadata}
---

# {name}, linearized

A constant-memory language model, made from **{teacher}** with lizard-attn by the Lizard method
([arXiv 2507.09025](https://arxiv.org/abs/2507.09025)): gated linear attention with learned feature maps, a sliding
window and the first tokens in place of softmax attention.

## Load it

```python
import lizard_models  # pip install lizard-attn; registers the classes, so trust_remote_code is not needed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder or repository")
tokenizer = AutoTokenizer.from_pretrained("this folder or repository")
```

## How it was made

{made}

## What was measured

{measured}

## Licence

Weights derive from the teacher's and stay under its licence{licence}. Training data carry licences of their own.
"""


def write_model_card(folder: Path, teacher_folder: str | Path | None = None) -> Path:
    """Writes README.md into a saved model's folder from its training.json, evaluation.json and config.json.

    teacher_folder: where the teacher was read from; the licence is what its own card there names, unknown if it has no
    card. Returns the file.
    """
    training, evaluation, config = (_read(folder / name) for name in (TRAINING, EVALUATION, "config.json"))
    teacher = str(training.get("teacher", "an unrecorded teacher"))
    licence = _licence(teacher_folder)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=teacher if _is_hub_name(teacher) else None,
        license=licence,
        tags=["lizard-attn", "linear-attention", config.get("model_type", "lizard")],
    )
    made = _made(training, evaluation.get("environment") or environment())
    text = TEXT.format(
        metadata=metadata.to_yaml(),
        name=Path(teacher).name,
        teacher=teacher,
        made="\n".join([*made[:1], *_state(folder), *made[1:]]),
        measured="\n".join(_measured(evaluation)),
        licence=f" ({licence})" if licence else ", which its card names",
    )
    ModelCard(text).save(folder / CARD)
    return folder / CARD


def _made(training: dict[str, Any], made_on: dict[str, Any]) -> list[str]:
    config = training.get("config", {})
    attention = config.get("attention", {})
    kept = config.get("softmax_layers") or "none"
    wide = f"; window {config['wide_window']} in layers {config['wide_layers']}" if config.get("wide_layers") else ""
    stretch = config.get("wide_gate_stretch", 1)
    wide += f", decays slower by {stretch:g}" if wide and stretch != 1 else ""
    places = attention.get("kept_keys")
    keys = f", {'kept keys by head' if isinstance(places, list) else f'{places} kept keys'}" if places else ""
    weights = ", ".join(f"{weight:g}" for weight in training.get("weights", []))
    weighed = f", by weights of {weights}" if weights else ""
    lines = [
        f"- preset `{config.get('name', 'unknown')}`: window {attention.get('window')}, {attention.get('anchors')} "
        f"anchors{keys}, gate `{attention.get('gate')}`, coverage `{attention.get('coverage')}`, mix "
        f"`{attention.get('mix')}`; layers kept softmax: {kept}{wide}",
        f"- data: {', '.join(training.get('data', [])) or 'none, the new parameters are untrained'}{weighed}",
    ]
    for name, stage in training.get("stages", {}).items():
        recipe = config.get(name, {})
        losses = [loss for _, loss in stage["losses"]]
        course = f", loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last" if losses else ""
        lines.append(
            f"- {name}: {stage['steps']} steps of {recipe.get('batch_size')} x {recipe.get('sequence_length')} tokens, "
            f"{stage['parameters']:,} parameters trained{course}; hash of the data `{stage['data'] or 'none'}`"
        )
        if heads := [value for layer in stage.get("r2", []) for value in layer]:
            lines[-1] += f"; R2 of the scores {sum(heads) / len(heads):.3f} on held-out rows"
    versions = ", ".join(f"{name} {version}" for name, version in made_on["versions"].items() if version)
    lines.append(f"- with Python {made_on['python']}, {versions}, on {made_on['device']}, {made_on['date']}")
    lines.append(f"- everything else: `{TRAINING}` and `config.json` in this folder")
    return lines


def _state(folder: Path) -> list[str]:
    """What a sequence takes, of models that keep keys."""
    if not _read(folder / "config.json").get("lizard", {}).get("attention", {}).get("kept_keys"):
        return []
    config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    size, kept = lizard_bytes(config, 8192, dtype), kept_bytes(config, dtype)
    lines = [
        f"- state of a sequence of 8,192 tokens: {size:,} bytes with keys in {str(dtype).removeprefix('torch.')}, of "
        f"which kept keys take {kept:,}"
    ]
    layers = {i: attention_config(config, i).kept_by_head for i in converted_layers(config)}
    if len({n for heads in layers.values() for n in heads}) > 1:
        shown = "; ".join(f"layer {i}: {' '.join(map(str, heads))}" for i, heads in layers.items())
        lines.append(f"- kept keys: {told_places(config)}: {shown}")
    return lines


def _measured(evaluation: dict[str, Any]) -> list[str]:
    rows = evaluation.get("rows", [])
    curves = [row for row in rows if row["loss"]]
    lines: list[str] = []
    if curves:
        edges = curves[0]["loss"]["edges"]
        ranges = [f"{start} to {end}" for start, end in zip(edges, edges[1:], strict=False)]
        cells = [[row["name"], *(_number(mean) for mean in row["loss"]["means"])] for row in curves]
        digest = evaluation["settings"].get("eval_hash")
        lines += [f"Loss in nats by position, on held-out text (hash `{digest}`):", "", *_table(["", *ranges], cells)]
    finds = [row for row in rows if row["passkey"]]
    if finds:
        lengths = list(finds[0]["passkey"])
        cells = [[row["name"], *(f"{share:.0%}" for share in row["passkey"].values())] for row in finds]
        lines += ["", "Passkeys found, by length of the text:", "", *_table(["", *lengths], cells)]
    return lines or ["Nothing yet."]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _is_hub_name(teacher: str) -> bool:
    return teacher.count("/") == 1 and not teacher.startswith((".", "/", "~")) and not Path(teacher).exists()


def _licence(teacher_folder: str | Path | None) -> str | None:
    card = Path(teacher_folder or "") / CARD
    if teacher_folder is None or not card.is_file():
        return None
    return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
