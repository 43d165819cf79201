"""How processes end, as static_crash.py tells it."""

import os
import sys

import pytest
import static_crash


@pytest.mark.parametrize(
    "code, seconds, ended, word",
    [
        ("print('right')", 60, "done", "right"),
        ("raise KeyError('wrong')", 60, "error (exit code 1)", "KeyError: 'wrong'"),
        ("import os; os.kill(os.getpid(), 11)", 60, "segmentation fault", "Fatal Python error: Segmentation fault"),
        ("import time; print('begun', flush=True); time.sleep(60)", 0.5, "out of time", "begun"),
    ],
)
def test_how_a_process_ends_is_told_with_its_last_words(code, seconds, ended, word):
    row = static_crash.run([sys.executable, "-X", "faulthandler", "-c", code], seconds, dict(os.environ))
    assert row["ended"] == ended and word in row["said"] and len(row["said"]) <= 2 * static_crash.SHOWN


def test_cases_of_old_packages_find_them_first_and_a_crash_of_today_fails(tmp_path, monkeypatch, capsys):
    asked = {}

    def run(command, seconds, environment):
        case = command[command.index("--in-this-process") + 1]
        asked[case] = environment["PYTHONPATH"].split(os.pathsep)[0]
        return {"ended": "segmentation fault" if case in crashing else "done", "seconds": 1.0, "said": []}

    monkeypatch.setattr(static_crash, "run", run)
    for crashing, old, code in ((("old-pieces",), True, 0), (("now-pieces",), False, 1)):
        asked.clear()
        given = ["--old", str(tmp_path)] if old else []
        monkeypatch.setattr(sys, "argv", ["static_crash.py", *given, "--device", "cpu"])
        assert static_crash.main() == code
        assert [case for case in asked if case.startswith("old")] == (["old-pieces", "old-whole"] if old else [])
        assert all((folder == str(tmp_path)) == case.startswith("old") for case, folder in asked.items())
        said = capsys.readouterr().out
        table = said.rpartition("\n\n")[2].splitlines()
        assert [line.split()[0] for line in table if "segmentation fault" in line] == list(crashing)
        assert ("old-pieces: left out, as --old names no folder" in said) != old
