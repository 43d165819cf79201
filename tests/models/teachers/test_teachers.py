"""Teachers: folders, names, architectures, and the one that the package index carries."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from readable import save_teacher
from tiny import teacher as tiny_teacher
from transformers import GPT2Config

from lizard_models import LizardConfig, linearize
from lizard_models.files import sources as downloads
from lizard_models.files.folders import appear_whole, write_sums
from lizard_models.files.sources import cache_dir, fetch_from_wheel
from lizard_models.teachers import find as teachers
from lizard_models.teachers import gguf as ours_gguf
from lizard_models.teachers.find import find_teacher, load_teacher


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, request):
    if "network" not in request.keywords:
        monkeypatch.setattr(teachers, "hub_answers", lambda path="": False)


def test_a_folder_is_loaded_frozen_with_its_tokenizer(tmp_path):
    loaded = load_teacher(str(save_teacher(tmp_path / "t")), dtype=torch.bfloat16)
    assert loaded.source == str(tmp_path / "t")
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer is not None and loaded.tokenizer.decode(loaded.tokenizer("mill")["input_ids"]) == "mill"


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    tiny_teacher().save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).tokenizer is None


def test_unusable_teachers_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    linearize(tiny_teacher(), LizardConfig.preset("plain")).save_pretrained(tmp_path / "lizard")
    for name, reason in {
        str(tmp_path / "missing"): "is not a folder",
        "./missing": "is not a folder",
        "a/b/c": "is not a folder",
        "missing": "is not a folder",
        "owner/missing": "the hub does not answer",
        str(tmp_path / "empty"): "without config.json",
        str(tmp_path / "gpt2"): "GPT2Attention has no separate q_proj",
        str(tmp_path / "lizard"): "is linearized already",
    }.items():
        with pytest.raises(ValueError, match=f"teacher '{name}'.*{reason}"):
            find_teacher(name)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("LIZARD_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "lizard-attn"
    monkeypatch.setenv("LIZARD_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    assert cache_dir(tmp_path / "b") == tmp_path / "b"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), appear_whole(tmp_path / "x") as draft:
        (draft / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with appear_whole(tmp_path / "x") as draft:
        (draft / "whole").write_text("1")
        assert not (tmp_path / "x").exists()
    with appear_whole(tmp_path / "x") as draft:  # another process was faster: its folder is kept
        (draft / "whole").write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "whole").read_text() == "1"


@pytest.fixture
def fake_pip(monkeypatch):
    """pip that leaves a wheel with one file in the folder it is given."""

    def run(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("thing/data.bin", b"content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)


def test_a_fetched_file_is_checked(fake_pip, tmp_path):
    right = hashlib.sha256(b"content").hexdigest()
    (file,) = fetch_from_wheel("thing==1.0", {"thing/data.bin": right}, tmp_path)
    assert file.read_bytes() == b"content" and list(tmp_path.iterdir()) == [file]
    file.unlink()
    with pytest.raises(ValueError, match=f"sha256 {right}, expected 00"):
        fetch_from_wheel("thing==1.0", {"thing/data.bin": "00"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: x\nERROR: No matching distribution found for thing==1.0\n"
    )
    monkeypatch.setattr(downloads.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ValueError, match="thing==1.0 could not be fetched .* No matching distribution"):
        fetch_from_wheel("thing==1.0", {}, tmp_path)


def test_a_damaged_cache_is_refused(tmp_path):
    folder = save_teacher(tmp_path / "teachers" / "smollm2-135m")
    assert find_teacher("smollm2-135m", cache=tmp_path)[0] == str(folder)  # from before there were sums
    write_sums(folder)
    assert find_teacher("smollm2-135m", cache=tmp_path)[0] == str(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"spot")
    with pytest.raises(ValueError, match="model.safetensors in .* is damaged .*delete that folder"):
        find_teacher("smollm2-135m", cache=tmp_path)


def test_gguf_is_missed_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "local_snapshot", lambda repository: None)
    monkeypatch.setattr(teachers, "fetch_from_wheel", None)
    monkeypatch.setattr(ours_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the package gguf; pip install 'lizard-attn\\[demo\\]'"):
        find_teacher("smollm2-135m", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.network
def test_the_packaged_teacher_speaks():
    try:
        loaded = load_teacher("smollm2-135m")
    except ValueError as error:
        if "could not be fetched" in str(error):
            pytest.skip(str(error))
        raise
    assert loaded.model.config.num_hidden_layers == 30 and loaded.model.config.rope_parameters["rope_theta"] == 1e5
    text = "The capital of France is"
    inputs = loaded.tokenizer(text, return_tensors="pt")
    written = loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(written[0])
    digits = loaded.tokenizer("2048")["input_ids"]
    assert len(digits) == 4  # split one by one, nothing added before or after
