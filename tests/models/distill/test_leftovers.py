"""What a killed run leaves in a stage's folder does no harm, and is gone after the next one."""

import json
import os
import re
import signal

import pytest
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import resume, train_stage1, trainer


def train(folder, model=None, **changes):
    model = fresh() if model is None else model
    train_stage1(model, Sequences(), arguments(folder, save_steps=2, **changes), recipes(model, steps=6)[0])
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return snapshot(train(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("moment", ["written", "placed", "renamed", "deleted"])
def test_a_kill_while_a_checkpoint_is_put_in_place(tmp_path, whole, monkeypatch, moment):
    """SIGKILL in a forked process: the second checkpoint on the disk, in its place; the oldest going, half gone."""
    child = os.fork()
    if child == 0:
        calls = []
        name, after, number = {
            "written": ("put_in_place", False, 2),
            "placed": ("put_in_place", True, 2),
            "renamed": ("remove", False, 1),
            "deleted": ("remove", True, 1),
        }[moment]
        original = getattr(resume, name)

        def killed(*args):
            calls.append(1)
            if len(calls) < number:
                return original(*args)
            if after and name == "put_in_place":
                original(*args)
            if name == "remove" and after:  # half of it is deleted
                args[0].rename(args[0].with_name(f".replaced-{args[0].name}"))
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(trainer, name, killed)
        train(tmp_path)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden if moment in ("written", "deleted") else True
    newest = resume.checkpoints(tmp_path)[-1]
    assert newest.name == {"written": "checkpoint-2", "placed": "checkpoint-4"}.get(moment, "checkpoint-6")
    assert moved(whole, train(tmp_path, resume=True)) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"run.json", *(path.name for path in resume.checkpoints(tmp_path))}
    )


def test_other_names_are_nobodys_checkpoints(tmp_path, whole):
    (tmp_path / "run" / "checkpoint-abc").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-7").write_text("a file")
    (tmp_path / "run" / ".mine").write_text("1")
    train(tmp_path / "run")
    assert moved(whole, train(tmp_path / "run", resume=True)) == set()
    assert (tmp_path / "run" / "checkpoint-abc").is_dir() and (tmp_path / "run" / ".mine").is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00" * 40])
def test_a_damaged_record_is_named(tmp_path, text):
    train(tmp_path)
    (tmp_path / trainer.RUN).write_text(text)
    remedy = re.escape(f"delete {str(tmp_path)!r}, and resume trains this stage anew")
    with pytest.raises(ValueError, match=r"run\.json is damaged .*" + remedy):
        train(tmp_path, resume=True)
    (tmp_path / trainer.RUN).unlink()
    with pytest.raises(ValueError, match=r"run\.json is missing: .*" + remedy):
        train(tmp_path, resume=True)


def test_a_record_that_differs_is_said_to_be_damaged_only_if_it_is(tmp_path):
    train(tmp_path)
    path = tmp_path / trainer.RUN
    for key, text in (("data", "random"), ("model", None), ("steps", 6)):
        whole = json.loads(path.read_text())
        path.write_text(json.dumps(whole | {key: "other" if text is None else 5 if key == "steps" else "randon"}))
        with pytest.raises(ValueError, match=r", or .*run\.json is damaged \(another sha256"):
            train(tmp_path, resume=True)
        path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="of a run with other seed: repeat its command"):
        model = fresh()
        train_stage1(model, Sequences(), arguments(tmp_path, resume=True), recipes(model, steps=6, seed=3)[0])
    train(tmp_path, resume=True)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, original = [], trainer.sync_all

    def sync(folder):
        assert folder.parent.name.startswith(".saving-") and (folder / "sums.json").is_file()
        synced.append(folder.name)
        original(folder)

    monkeypatch.setattr(trainer, "sync_all", sync)
    train(tmp_path)
    assert synced == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert json.loads((tmp_path / "run.json").read_text())["sums"] is True
