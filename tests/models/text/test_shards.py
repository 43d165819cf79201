"""Tokens that are kept: the same as without, made once, never for anything else, whole whatever happens."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from readable import byte_tokenizer

from lizard_models.files.locks import try_lock
from lizard_models.text import sequences as text
from lizard_models.text import shards
from lizard_models.text.mixture import load_mixture
from lizard_models.text.overlap import overlap
from lizard_models.text.sequences import MappedTokens, PackedTokens, load_sequences

TOKENIZER = byte_tokenizer()
LENGTH = 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four files of each kind, in shards of a few hundred bytes."""
    monkeypatch.setattr(text, "KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    made = tmp_path / "texts"
    (made / "sub").mkdir(parents=True)
    (made / "a.txt").write_text("the wind turns the mill " * 12)
    (made / "b.jsonl").write_text("".join(json.dumps({"text": f"line {n} of text"}) + "\n" for n in range(20)))
    (made / "sub" / "c.txt").write_text("")
    (made / "sub" / "d.json").write_text(json.dumps([{"text": "äöü€" * 9}, {"prompt": "a", "completion": "b"}]))
    np.save(made / "e.npy", np.arange(100).reshape(4, 25) % 90)
    return made


def load(folder, cache, said=None, **changes):
    say = (lambda message: None) if said is None else said.append
    changes = {"seed": 3} | changes
    return load_sequences([str(folder)], changes.pop("tokenizer", TOKENIZER), LENGTH, cache=cache, say=say, **changes)


def rows(data) -> list[list[int]]:
    return [data[i]["input_ids"].tolist() for i in range(len(data))]


@pytest.mark.parametrize("examples", [None, 1, 3, 22, 26, 100])
@pytest.mark.parametrize("seed", [0, 5])
def test_they_are_those_of_no_cache(folder, tmp_path, seed, examples):
    plain = load(folder, None, seed=seed, examples=examples)
    for _ in range(2):  # made, then found
        kept = load(folder, tmp_path / "cache", seed=seed, examples=examples)
        assert type(kept) is PackedTokens and kept.digest == plain.digest and rows(kept) == rows(plain)


def test_large_text_is_mapped_and_is_the_same(folder, tmp_path, monkeypatch):
    plain = load(folder, None)
    monkeypatch.setattr(text, "STREAM_FROM_BYTES", 0)
    mapped = load(folder, tmp_path / "cache")
    assert isinstance(mapped, MappedTokens) and rows(mapped) == rows(plain)
    assert all(isinstance(part.base, np.memmap) or isinstance(part, np.memmap) for part in mapped.parts)
    flat = plain.sequences.reshape(-1)
    for start, stop in (
        (0, 5),
        (3, 300),
        (0, 10**9),
        (len(flat) - 2, len(flat) + 9),
        (len(flat), len(flat) + 4),
        (7, 7),
    ):
        assert mapped.tokens(start, stop).tolist() == flat[start:stop].tolist() == plain.tokens(start, stop).tolist()
    assert load(folder, tmp_path / "cache").digest == mapped.digest != load(folder, tmp_path / "cache", seed=4).digest
    documents = plain[0]["input_ids"].repeat(4)[None]
    assert overlap(documents, mapped) == overlap(documents, plain)
    weights = {"tokenizer": TOKENIZER, "seq_len": LENGTH, "weights": [1, 2], "seed": 2}
    sources = [str(folder / "a.txt"), str(folder / "b.jsonl")]
    mixed = load_mixture(sources, cache=tmp_path / "cache", **weights)
    monkeypatch.undo()
    assert rows(mixed) == rows(load_mixture(sources, **weights))


def test_what_is_there_is_not_made_again_and_names_and_times_say_nothing(folder, tmp_path, monkeypatch):
    load(folder, tmp_path / "cache")
    monkeypatch.setattr(shards.Shards, "_make", lambda *args: pytest.fail("made again"))
    load(folder, tmp_path / "cache", seed=9, examples=2)
    for path in folder.rglob("*.*"):
        os.utime(path, (1, 1))
    folder.rename(tmp_path / "elsewhere")
    load(tmp_path / "elsewhere", tmp_path / "cache")


def change_a_file(folder):
    (folder / "b.jsonl").write_text((folder / "b.jsonl").read_text().replace("line 3", "line 4"))


CHANGES = {
    "a file": (change_a_file, {}),
    "a new file": (lambda folder: (folder / "f.txt").write_text("more and more"), {}),
    "a file that is gone": (lambda folder: (folder / "a.txt").unlink(), {}),
    "another suffix": (lambda folder: (folder / "a.txt").rename(folder / "a.json"), None),
    "tokenizer": (None, {"tokenizer": byte_tokenizer((("t", "h"),))}),
    "text_field": (None, None),
    "vocabulary": (None, {"vocab_size": 1 << 17}),
    "encoding": (lambda folder: (folder / "sub" / "d.json").unlink(), {"encoding": "latin-1"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_that_changes_ids_makes_other_ones(folder, tmp_path, name):
    change, options = CHANGES[name]
    load(folder, tmp_path / "cache")
    if change is not None:
        change(folder)
    if options is None:  # what cannot be read any more is not taken from the cache
        with pytest.raises(ValueError, match=r"data: "):
            load(folder, tmp_path / "cache", text_field="nope" if name == "text_field" else None)
        return
    plain, kept = load(folder, None, **options), load(folder, tmp_path / "cache", **options)
    assert kept.digest == plain.digest and rows(kept) == rows(plain) and kept.sequences.dtype == plain.sequences.dtype


def test_a_changed_file_costs_its_own_shard(folder, tmp_path):
    said = []
    load(folder, tmp_path / "cache", said)
    made = [line for line in said if line.startswith("tokenizing, once: ")]
    said.clear()
    change_a_file(folder)
    load(folder, tmp_path / "cache", said)
    assert len(made) > 2 and said == [f"tokenizing, once: {folder / 'b.jsonl'}"]


def test_the_manifest_says_what_is_in_it(folder, tmp_path):
    load(folder, tmp_path / "cache")
    counts = {}
    for path in (tmp_path / "cache" / "tokens").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["dtype"] == "<u2" and manifest["rules_sha256"] and manifest["sha256"]
        assert manifest["tokens"] * 2 == (path / "ids.bin").stat().st_size
        assert manifest["documents"] * 8 == (path / "ends.bin").stat().st_size
        counts |= dict(zip((Path(p).name for p in manifest["parts"]), map(tuple, manifest["counts"]), strict=True))
    assert counts["e.npy"] == (100, 4) and counts["c.txt"] == (1, 1) and counts["b.jsonl"][1] == 20
    assert counts["a.txt"] == (12 * 24 + 1, 1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
@pytest.mark.parametrize("name", ["ids.bin", "ends.bin", "manifest.json"])
def test_damaged_ones_are_told_of_and_made_again(folder, tmp_path, name, damage):
    plain, said = load(folder, tmp_path / "cache"), []
    for path in (tmp_path / "cache" / "tokens").glob(f"*/{name}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        if damage != "removed":
            path.write_bytes(data if damage == "flipped" else data[:-3])
    assert load(folder, tmp_path / "cache", said).digest == plain.digest
    assert sum("are damaged" in line for line in said) == sum("tokenizing" in line for line in said) > 2
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))


def test_a_stop_in_the_middle_leaves_nothing_that_is_read(folder, tmp_path, monkeypatch):
    plain = load(folder, None)

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(shards, "sha256_of", stop)
        with pytest.raises(KeyboardInterrupt):
            load(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    assert load(folder, tmp_path / "cache").digest == plain.digest


@pytest.mark.parametrize("place", ["cache", "cache/tokens"])
def test_a_cache_that_takes_nothing_is_said_and_the_run_goes_on(folder, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file where the folder should be")
    said = []
    assert load(folder, tmp_path / "cache", said).digest == load(folder, None).digest
    assert said[-1].startswith("note: the tokens are not kept for later runs")


def test_a_second_process_waits_for_the_first(folder, tmp_path, monkeypatch):
    said, plain = [], load(folder, tmp_path / "other")
    (name,) = {
        path.name
        for path in (tmp_path / "other" / "tokens").iterdir()
        if "e.npy" in (path / "manifest.json").read_text()
    }
    tokens = tmp_path / "cache" / "tokens"
    tokens.mkdir(parents=True)
    held = os.open(tokens / f".{name}.lock", os.O_RDWR | os.O_CREAT)
    assert try_lock(held)

    def made_meanwhile(seconds):
        (tmp_path / "other" / "tokens" / name).rename(tokens / name)
        os.close(held)

    monkeypatch.setattr(time, "sleep", made_meanwhile)
    assert load(folder, tmp_path / "cache", said).digest == plain.digest
    assert said.count("waiting for another process that tokenizes the same text") == 1
    assert not any("e.npy" in line for line in said)


def _one_of_many(arguments) -> str:
    folder, cache = arguments
    text.KEPT_FROM_BYTES, shards.SHARD_BYTES = 0, 400
    return load(Path(folder), Path(cache)).digest


def test_processes_at_once_make_the_same(folder, tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        digests = set(pool.map(_one_of_many, [(str(folder), str(tmp_path / "cache"))] * 6))
    assert digests == {load(folder, None).digest} and not list((tmp_path / "cache" / "tokens").glob(".*"))


def test_a_hub_data_set_is_kept_by_its_commit(tmp_path, monkeypatch):
    read = []

    def hub(name, text_field=None):
        read.append(name)
        return (f"text {n} of {commits[name]}" for n in range(10))

    commits = {"a/b": "first", "c/d": "x"}
    monkeypatch.setattr(text, "read_hub", hub)
    monkeypatch.setattr(text, "hub_version", lambda name, field: f"commit {commits[name]}")

    def loaded(cache, examples=13):
        return rows(load_sequences(["a/b", "c/d"], TOKENIZER, 4, examples=examples, cache=cache))

    plain = loaded(None)
    assert loaded(tmp_path / "cache") == plain
    read.clear()
    assert loaded(tmp_path / "cache") == plain and read == ["a/b", "c/d"]  # asked whether it is there, and no more
    commits["a/b"] = "other"
    assert loaded(tmp_path / "cache") == loaded(None) != plain
    assert loaded(tmp_path / "cache", 4) == loaded(None, 4)
