"""Small files with sums: each bit of them counts, and no stop between two writes looks like damage."""

import pytest

from lizard_models.files import records
from lizard_models.files.records import read_json, read_record, write_record


def test_what_was_written_is_read_and_anything_else_is_named(tmp_path):
    path = tmp_path / "rows.json"
    assert read_record(path, "measure again", True) is None
    write_record(path, [1, 2])
    write_record(tmp_path / "other.json", {"a": 1})
    assert read_record(path, "measure again", True) == [1, 2]
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"rows\.json is damaged \(another sha256 .*: measure again"):
            read_record(path, "measure again", True)
    path.write_bytes(data)
    write_record(path, [3])
    assert read_record(path, "", True) == [3] and read_record(tmp_path / "other.json", "", True) == {"a": 1}
    path.unlink()
    with pytest.raises(ValueError, match=r"rows\.json is missing: measure again"):
        read_record(path, "measure again", True)


def test_a_stop_between_the_two_writes_leaves_the_old_one(tmp_path, monkeypatch):
    path, original = tmp_path / "rows.json", records.write_whole

    def stop(target, text):
        if target == path:
            raise KeyboardInterrupt
        original(target, text)

    for before in (None, [1]):
        if before:
            write_record(path, before)
        with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
            stopped.setattr(records, "write_whole", stop)
            write_record(path, [2])
        assert read_record(path, "", True) == before
        with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):  # and again after that
            stopped.setattr(records, "write_whole", stop)
            write_record(path, [3])
        assert read_record(path, "", True) == before


def test_records_of_before_there_were_sums_are_read_where_they_may_be(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[1]")
    assert read_record(path, "", False) == [1]
    with pytest.raises(ValueError, match="sums.json is missing, and with it the sum of .*rows.json: measure again"):
        read_record(path, "measure again", True)
    (tmp_path / records.RECORD_SUMS).write_text("{}")
    with pytest.raises(ValueError, match="rows.json is damaged"):
        read_record(path, "", True)
    (tmp_path / records.RECORD_SUMS).unlink()
    path.write_text("[1")
    with pytest.raises(ValueError, match=r"rows\.json is damaged \(Expecting.*: measure again"):
        read_record(path, "measure again", False)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"rows\.json is damaged .*utf-8"):
        read_json(path, "")
    (tmp_path / records.RECORD_SUMS).write_text("[]")
    with pytest.raises(ValueError, match="sums.json is damaged"):
        read_record(path, "", True)


def test_json_that_is_nested_too_deeply_is_damaged_too(tmp_path):
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"rows\.json is damaged \(maximum recursion.*: again"):
        read_json(tmp_path / "rows.json", "again")
