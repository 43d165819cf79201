"""Options that several commands share, and readers of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.", show_default=False)]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16, of the teacher's weights; new parameters stay float32."),
]
Cache = Annotated[
    str | None,
    typer.Option(help="Folder for fetched and converted files; default $LIZARD_CACHE, else ~/.cache/lizard-attn."),
]
Encoding = Annotated[
    str,
    typer.Option(help="What text files and JSON are in, e.g. latin-1; anything that is not is refused by its line."),
]
Positions = Annotated[
    str | None,
    typer.Option(
        help="true or clamped: distance to the anchors past the teacher's context; default: as the model was saved."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the preset, e.g. attention.window=64. May be repeated.",
    ),
]
SoftmaxLayers = Annotated[
    str | None, typer.Option(help="Layers that keep the teacher's softmax attention, e.g. 3,11,19,27.")
]
SoftmaxShare = Annotated[
    float | None, typer.Option(help="Share of the layers that keep it, evenly placed, e.g. 0.25; instead of a list.")
]
KeptKeys = Annotated[
    int | None,
    typer.Option(
        help="Keys per key head that stay exact beyond the window, chosen by a learned score, e.g. 256; default: the "
        "preset's. linearize shares out the bytes of so many over layers and heads where stage0.share_places says so, "
        "as preset recommended does.",
        min=0,
        show_default=False,
    ),
]
KeepSliding = Annotated[
    bool | None,
    typer.Option(
        "--keep-sliding/--convert-sliding",
        help="What becomes of a teacher's sliding-window layers; default: kept if it has full attention layers too.",
        show_default=False,
    ),
]


def read_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by name. Raises ValueError for others than float32 and bfloat16."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}
    if name not in known:
        raise ValueError(f"--dtype is {name!r}, wanted float32 or bfloat16")
    return known[name]


def read_device(name: str | None, option: str = "--device") -> str:
    """A device that is there. Raises ValueError for one that is not."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"{option} is {name!r}, wanted cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} cuda: torch finds no CUDA device here; leave it out, or give cpu")
    return name


def read_numbers(text: str | None, option: str) -> list[int]:
    """Positive whole numbers with commas between them. Raises ValueError naming ``option``."""
    try:
        numbers = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"{option} is {text!r}, wanted positive numbers such as 256,1024")
    return numbers


def check_folder(out: Path | None) -> None:
    """Raises ValueError for a folder to write that is a file, or in one."""
    there = next((p for p in (out, *out.absolute().parents) if p.exists()), out) if out is not None else None
    if there is not None and not there.is_dir():
        raise ValueError(f"out: {str(there)!r} is not a folder")


def read_resume(text: str | None) -> Any:
    """What ``--resume`` says, as a ``Plan`` has it. Raises ValueError for anything but auto after it."""
    known = {None: False, "yes": True, "auto": "auto"}
    if text not in known:
        raise ValueError(f"--resume is {text!r}, wanted nothing after it, or auto")
    return known[text]


def read_kept(layers: str | None, share: float | None, sliding: bool | None) -> dict[str, Any]:
    """What the three options about kept layers change in a ``LizardConfig``; None changes nothing."""
    try:
        indices = None if layers is None else [int(part) for part in layers.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--softmax-layers is {layers!r}, wanted layer numbers from 0 such as 3,11,19,27") from None
    changes = {"softmax_layers": indices, "softmax_share": share, "keep_sliding_layers": sliding}
    return {name: value for name, value in changes.items() if value is not None}


def read_kept_keys(number: int | None) -> dict[str, Any]:
    """What ``--kept-keys`` changes in a ``LizardConfig``; None changes nothing."""
    return {} if number is None else {"attention": {"kept_keys": number}}


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Changes of a ``LizardConfig``: the second's, and the first's where it has none, one level down as well."""
    inner = {key: first[key] | second[key] for key in first.keys() & second.keys() if isinstance(second[key], dict)}
    return first | second | inner


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """FIELD=VALUE pairs as the nested changes of ``LizardConfig.replace``; values are JSON or plain words."""
    changes: dict[str, Any] = {}
    for pair in pairs or []:
        field, equals, text = pair.partition("=")
        if not equals or not field:
            raise ValueError(f"--set {pair!r}: wanted FIELD=VALUE, e.g. attention.window=64")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        section, dot, name = field.partition(".")
        if dot:
            changes.setdefault(section, {})[name] = value
        else:
            changes[section] = value
    return changes
