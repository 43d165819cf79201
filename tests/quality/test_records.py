"""Records in JSON lines: no number is lost, writers do not overwrite each other, a file is whole or not there."""

import json
import math
import multiprocessing
from pathlib import Path

import pytest

from benchmarks.quality.records import change_record, merge_records, read_record, read_records

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quality"


@pytest.mark.parametrize("name", ["quick", "full", "mqar"])
def test_the_files_of_results_are_what_would_be_written(name, tmp_path):
    path, again = RESULTS / f"{name}.jsonl", tmp_path / f"{name}.jsonl"
    records = read_records(path)
    for stem, record in reversed(records.items()):
        settings = record["settings"]
        row = settings.get("row") or {"name": settings["mixer"], "seed": settings["seed"]}
        assert stem == f"{row['name']}.s{row['seed']}"
    merge_records(again, dict(reversed(records.items())))
    assert again.read_text() == path.read_text() and read_records(again) == records


def test_a_record_comes_back_as_it_was_and_replaces_its_like(tmp_path):
    path = tmp_path / "new" / "quick.jsonl"
    assert read_records(path) == {} and read_record(path, "a.s0") is None
    first = {"settings": {"x": [1, 2.5, None]}, "measures": {"note": "line\u2028break\nand ± 0.1", "tiny": 1e-300}}
    merge_records(path, {"b.s0": first, "a.s0": {"measures": {"loss": math.nan}}})
    assert read_record(path, "b.s0") == first and read_record(path, "a.s0") == {"measures": {"loss": None}}
    assert [json.loads(line)["stem"] for line in path.read_text().split("\n")[:-1]] == ["a.s0", "b.s0"]
    merge_records(path, {"a.s0": {"measures": {}}})
    change_record(path, "b.s0", lambda record: record.update(seconds=0.1))
    assert read_records(path) == {"a.s0": {"measures": {}}, "b.s0": {**first, "seconds": 0.1}}
    read_record(path, "b.s0")["seconds"] = 7  # what a reader does with its copy is its own affair
    assert read_record(path, "b.s0")["seconds"] == 0.1
    assert [file.name for file in path.parent.iterdir()] == ["quick.jsonl"]
    with pytest.raises(ValueError, match=r"has none of c\.s0"):
        change_record(path, "c.s0", lambda record: None)
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"quick\.jsonl, line 3: no record of a row"):
        read_records(path)


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "quick.jsonl"
    merge_records(path, {"a.s0": {"seconds": 1}})
    before = path.read_text()
    with pytest.raises(TypeError):
        merge_records(path, {"b.s0": {"seconds": object()}})
    with pytest.raises(KeyError):
        change_record(path, "a.s0", lambda record: record.pop("nothing"))
    merge_records(path, {})  # and the lock is free again
    assert path.read_text() == before and len([*tmp_path.iterdir()]) == 1


def write_many(path: Path, writer: int, start) -> None:
    start.wait()
    for i in range(25):
        merge_records(path, {f"row{i}.s{writer}": {"seconds": i}, "shared.s0": {"writer": writer}})
        change_record(path, "counted.s0", lambda record: record.update(count=record["count"] + 1))


def test_two_writers_lose_nothing_of_each_other(tmp_path):
    path, context = tmp_path / "quick.jsonl", multiprocessing.get_context("fork")
    merge_records(path, {"counted.s0": {"count": 0}})
    start = context.Barrier(3)
    writers = [context.Process(target=write_many, args=(path, writer, start)) for writer in (1, 2)]
    for writer in writers:
        writer.start()
    start.wait()
    while any(writer.is_alive() for writer in writers):
        assert "counted.s0" in read_records(path)  # a reader meets a whole file at any time
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = read_records(path)
    assert len(found) == 2 * 25 + 2 and found["counted.s0"] == {"count": 50}
    assert all(found[f"row{i}.s{writer}"] == {"seconds": i} for i in range(25) for writer in (1, 2))
