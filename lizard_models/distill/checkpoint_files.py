"""What a Trainer needs to resume, as safetensors and JSON: checkpoints in which nothing is pickled."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from lizard_models.distill import parallel
from lizard_models.files.folders import sha256_of
from lizard_models.files.weights import PICKLES

OPTIMIZER, SCHEDULER = "optimizer.safetensors", "scheduler.json"
SUMS = "sums.json"
RNG = "rng_state_{}.safetensors"  # of each process


class StateFiles(Trainer):
    """Mixed into a Trainer: it writes and reads ``optimizer.safetensors``, ``scheduler.json`` and one
    ``rng_state_RANK.safetensors`` a process in place of transformers' pickles, and refuses checkpoints with pickles.

    They do not depend on how many processes wrote them, nor on whether the model was sharded.
    """

    optimizer: Any
    lr_scheduler: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = parallel.whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            save_optimizer_state(state, Path(output_dir) / OPTIMIZER)
            (Path(output_dir) / SCHEDULER).write_text(json.dumps(self.lr_scheduler.state_dict(), indent=2) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            refuse_pickles(Path(checkpoint))
            parallel.load_optimizer_state(self.optimizer, read_optimizer_state(Path(checkpoint) / OPTIMIZER))
            self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / SCHEDULER).read_text()))

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_rng_state(Path(output_dir) / RNG.format(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            count = max(1, len([*Path(checkpoint).glob(RNG.format("*"))]))  # processes that wrote it: others may go on
            load_rng_state(Path(checkpoint) / RNG.format(self.args.process_index % count))


def refuse_pickles(checkpoint: Path) -> None:
    """Raises ValueError where a training checkpoint holds pickled files; they are not opened."""
    if found := sorted(path.name for pattern in PICKLES for path in checkpoint.glob(pattern)):
        raise ValueError(
            f"{checkpoint} holds {', '.join(found)}: pickles, which can run code and are never read; "
            f"delete {str(checkpoint.parent)!r}, and train again"
        )


def write_sums(checkpoint: Path) -> None:
    """Writes the sha256 of every file of a checkpoint beside them, by name."""
    sums = {path.name: sha256_of(path) for path in sorted(checkpoint.iterdir())}
    (checkpoint / SUMS).write_text(json.dumps(sums, indent=2) + "\n")


def damaged(checkpoint: Path, required: bool) -> str:
    """What is wrong with a checkpoint's files, empty if nothing; a path, and why, otherwise.

    required: whether there must be sums. Checkpoints of earlier versions have none.
    """
    path = checkpoint / SUMS
    if not path.is_file():
        return f"{path} is missing" if required else ""
    try:
        sums = json.loads(path.read_text())
        found = {file.name for file in checkpoint.iterdir()} - {SUMS}
        for name in sorted(found | sums.keys()):
            if name not in found:
                return f"{checkpoint / name} is missing"
            if sums.get(name) != sha256_of(checkpoint / name):
                return f"{checkpoint / name} cannot be read (another sha256 than when it was written: damaged)"
    except (ValueError, AttributeError, OSError) as error:
        return f"{path} cannot be read ({error})"
    return ""


def save_optimizer_state(saved: dict[str, Any], path: Path) -> None:
    """Writes an optimizer's ``state_dict()``: tensors as such, numbers as JSON in the file's metadata."""
    entries = {f"state.{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}
    for i, group in enumerate(saved["param_groups"]):
        entries |= {f"group.{i}.{key}": value for key, value in group.items()}
    tensors = {key: value.detach().contiguous() for key, value in entries.items() if isinstance(value, Tensor)}
    values = json.dumps({key: value for key, value in entries.items() if key not in tensors})
    save_file(tensors, path, metadata={"values": values})


def read_optimizer_state(path: Path) -> dict[str, Any]:
    """The inverse of ``save_optimizer_state``. Raises ValueError for a file that is missing or damaged."""
    tensors, metadata = _read(path)
    state: dict[int, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for key, value in {**json.loads(metadata["values"]), **tensors}.items():
        kind, index, name = key.split(".", 2)
        (state if kind == "state" else groups).setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": [groups[i] for i in sorted(groups)]}


def save_rng_state(path: Path) -> None:
    """Writes the random states of Python, NumPy, torch and the current CUDA device."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, words, *rest = numpy.random.get_state(legacy=True)
    numpys = [kind, [int(word) for word in words], *rest]
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpys)}
    save_file(tensors, path, metadata=metadata)


def load_rng_state(path: Path) -> None:
    """The inverse of ``save_rng_state``. Raises ValueError for a file that is missing or damaged."""
    tensors, metadata = _read(path)
    version, words, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(tuple(json.loads(metadata["numpy"])))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete {str(path.parent)!r} to resume from an older checkpoint"
        ) from error
