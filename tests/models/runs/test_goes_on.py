"""What a run that was stopped, killed or wrongly asked for can go on with: nothing that was trained is lost."""

import errno
import json
import os
import re
import shutil
import signal

import pytest
from cli_calls import call, error, few_steps
from readable import save_teacher, save_texts
from safetensors.torch import load_file

from lizard_models.distill import stage1, stage2
from lizard_models.files.folders import damaged, drafts_of
from lizard_models.files.locks import FolderLock
from lizard_models.runs import linearize_run, work

STEPS = few_steps(2, 2)
AT_A_TERMINAL = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """nohup has SIGHUP ignored, and a shell's & SIGINT."""
    before = {number: signal.signal(number, handler) for number, handler in AT_A_TERMINAL.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    return folder


@pytest.fixture
def command(world, tmp_path):
    return ["linearize", world / "teacher", "--data", world / "texts", *STEPS, "--out", tmp_path / "out"]


@pytest.fixture(scope="module")
def weights(world, tmp_path_factory):
    """Of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    call("linearize", world / "teacher", "--data", world / "texts", *STEPS, "--out", out)
    return load_file(out / "model.safetensors")


def same(folder, weights) -> bool:
    found = load_file(folder / "model.safetensors")
    return found.keys() == weights.keys() and all((found[name] == weights[name]).all() for name in weights)


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def fail(*args, **kwargs):
    pytest.fail("trained again")


def stopped_before(name: str, command, monkeypatch) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, name, stop)
        error(*command, code=130)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ('stage2.lora_targets=["nope"]', "lora_targets: the model has no nope"),
        ('stage2.lora_targets=["mlp"]', "lora_targets: mlp; wanted projections"),
        ("stage2.lora_targets=[]", "lora_targets: nothing is named"),
        ('stage2.lora_targets=["lm_head"]', "lm_head and embed_tokens are shared"),
        ("stage2.betas=[2, 3]", "betas"),
        ("stage2.batch_size=3", "batch_size=3 is not a multiple of micro_batch_size=2"),
        ("stage2.seed=-1", "seed must be from 0"),
    ],
)
def test_mistakes_of_stage_2_are_seen_before_stage_1(command, tmp_path, monkeypatch, setting, line):
    monkeypatch.setattr(stage1.AttentionTransfer, "forward", fail)
    at = command.index("--batch-size")  # which would win
    del command[at : at + 2]
    assert line in error(*command, "--micro-batch-size", "2", "--set", setting)
    assert list(tmp_path.iterdir()) == []


def test_a_corrected_stage_2_begins_from_the_stage_1_that_is_there(command, tmp_path, monkeypatch):
    def late(*args):
        raise ValueError("lora_rank: too large for this machine")

    with monkeypatch.context() as failing:
        failing.setattr(linearize_run, "train_stage2", late)
        assert error(*command) == "error: lora_rank: too large for this machine"
    with monkeypatch.context() as again:
        again.setattr(stage1.AttentionTransfer, "forward", fail)
        again.setattr(linearize_run, "train_stage2", stop)
        output = call(*command, "--resume", "--set", "stage2.lora_rank=2", code=130).output
        assert "stage 2 has another recipe than before; it has not begun" in output
    assert "of a run with other config" in error(*command, "--resume", "--set", "stage1.learning_rate=1e-4")

    plain, seen = stage2.LanguageModelling.forward, []

    def interrupted(self, *args, **kwargs):
        seen.append(os.kill(os.getpid(), signal.SIGINT))
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as interrupts:
        interrupts.setattr(stage2.LanguageModelling, "forward", interrupted)
        error(*command, "--resume", "--set", "stage2.lora_rank=2", code=130)
    line = error(*command, "--resume", "--set", "stage2.lora_rank=4")
    assert "has begun stage 2 with another recipe" in line and "out.training/stage2'" in line
    shutil.rmtree(tmp_path / "out.training" / "stage2")  # as it says
    monkeypatch.setattr(stage1.AttentionTransfer, "forward", fail)
    call(*command, "--resume", "--set", "stage2.lora_rank=4")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["config"]["stage2"]["lora_rank"] == 4


@pytest.mark.parametrize("resume", [[], ["--resume"], ["--resume", "auto"]])
def test_work_in_which_nothing_was_trained_is_in_nobodys_way(command, tmp_path, monkeypatch, resume):
    other = [*command, "--set", "attention.window=16"]
    stopped_before("train_stage1", other, monkeypatch)
    assert (tmp_path / "out.training" / "plan.json").is_file()
    output = call(*command, *resume).output
    assert ("nothing was trained yet in" in output) == bool(resume)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["config"]["attention"]["window"] != 16


def test_auto_begins_goes_on_and_is_content_with_what_is_finished(command, tmp_path, monkeypatch, weights):
    auto = [*command, "--resume", "auto"]
    stopped_before("train_stage2", auto, monkeypatch)
    stopped = (tmp_path / "out.training" / "run.md").read_text()
    assert (
        "State: stopped: stopped by a signal." in stopped and "| stage 1, attention approximation | 1 of 2 |" in stopped
    )
    call(*auto)
    assert "State: finished." in (tmp_path / "out" / "run.md").read_text() and damaged(tmp_path / "out") == []
    assert same(tmp_path / "out", weights)
    told = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    lines = [(line["stage"][:7], line.get("event"), line.get("step")) for line in told]
    of_stages = [[(f"stage {n}", *what) for what in [("began", 0), (None, 1), ("saved", 2)]] for n in (1, 2)]
    assert lines == [*of_stages[0], ("run", "stopped", None), *of_stages[1]]
    monkeypatch.setattr(linearize_run, "load_teacher", fail)
    for again in ("--resume", "auto"), ("--resume",):
        assert f"finished before: {tmp_path / 'out'}" in call(*command, *again).output
    assert "out' exists already" in error(*auto, "--seed", "3")
    assert "--resume is" not in error(*command) and "exists already" in error(*command)
    assert "No such command" not in error(*command, "--resume", "maybe")


@pytest.mark.parametrize("moment", ["before the last rename", "after it", "while its work is deleted", "in the way"])
def test_a_kill_around_the_last_rename_loses_nothing(command, tmp_path, monkeypatch, weights, moment):
    out = tmp_path / "out"
    with monkeypatch.context() as killed:
        if moment == "after it":
            killed.setattr(work.Work, "remove", stop)
            error(*command, code=130)
        elif moment == "while its work is deleted":
            gone = tmp_path / ".out.training.gone"
            killed.setattr(work.Work, "remove", lambda self: (self.folder.rename(gone), stop()))
            error(*command, code=130)
        elif moment == "in the way":
            save = linearize_run.save_report
            killed.setattr(linearize_run, "save_report", lambda *a, **k: (out.write_text("x"), save(*a, **k)))
            assert "it is whole, and kept in" in error(*command)
            out.unlink()
        else:
            rename = type(tmp_path).rename
            killed.setattr(type(tmp_path), "rename", lambda self, to: stop() if to == out else rename(self, to))
            call(*command, code=130)
    assert any((tmp_path / name).is_dir() for name in ("out.training", ".out.training.gone"))
    monkeypatch.setattr(linearize_run, "load_teacher", fail)  # nothing is done again
    assert f"finished before: {out}" in call(*command, "--resume").output
    assert same(out, weights) and damaged(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_in_the_middle_of_saving_is_cleared(command, tmp_path, monkeypatch, weights):
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # as if nobody had been left to do it
        killed.setattr(linearize_run, "write_sums", stop)
        call(*command, code=130)
    (half,) = drafts_of(tmp_path / "out")
    (tmp_path / "out.training" / ".plan.json.12345").write_text("{")
    call(*command, "--resume")
    assert same(tmp_path / "out", weights) and not half.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_work_in_one_folder(command, tmp_path, monkeypatch):
    stopped_before("train_stage2", command, monkeypatch)
    other = FolderLock(tmp_path / "out.training", print)
    assert other.take() == ""
    monkeypatch.setattr(linearize_run, "load_teacher", fail)  # it is seen before anything is loaded
    line = error(*command, "--resume")
    assert f"--out: another run works in '{tmp_path / 'out.training'}' (process {os.getpid()} on " in line
    other.release()


def test_a_run_that_began_meanwhile_is_seen(command, tmp_path, monkeypatch):
    check, other = linearize_run.check_run, FolderLock(tmp_path / "out.training", print)

    def meanwhile(*args):
        (tmp_path / "out.training").mkdir()
        other.take()
        return check(*args)

    monkeypatch.setattr(linearize_run, "check_run", meanwhile)
    assert "another run works in" in error(*command)
    assert not (tmp_path / "out.training" / "plan.json").exists()
    other.release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["load_teacher", "loss_by_position", "save_report", "check_run"])
def test_a_signal_at_any_moment_ends_with_the_command_that_goes_on(
    command, tmp_path, monkeypatch, number, place, weights
):
    measured = ["--eval-data", command[3], "--eval-length", "200", "--eval-documents", "1"]
    command = [*command, *measured] if place == "loss_by_position" else command
    monkeypatch.setattr("sys.argv", ["lizard-attn", *map(str, command)])
    before = signal.getsignal(number)
    with monkeypatch.context() as signalled:
        original = getattr(linearize_run, place)
        signalled.setattr(linearize_run, place, lambda *a, **k: (os.kill(os.getpid(), number), original(*a, **k))[1])
        line = error(*command, code=128 + number)
    assert signal.getsignal(number) == before
    trained = place == "save_report"
    assert line.startswith("stopped" if number == signal.SIGINT else f"stopped by {number.name}")
    assert line.endswith(" ".join(map(str, command)) + " --resume" * trained)
    call(*command, *["--resume"] * trained)
    assert same(tmp_path / "out", weights)


def test_hangup_in_training_ends_with_a_checkpoint_and_under_nohup_does_not(command, tmp_path, monkeypatch, weights):
    plain = stage1.AttentionTransfer.forward

    def hangup(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(stage1.AttentionTransfer, "forward", hangup)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        call(*command)
        assert same(tmp_path / "out", weights)
    finally:
        signal.signal(signal.SIGHUP, before)
    shutil.rmtree(tmp_path / "out")
    assert "stopped at step 1 of 2" in error(*command, code=129)
    assert (tmp_path / "out.training" / "stage1" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EDQUOT])
def test_what_the_system_refuses_is_one_line_and_the_command(command, tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), str(tmp_path / "a file"))

    with monkeypatch.context() as refused:
        refused.setattr(linearize_run, "write_sums", refuse)
        line = error(*command)
    assert line.startswith(f"error: {tmp_path / 'a file'}: {os.strerror(number)}; then go on with: lizard-attn ")
    assert line.endswith("--resume")
    call(*command, "--resume")


def test_a_folder_that_is_read_as_text_is_no_place_to_write(command, world, tmp_path):
    for out in (world / "texts" / "out", world / "texts" / "a" / "b"):
        assert "which is read as text" in error(*command[:-1], out)
    link = tmp_path / "link"
    link.symlink_to(world / "texts")
    assert "which is read as text" in error(*command[:-1], link / "out")
    assert not (world / "texts" / "out.training").exists()


@pytest.mark.parametrize(
    ("out", "line"),
    [(".", "wanted the name of a new folder"), ("..", "wanted the name"), ("x" * 240, "more than 220 bytes")],
)
def test_names_that_leave_no_room_are_refused(command, out, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert line in error(*command[:-1], out)


def test_a_home_is_a_home(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    call(*command[:-1], "~/there")
    assert (tmp_path / "there" / "config.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["plan.json", "rows.json"])
def test_a_damaged_file_of_the_work_is_named(command, tmp_path, monkeypatch, name):
    measured = ["--eval-data", command[3], "--eval-length", "200", "--eval-documents", "1"]
    command = [*command, *measured]
    stopped_before("train_stage2", command, monkeypatch)
    path = tmp_path / "out.training" / name
    whole = path.read_bytes()
    for damage in (b"", whole[:20], b"[]", whole.replace(b"1", b"2", 1)):
        path.write_bytes(damage)
        line = error(*command, "--resume")
        named = name == "plan.json" and json_of(damage) and "other" in line
        assert f"{path} is damaged" in line or named
    path.write_bytes(whole)
    call(*command, "--resume")


@pytest.mark.parametrize("damage", ["cut", "removed", "sums cut"])
def test_what_a_run_says_to_delete_lets_it_go_on(command, world, tmp_path, weights, monkeypatch, damage):
    """rows.json after its second version: it was said to be missing where it had been deleted as told, for ever."""
    command = [*command, "--eval-data", world / "texts", "--eval-length", "200", "--eval-documents", "1"]
    stopped_before("train_stage2", command, monkeypatch)
    rows, sums = tmp_path / "out.training" / "rows.json", tmp_path / "out.training" / "sums.json"
    path = sums if damage == "sums cut" else rows
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
        for _ in range(2 if path == sums else 1):  # without sums, each file that had one is named in turn
            os.unlink(re.search(r"delete '([^']+)'", error(*command, "--resume"))[1])
    said = " ".join(call(*command, "--resume").output.split())
    assert (f"note: {rows} is missing, and is made again" in said) == (path == rows)
    assert same(tmp_path / "out", weights)


def json_of(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False
