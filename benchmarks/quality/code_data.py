"""Python source that the machine has, as training ids and held-out projects: licences read, copies left out."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lizard_models.files.folders import appear_whole, sha256_of
from lizard_models.files.sources import Say, silent
from lizard_models.text.look_ups import look_up_rows
from lizard_models.text.sequences import PackedTokens
from lizard_models.text.text_start import text_start

PERMISSIVE = re.compile(
    r"(MIT|MIT-0|MIT-CMU|HPND|ISC|0BSD|Zlib|CC0-1\.0|Unlicense|BSL-1\.0|LLVM-exception|CNRI-Python|Python-2\.0(\.1)?"
    r"|PSF(-2\.0)?|BSD([- ][234]-Clause)?|Apache([- ]2(\.0)?)?|MIT License|ISC License \(ISCL\)|BSD License"
    r"|BSD [23]-Clause License|Apache Software License|Apache 2\.0 License|Apache License,? Version 2\.0"
    r"|Python Software Foundation License)",
    re.IGNORECASE,
)
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "lib2to3")  # of the standard library: others' code
OWN = "lizard-attn"
WINDOW = 6  # lines that are not blank, for copies
SAMPLED = 4  # one window in so many is remembered, chosen by what it says
COPIED = 0.5  # a file with a larger share of windows seen before is a copy
CHARACTERS = (200, 400_000)  # of a file that is taken: less says nothing, more is a table


class SourceFile(NamedTuple):
    """One file of a project."""

    project: str
    path: str  # inside the project, with /
    text: str


class Project(NamedTuple):
    """A distribution with its source files."""

    name: str
    version: str
    licence: str
    files: dict[str, Path]  # by the path inside it


@dataclass(frozen=True, kw_only=True)
class CodePlan:
    """What is made of the source."""

    held_out: float = 0.05
    """Share of the characters, in whole projects, at most; counted before copies between the two parts are left out."""
    tokens: int | None = None
    """Of training, at most; None for all there are. Files are taken in an order drawn over all projects."""
    look_ups: int = 0
    """Rows with passages and records that come again, as stage 0 has them (``text.look_ups``), in their own file."""
    look_up_length: int = 4096
    seed: int = 0


def installed_projects() -> list[Project]:
    """The standard library and every installed distribution whose licences are all permissive, by name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    own = {
        path.relative_to(stdlib).as_posix(): path
        for path in sorted(stdlib.rglob("*.py"))
        if not set(path.relative_to(stdlib).parts) & set(LEFT_OUT)
    }
    projects = {"python": Project("python", platform.python_version(), "PSF-2.0", own)}
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        licence = permissive_licence(found.metadata)
        if licence is None or name in projects or name == OWN:
            continue
        listed = [row[0] for row in csv.reader((found.read_text("RECORD") or "").splitlines()) if row]
        files = {path: Path(str(found.locate_file(path))) for path in listed if path.endswith(".py")}
        projects[name] = Project(name, found.version, licence, {k: v for k, v in files.items() if ".." not in k})
    return [projects[name] for name in sorted(projects)]


