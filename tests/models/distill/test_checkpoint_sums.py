"""A checkpoint that is not what was written is refused, by file, and the older one goes on to the same weights."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import train_stage1, train_stage2, trainer
from lizard_models.distill.checkpoint_files import OPTIMIZER, SCHEDULER, SUMS, save_rng_state, write_sums

FILES = [trainer.TRAINED, OPTIMIZER, SCHEDULER, "rng_state_0.safetensors", "trainer_state.json"]


@pytest.fixture(scope="module", params=[1, 2])
def finished(request, tmp_path_factory):
    """A run of six steps with checkpoints at 3 and 6, how to run it, and its weights."""
    folder = tmp_path_factory.mktemp("run")

    def train(at, **changes):
        model, run = fresh(), arguments(at, save_steps=3, **changes)
        recipe = recipes(model, steps=6)[request.param - 1]
        if request.param == 1:
            train_stage1(model, Sequences(), run, recipe)
            return model
        return train_stage2(model, Sequences(), run, recipe)[0]

    return folder, train, snapshot(train(folder))


def flip(path, place: float, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.5, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_seen_and_the_older_checkpoint_is_as_good(finished, tmp_path, file, place):
    folder, train, weights = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    flip(run / "checkpoint-6" / file, place)
    wanted = f"checkpoint-6/{file} cannot be read .*damaged.*; delete '.*checkpoint-6', and resume goes on from .*-3'"
    with pytest.raises(ValueError, match=wanted):
        train(run, resume=True)
    shutil.rmtree(run / "checkpoint-6")  # as it says
    assert moved(weights, train(run, resume=True)) == set()
    flip(run / "checkpoint-3" / file, place)
    shutil.rmtree(run / "checkpoint-6")
    remedy = re.escape(f"delete {str(run)!r}, and resume trains this stage anew")
    with pytest.raises(ValueError, match=f"checkpoint-3/.*; there is no older checkpoint: {remedy}"):
        train(run, resume=True)


@pytest.mark.parametrize("file", [*FILES, SUMS])
def test_missing_files_and_broken_sums_are_seen(finished, tmp_path, file):
    folder, train, _ = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    for wrong in ("", "{", "[]", "{}"):
        (run / "checkpoint-6" / SUMS).write_text(wrong)
        with pytest.raises(ValueError, match=r"checkpoint-6/.*; delete '.*checkpoint-6', .*checkpoint-3'"):
            train(run, resume=True)
    (run / "checkpoint-6" / SUMS).write_bytes((folder / "checkpoint-6" / SUMS).read_bytes())
    (run / "checkpoint-6" / file).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-6/{file} is missing; delete '.*checkpoint-6', .*checkpoint-3'"):
        train(run, resume=True)


def test_sums_are_the_same_bytes_in_whichever_order_a_folder_lists_its_files(tmp_path, monkeypatch):
    written = []
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        folder = tmp_path / str(len(written))
        folder.mkdir()
        for name in ("b", "c", "a"):
            (folder / name).write_text(name)
        with monkeypatch.context() as patched:
            listed = order(folder.iterdir())
            patched.setattr(type(folder), "iterdir", lambda path, listed=listed: iter(listed))
            write_sums(folder)
        written.append((folder / SUMS).read_bytes())
    assert written[0] == written[1] and json.loads(written[0])["a"] == hashlib.sha256(b"a").hexdigest()


def test_checkpoints_of_before_there_were_sums_are_read(finished, tmp_path):
    folder, train, weights = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    record = json.loads((run / trainer.RUN).read_text())
    del record["sums"]
    (run / trainer.RUN).write_text(json.dumps(record))
    (run / "checkpoint-6" / SUMS).unlink()
    assert moved(weights, train(run, resume=True)) == set()


@pytest.mark.parametrize("index", range(5))
def test_more_processes_than_wrote_a_checkpoint_have_random_states_too(tmp_path, index):
    states = []
    for n in range(2):
        torch.manual_seed(n)
        save_rng_state(tmp_path / f"rng_state_{n}.safetensors")
        states.append(torch.rand(3))
    one = object.__new__(trainer.DistillTrainer)
    one.args = SimpleNamespace(process_index=index)
    one._load_rng_state(str(tmp_path))
    assert torch.equal(torch.rand(3), states[index % 2])
    (tmp_path / "rng_state_0.safetensors").unlink()
    (tmp_path / "rng_state_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rng_state_0\.safetensors cannot be read"):
        one._load_rng_state(str(tmp_path))
