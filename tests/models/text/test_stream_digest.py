"""Streamed data are known by their content: a run goes on with the same alone."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from cli_calls import call, error
from readable import byte_tokenizer, save_teacher, save_texts

from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.runs.plan import work_folder
from lizard_models.text import documents, sequences
from lizard_models.text.sequences import load_sequences


def edit_keeping_size_and_time(path) -> None:
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] = ord("x") if data[len(data) // 2] != ord("x") else ord("y")
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_the_digest_of_a_stream_is_that_of_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "STREAM_FROM_BYTES", 0)
    tokenizer = byte_tokenizer()
    folder = save_texts(tmp_path / "texts")

    def digest(at=folder, reader=tokenizer, **changes) -> str:
        return load_sequences([str(at)], reader, 64, **changes).digest

    first = digest()
    assert digest(save_texts(tmp_path / "other")) == first  # the same bytes elsewhere
    os.utime(folder / "text-1.txt")
    assert digest() == first
    assert digest(reader=byte_tokenizer(merges=(("i", "n"),))) != first
    edit_keeping_size_and_time(folder / "text-1.txt")
    changed = digest()
    assert changed != first
    (folder / "text-9.txt").write_text("more")
    assert digest() not in (first, changed)
    np.save(folder / "ids.npy", np.arange(200))
    ids = digest()
    np.save(folder / "ids.npy", np.arange(1, 201))
    assert digest() != ids


def test_streamed_data_that_changed_are_refused_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "STREAM_FROM_BYTES", 0)
    save_teacher(tmp_path / "teacher")
    texts = save_texts(tmp_path / "texts")
    # The recipe takes all examples, else they are held.
    command = ["linearize", tmp_path / "teacher", "--data", texts, "--out", tmp_path / "out", "--device", "cpu"]
    command += [
        "--preset",
        "plain",
        "--set",
        "stage1.examples=null",
        "--set",
        "stage2.examples=null",
        "--stage1-steps",
        "3",
    ]
    command += ["--stage2-steps", "2", "--seq-len", "64", "--batch-size", "2"]
    with monkeypatch.context() as stopped:
        stop_in_step(stopped, 2)
        assert "stopped at step 2 of 3" in error(*command, code=130)
    kept = (texts / "text-2.txt").read_bytes()
    edit_keeping_size_and_time(texts / "text-2.txt")
    assert "of a run with other data" in error(*command, "--resume")
    (texts / "text-2.txt").write_bytes(kept)
    call(*command, "--resume")
    assert not work_folder(tmp_path / "out").exists()


def stop_in_step(monkeypatch, step: int) -> None:
    plain, calls = AttentionTransfer.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(AttentionTransfer, "forward", forward)


@pytest.mark.parametrize("commits", [True, False])
def test_a_hub_data_set_is_known_by_its_commit_or_its_first_documents(monkeypatch, commits):
    import datasets
    import huggingface_hub

    records, commit = [{"text": "abcdefg"}, {"text": "hijklmn"}], ["one"]

    def dataset_info(self, name, timeout):
        if not commits:
            raise OSError("not found")
        assert name == "owner/name"
        return SimpleNamespace(sha=commit[0])

    monkeypatch.setattr(documents, "hub_answers", lambda path="": True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(records))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)

    def digest(source: str = "owner/name:part") -> str:
        return load_sequences([source], byte_tokenizer(), 4).digest

    first = digest()
    assert digest() == first != digest("owner/name:other")
    commit[0], records[1] = "two", {"text": "opqrstu"}
    assert digest() != first