def permissive_licence(metadata: Any) -> str | None:
    """The licence of a distribution if every part of it is permissive, else None; also where it says none.

    Read from the SPDX expression if there is one, else from the classifiers, else from a short licence field.
    """
    field = (metadata.get("License") or "").strip()
    classified = [c.split("::")[-1].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    classified = [c for c in classified if c not in ("OSI Approved", "DFSG approved")]
    if metadata.get("License-Expression"):
        field = metadata["License-Expression"].strip()
    elif classified:
        return ", ".join(classified) if all(PERMISSIVE.fullmatch(part) for part in classified) else None
    parts = [part.strip(" ()") for part in re.split(r"\b(?:AND|OR|WITH)\b", field)]
    return field if field and all(PERMISSIVE.fullmatch(part) for part in parts) else None


def read_sources(projects: Iterable[Project]) -> Iterator[SourceFile]:
    """Files that are UTF-8 and neither tiny nor huge, in the order of their paths."""
    for project in projects:
        for name, path in sorted(project.files.items()):
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            text = text.replace("\r\n", "\n")
            if CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
                yield SourceFile(project.name, name, text)


def without_copies(files: Iterable[SourceFile]) -> Iterator[SourceFile]:
    """Files of whose runs of six lines at most half were in files before them: the first of several copies.

    Blank lines and indentation do not count. Files shorter than that are compared whole.
    """
    seen: set[bytes] = set()
    for file in files:
        runs = _runs(file.text)
        if sum(run in seen for run in runs) <= COPIED * len(runs):
            yield file
        seen |= runs


def _runs(text: str) -> set[bytes]:
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    runs = {
        hashlib.blake2b("\n".join(lines[i : i + WINDOW]).encode(), digest_size=8).digest()
        for i in range(max(1, len(lines) - WINDOW + 1))
    }
    return {run for run in runs if run[0] % SAMPLED == 0} or runs


def held_out_names(sizes: dict[str, int], share: float, seed: int) -> list[str]:
    """Projects to hold out: in an order drawn from their names, each that still fits into ``share`` of the characters.

    sizes: characters by project. Raises ValueError if none fits or none would be left.
    """
    room, chosen = share * sum(sizes.values()), []
    for name in sorted(sizes, key=lambda name: _drawn(seed, name)):
        if 0 < sizes[name] <= room:
            room -= sizes[name]
            chosen.append(name)
    if not chosen or len(chosen) == len(sizes):
        raise ValueError(f"held_out={share}: {len(chosen)} of {len(sizes)} projects fit; wanted some, and some left")
    return sorted(chosen)


def _drawn(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def write_code_data(
    out: Path,
    projects: Sequence[Project],
    tokenizer: PreTrainedTokenizerBase,
    plan: CodePlan,
    say: Say = silent,
) -> dict[str, Any]:
    """Writes ids of the source of ``projects`` into a new folder, and returns its manifest. The same input, the same
    files, byte for byte.

    - train.npy: uint32 [T], files of the other projects, each as the tokenizer begins a text, an end-of-text token
      after it;
    - held_out/PROJECT.npy: uint32 [T], the files of a project in the order of their paths, each after a line that names
      it, for loss by position;
    - held_out.jsonl: their text, with project and path, for measures that need lines;
    - look_ups.npy: uint32 [N, L], if the plan wants rows;
    - manifest.json: projects with version, licence, files, characters and part; counts; the sha256 of every file.

    Held-out projects are read first, so that what is held out is not in the training text under another name.
    """
    sizes = {project.name: 0 for project in projects}
    for file in without_copies(read_sources(projects)):
        sizes[file.project] += len(file.text)
    held = held_out_names(sizes, plan.held_out, plan.seed)
    order = sorted(projects, key=lambda project: (project.name not in held, project.name))
    kept = list(without_copies(read_sources(order)))
    say(f"{len(kept)} files of {len(projects)} projects; held out: {', '.join(held)}")
    with appear_whole(out, shared=False) as draft:
        counts = _write_held_out(draft, [file for file in kept if file.project in held], tokenizer)
        training = sorted((file for file in kept if file.project not in held), key=_draw_of(plan.seed))
        ids = _encode(training, tokenizer, plan.tokens)
        np.save(draft / "train.npy", ids)
        counts["train"] = len(ids)
        if plan.look_ups:
            packed = PackedTokens(ids, plan.look_up_length, plan.seed)
            rows = look_up_rows(packed, tokenizer, plan.look_ups, seed=plan.seed)
            np.save(draft / "look_ups.npy", rows.sequences.astype(np.uint32))
        manifest = {
            "plan": {"held_out": plan.held_out, "tokens": plan.tokens, "look_ups": plan.look_ups,
                     "look_up_length": plan.look_up_length, "seed": plan.seed},
            "python": sys.version.split()[0],
            "vocabulary": len(tokenizer),
            "tokens": counts,
            "projects": [_told(project, kept, project.name in held) for project in projects],
            "sha256": {p.relative_to(draft).as_posix(): sha256_of(p) for p in sorted(draft.rglob("*")) if p.is_file()},
        }  # fmt: skip
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _draw_of(seed: int) -> Any:
    return lambda file: _drawn(seed, f"{file.project}/{file.path}")


def _told(project: Project, kept: list[SourceFile], held: bool) -> dict[str, Any]:
    own = [file for file in kept if file.project == project.name]
    told: dict[str, Any] = {"name": project.name, "version": project.version, "licence": project.licence}
    characters = sum(len(file.text) for file in own)
    part = "held out" if held else "train"
    return told | {"found": len(project.files), "files": len(own), "characters": characters, "part": part}


def _write_held_out(draft: Path, files: list[SourceFile], tokenizer: Any) -> dict[str, int]:
    (draft / "held_out").mkdir()
    counts = {}
    with (draft / "held_out.jsonl").open("w") as sink:
        for name in sorted({file.project for file in files}):
            own = [file for file in files if file.project == name]
            whole = "".join(f"# {name}/{file.path}\n{file.text}\n" for file in own)
            ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
            ids = np.array(text_start(tokenizer) + ids, np.uint32)
            np.save(draft / "held_out" / f"{name}.npy", ids)
            counts[f"held_out/{name}"] = len(ids)
            for file in own:
                sink.write(json.dumps(file._asdict()) + "\n")
    return counts


def _encode(files: list[SourceFile], tokenizer: Any, limit: int | None) -> np.ndarray:
    before, end, parts, total = text_start(tokenizer), [tokenizer.eos_token_id], [], 0
    for start in range(0, len(files), 64):
        texts = [file.text for file in files[start : start + 64]]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array(before + ids + end, np.uint32))
            total += len(parts[-1])
        if limit is not None and total >= limit:
            break
    return np.concatenate(parts)[:limit]
