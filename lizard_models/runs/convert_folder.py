"""From a teacher's folder to an untrained Lizard's folder, one shard at a time, for models larger than memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lizard_models.config import LizardConfig
from lizard_models.files.folders import appear_whole, check_space, write_sums
from lizard_models.files.sources import Say, expanded, silent
from lizard_models.files.weights import Shard, data_bytes, nonfinite, read_shards
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.families.support import family_of
from lizard_models.model.linearize import start_new_parameters, student_config
from lizard_models.model.safe_loading import OLD_BUFFERS
from lizard_models.runs.memory import told_places
from lizard_models.runs.model_card import write_model_card
from lizard_models.teachers.find import find_teacher, load_tokenizer, save_tokenizer
from lizard_models.teachers.loading import TRAINING


def linearize_folder(
    source: str | os.PathLike,
    out: str | os.PathLike,
    config: LizardConfig,
    *,
    dtype: torch.dtype | None = None,
    cache: str | os.PathLike | None = None,
    say: Say = silent,
) -> Path:
    """Writes the untrained Lizard model of a saved teacher without holding its weights in memory.

    The teacher's tensors keep their names and bits: each of its safetensors files is copied as it is, and one more
    holds the new parameters, float32. Memory is that of the new parameters alone. With ``dtype`` floating tensors are
    cast, which takes the memory of one shard in that dtype. ``AutoModelForCausalLM.from_pretrained(out)`` then gives
    what ``linearize(teacher, config)`` does after ``torch.manual_seed(config.stage1.seed)``.

    source: a local folder, a hub name or smollm2-135m, as ``load_teacher`` takes it. out: must not exist; it appears
    when it is whole. cache, say: as in ``load_teacher``. Returns ``out``.

    Raises ValueError for a disk that is too small, what ``find_teacher`` and ``linearize`` refuse, a quantized teacher,
    weights that are not in safetensors, a damaged shard, and tensors that are missing, unexpected or of another shape
    than the model's.
    """
    target = expanded(out, "out")
    if target.exists():
        raise ValueError(f"out: {str(target)!r} exists already; give another folder, or delete it")
    folder, teacher = _local_teacher(str(source), cache, say)
    if getattr(teacher, "quantization_config", None) is not None:
        raise ValueError(
            f"teacher {str(source)!r} is quantized: linearize its unquantized weights, quantize afterwards"
        )
    chosen = student_config(teacher, config)
    if dtype is not None:
        chosen.dtype = dtype
    if config.attention.keeps_keys:
        say(f"kept keys: {told_places(chosen)}, those least like the mean key: no score is fitted here")
    family = family_of(teacher)
    with torch.device("meta"):
        student = family(chosen)
    shards = read_shards(folder)
    _check_tensors(student, shards, folder)
    check_space(target, _bytes_to_write(student, dtype), "the converted model")
    with appear_whole(target, shared=False) as draft:
        names = [f"model-{i:05d}-of-{len(shards) + 1:05d}.safetensors" for i in range(1, len(shards) + 2)]
        where: dict[str, str] = {}
        total = 0
        for shard, name in zip(shards, names, strict=False):
            say(f"{shard.path.name} -> {name}")
            total += _write_shard(shard, draft / name, dtype)
            where |= dict.fromkeys(shard.shapes, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.stage1.seed)
            loaded: Any = dtype or chosen.dtype
            new = dict(_new_parameters(student, shards, loaded))
        if new:
            say(f"{len(new)} new parameters -> {names[-1]}")
        save_file(new, draft / names[-1], metadata={"format": "pt"})
        where |= dict.fromkeys(new, names[-1])
        total += sum(tensor.nbytes for tensor in new.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (draft / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        _write_companions(folder, draft, chosen)
        record = {"teacher": str(source), "config": config.to_dict(), "stages": {}}
        (draft / TRAINING).write_text(json.dumps(record, indent=2) + "\n")
        write_model_card(draft, folder)
        say("writing the sha256 of every file")
        write_sums(draft)
    return target


def _local_teacher(source: str, cache: str | os.PathLike | None, say: Say) -> tuple[Path, PretrainedConfig]:
    found, config = find_teacher(source, cache=cache, say=say)
    if not Path(found).is_dir():
        say(f"teacher: {found} from the hub")
        found = snapshot_download(found, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"])
    return Path(found), config


def _check_tensors(student: LizardCausalLM, shards: list[Shard], folder: Path) -> None:
    wanted = {name: tuple(t.shape) for name, t in student.state_dict().items() if ".lizard." not in name}
    found = {name: shape for shard in shards for name, shape in shard.shapes.items() if OLD_BUFFERS not in name}
    tied = {"lm_head.weight"} if student.config.tie_word_embeddings else set()
    problems = {
        "missing": wanted.keys() - found.keys() - tied,
        "unexpected": found.keys() - wanted.keys(),
        "misshapen": {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]},
    }
    for kind, names in problems.items():
        if names:
            first = sorted(names)
            more = f" and {len(first) - 3} more" if len(first) > 3 else ""
            raise ValueError(f"{str(folder)!r} has {kind} tensors for its config.json: {', '.join(first[:3])}{more}")


def _bytes_to_write(student: LizardCausalLM, dtype: torch.dtype | None) -> int:
    new = {name for name, _ in student.lizard_parameters()}
    saved: Any = dtype or student.config.dtype or torch.float32
    return sum(p.numel() * (4 if name in new else saved.itemsize) for name, p in student.named_parameters())


def _write_shard(shard: Shard, target: Path, dtype: torch.dtype | None) -> int:
    """Writes one of the teacher's shards, finite or refused, and returns the bytes of its tensors."""
    if dtype is None:
        with safe_open(shard.path, framework="pt") as file:
            for name in shard.shapes:
                _check_finite(shard.path, name, file.get_tensor(name))
        shutil.copyfile(shard.path, target)
        return data_bytes(target)
    tensors: dict[str, Tensor] = {}
    with safe_open(shard.path, framework="pt") as file:
        for name in shard.shapes:
            tensor = file.get_tensor(name)
            _check_finite(shard.path, name, tensor)
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            _check_finite(shard.path, name, tensors[name], f" as {dtype}")
            del tensor  # so that one is held twice at most
    save_file(tensors, target, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _check_finite(path: Path, name: str, tensor: Tensor, cast: str = "") -> None:
    if nonfinite({name: tensor}):
        remedy = "give another dtype" if cast else "fetch or copy the teacher again"
        raise ValueError(f"teacher: {name} in {str(path)!r} is not finite{cast}: {remedy}")


def _new_parameters(
    student: LizardCausalLM, shards: list[Shard], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and starts of the parameters the teacher does not have; ``student`` is on the meta device.

    shards, dtype: where the teacher's biases are, and what they are once the model is loaded.
    """
    names = {module: name for name, module in student.named_modules()}
    for attention in student.lizard_attentions():
        biases = [_read(shards, f"{names[attention]}.{part}.bias", dtype) for part in ("q_proj", "k_proj")]
        start_new_parameters(student, attention, "cpu", *biases)
    for name, parameter in student.lizard_parameters():
        yield name, parameter.detach().contiguous()


def _read(shards: list[Shard], name: str, dtype: torch.dtype | None) -> Tensor | None:
    """A tensor of the teacher's; None where it has none of this name."""
    for shard in shards:
        if name in shard.shapes:
            with safe_open(shard.path, framework="pt") as file:
                return file.get_tensor(name).to(dtype)
    return None


def _write_companions(folder: Path, draft: Path, config: PretrainedConfig) -> None:
    config.save_pretrained(draft)
    if (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder).save_pretrained(draft)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(draft)
    tokenizer: Any = load_tokenizer(str(folder))
    if tokenizer is not None:
        save_tokenizer(tokenizer, draft, config)
