"""The safetensors files of a saved model, checked before any weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

ADAPTER = "adapter_model"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "name_or_path")  # of a config
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Shard(NamedTuple):
    """A safetensors file and the shapes of its tensors."""

    path: Path
    shapes: dict[str, tuple[int, ...]]


def read_shards(folder: Path) -> list[Shard]:
    """The safetensors files that hold a saved model, in order of their names; only their headers are read.

    Raises ValueError, with the file's name, for a folder without weights in safetensors, an index that is damaged or
    names files that are not there, and a file that is damaged or cut short.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        names = [SAFE_WEIGHTS_NAME]
    elif index.is_file():
        names = _named_in(index)
    else:
        pickles = _pickles(folder)
        shown = ", ".join(pickles[:3]) + (" ..." if len(pickles) > 3 else "")
        found = f"found {shown}: pickles, which can run code and are never read" if pickles else "found no weights"
        raise ValueError(f"{str(folder)!r}: {found}; wanted {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}")
    return [read_header(folder / name) for name in names]


def read_header(path: Path) -> Shard:
    """Names and shapes of a safetensors file.

    Raises ValueError if it is missing, damaged or cut short, and OSError for one that the system does not let us read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the index names it: fetch or copy the model again")
    path.open("rb").close()  # safetensors would say that it does not exist
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch or copy the model again") from error
    return Shard(path, shapes)


def refuse_pickled_adapter(folder: Path) -> None:
    """Raises ValueError where transformers would read a peft adapter beside the model from a pickle."""
    if (folder / f"{ADAPTER}.bin").is_file() and not (folder / f"{ADAPTER}.safetensors").is_file():
        raise ValueError(f"{folder / ADAPTER}.bin is a pickle, which can run code and is never read: save it again")


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold NaN or infinity; the device is asked once.

    Tensors without memory (on the meta device) and integers, as of quantized weights, have none.
    """
    kept = {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor.dtype in FLOATS and tensor.numel() and not tensor.is_meta
    }
    if not kept:
        return []
    device = next(iter(kept.values())).device
    largest = torch._foreach_norm(list(kept.values()), math.inf)  # of NaN it is NaN
    finite = torch.stack([norm.to(device, torch.float32) for norm in largest]).isfinite().tolist()
    return [name for name, good in zip(kept, finite, strict=True) if not good]


def content_digest(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """sha256 of a model: names, shapes, dtypes and every byte of its tensors, and its configuration.

    The same for the same model on another device, in other files, or saved by another version of transformers.
    """
    kept = {key: value for key, value in config.items() if key not in VOLATILE and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def name_some(names: Sequence[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def data_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but its header and the header's length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _named_in(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}): fetch or copy the model again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file of its folder")
    return names


def _pickles(folder: Path) -> list[str]:
    return sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
