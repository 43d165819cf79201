"""Cases of places, rights, and of what is at them: folders, permissions, teachers, models, states, prompts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.faults.inputs import ANY, SHORT, Case, InputWorld

Make = Callable[[Path, InputWorld], list[str]]


def _file(folder: Path) -> Path:
    (folder / "a").write_text("1")
    return folder / "a"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a")
    return folder / "a"


def _link(folder: Path, to: str) -> Path:
    (folder / "a").symlink_to(to)
    return folder / "a"


PLACES: dict[str, Callable[[Path], Path | str]] = {
    "a file": _file,
    "in a file": lambda folder: _file(folder) / "b",
    "a folder": lambda folder: folder,
    "the current": lambda folder: ".",
    "its parent": lambda folder: "..",
    "the root": lambda folder: "/",
    "nothing": lambda folder: "",
    "a long name": lambda folder: folder / ("x" * 300),
    "many folders": lambda folder: folder / ("a/" * 3000),
    "in /proc": lambda folder: "/proc/x/y",
    "/dev/null": lambda folder: "/dev/null",
    "in /dev/null": lambda folder: "/dev/null/x",
    "a NUL": lambda folder: "a\0b",
    "a dangling link": lambda folder: _link(folder, "nowhere") / "b",
    "a link to itself": lambda folder: _link(folder, "a") / "b",
    "a pipe": _pipe,
    "no home": lambda folder: "~nobody-at-all/x",
}


def folders() -> Iterator[Case]:
    """Places to write to, to keep things in and to begin from."""
    area = "folders"
    for name, place in PLACES.items():
        yield Case(area, f"--out is {name}", lambda f, w, p=place: w.linearize(f, "--out", p(f)), ANY)
        yield Case(area, f"--cache is {name}", lambda f, w, p=place: w.linearize(f, "--cache", p(f)), ANY)
        make = lambda f, w, p=place: w.linearize(f, "--from", p(f), "--stage2-steps", 1)  # noqa: E731
        yield Case(area, f"--from is {name}", make, ANY)
        yield Case(area, f"report of {name}", lambda f, w, p=place: ["report", str(p(f))], ANY)
        make = lambda f, w, p=place: ["convert", str(w.teacher), "--out", str(p(f))]  # noqa: E731
        yield Case(area, f"convert to {name}", make, ANY)
        make = lambda f, w, p=place: ["generate", str(w.model), "a", "-n", "1", "--save-state", str(p(f))]  # noqa: E731
        if "/dev" not in name:  # what a fault would put a file in place of
            yield Case(area, f"--save-state is {name}", make, ANY, name == "a file")
    inside = lambda f, w: w.linearize(f, "--out", f / "d" / "out", data=_texts(f))  # noqa: E731
    yield Case(area, "--out in the data", inside, "read as text")


def _texts(folder: Path) -> Path:
    (folder / "d").mkdir()
    (folder / "d" / "a.txt").write_text("a")
    return folder / "d"


def permissions() -> Iterator[Case]:
    """What the system does not let the user read or write."""

    def closed(path: Path, mode: int = 0) -> Path:
        path.chmod(mode)
        return path

    def of_a_copy(source: str, name: str, command: Callable[[Path], list[str]]) -> Make:
        def make(folder: Path, world: InputWorld) -> list[str]:
            shutil.copytree(getattr(world, source), folder / "copy")
            closed(next((folder / "copy").glob(name)))
            return command(folder)

        return make

    places: dict[str, tuple[Make, str]] = {
        "a file of text": (lambda f, w: w.linearize(f, data=closed(_texts(f) / "a.txt")), "a.txt: Permission denied"),
        "a folder of text": (lambda f, w: w.linearize(f, data=closed(_texts(f))), "Permission denied|holds none"),
        "where a model goes": (lambda f, w: w.linearize(f, "--out", closed(_texts(f), 0o555) / "x" / "out"), ANY),
        "where a conversion goes": (
            lambda f, w: ["convert", str(w.teacher), "--out", str(closed(_texts(f), 0o555) / "out")],
            "Permission denied",
        ),
    }
    for name in ("config.json", "*.safetensors", "tokenizer.json"):
        convert = of_a_copy("teacher", name, lambda f: ["convert", str(f / "copy"), "--out", str(f / "out")])
        write = of_a_copy("model", name, lambda f: ["generate", str(f / "copy"), "a", "-n", "1"])
        places |= {f"{name} of a teacher": (convert, "Permission|not readable|ermission")}
        places |= {f"{name} of a model": (write, "Permission|not readable|ermission")}
    for name, (make, wanted) in places.items():
        yield Case("permissions", name, make, wanted, held_back=True)


BROKEN = {
    "empty": b"",
    "{": b"{",
    "[]": b"[]",
    "5": b"5",
    "null": b"null",
    "bytes": b"\xff\xfe\x00",
    "deep": b"[" * 99_999,
}
CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": 65},
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"hidden_size": "a"},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 3},
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": "3"},
    {"vocab_size": 0},
    {"vocab_size": 10**12},
    {"vocab_size": None},
    {"hidden_act": "nope"},
    {"hidden_act": 5},
    {"model_type": "nope"},
    {"model_type": 5},
    {"model_type": None},
    {"rope_parameters": 5},
    {"rope_parameters": []},
    {"rope_parameters": {"rope_type": "nope"}},
    {"rope_parameters": {"rope_type": "linear"}},
    {"quantization_config": 5},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"_attn_implementation": "owner/kernel"},
    {"dtype": "nope"},
    {"head_dim": 15},
    {"head_dim": 0},
    {"head_dim": -16},
    {"intermediate_size": -4},
    {"max_position_embeddings": 0},
    {"architectures": 5},
    {"attention_dropout": "a"},
    {"rms_norm_eps": "a"},
    {"tie_word_embeddings": "a"},
    {"attention_bias": 7},
    {"layer_types": ["nope"]},
    {"eos_token_id": "a"},
    {"auto_map": {"AutoConfig": "evil.Evil"}},
    {"sliding_window": -5},
]


def models() -> Iterator[Case]:
    """Teachers and models whose files are none, or fit nothing."""
    area = "teachers and models"
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    for name, (content, data) in product(files, BROKEN.items()):
        make = _copy("teacher", name, data, _student)
        yield Case(area, f"a teacher's {name}: {content}", make, "error: (teacher|the tokenizer of) '")
    for change in CONFIGS:
        wanted = rf"teacher|rope|heads|layer|attention|{SHORT}"
        yield Case(
            area, f"a teacher with {json.dumps(change)}", _copy("teacher", "config.json", change, _student), wanted
        )
    for name, (content, data) in product(("config.json", "tokenizer.json", "SHA256SUMS"), BROKEN.items()):
        make = _copy("model", name, data, lambda f, w: ["generate", str(f / "copy"), "a", "-n", "1"])
        yield Case(
            area,
            f"a model's {name}: {content}",
            make,
            r"error: model|error: the tokenizer|SHA256SUMS|config\.json is damaged",
            name != "config.json",
        )
    for content, data in BROKEN.items():
        for option, prompt in (("--load-state", ["a"]), ("--prompt-file", [])):
            words = [*prompt, option, "copy/state", "-n", "1"]
            make = _copy("model", "state", data, lambda f, w, m=words: ["generate", "copy", *m])
            yield Case(area, f"{option}: {content}", make, r"state|prompt", option == "--prompt-file")
    for name in (
        "",
        " ",
        "nowhere",
        "a/b/c",
        "../..",
        "owner/name",
        "/dev/null",
        "http://x/y",
        "~",
        "a\0b",
        "x" * 5000,
        "[red]",
    ):
        yield Case(area, f"a teacher named {name[:30]!a}", lambda f, w, n=name: w.linearize(f, teacher=n), ANY)


def _student(folder: Path, world: InputWorld) -> list[str]:
    return world.linearize(folder, teacher=folder / "copy")


def _copy(source: str, name: str, data: Any, command: Make) -> Make:
    def make(folder: Path, world: InputWorld) -> list[str]:
        shutil.copytree(getattr(world, source), folder / "copy")
        path = folder / "copy" / name
        if name != "SHA256SUMS":
            (folder / "copy" / "SHA256SUMS").unlink(missing_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(json.loads(path.read_text()) | data).encode())
        return command(folder, world)

    return make
