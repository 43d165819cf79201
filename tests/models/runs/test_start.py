"""A finished stage 1 is the start of other plans: the same bits as in one run, and nothing else is taken for one."""

import json
import shutil

import pytest
from cli_calls import call, error
from readable import save_teacher, save_texts
from safetensors.torch import load_file, save_file

from lizard_models.distill import stage1
from lizard_models.files.folders import SUMS, write_sums
from lizard_models.runs import linearize_run

STEPS = ["--preset", "plain", "--seq-len", "64", "--batch-size", "2", "--device", "cpu", "--set", "attention.window=16"]
KEPT = ["--kept-keys", "4", "--set", "attention.score_dim=8", "--set", "stage0.sequence_length=128"]
KEPT += ["--stage0-steps", "2", "--set", "stage0.label_queries=8", "--set", "stage0.batch_size=2"]


SHARED = [*KEPT, "--set", "stage0.share_places=true", "--kept-keys", "12"]


@pytest.fixture(scope="module", params=[[], KEPT, SHARED], ids=["plain", "kept keys", "shared out"])
def world(request, tmp_path_factory):
    """A whole run, the model of its stage 1 alone, and the work of one that stopped before stage 2."""
    folder = tmp_path_factory.mktemp("world")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    start = ["linearize", folder / "teacher", "--data", folder / "texts", *STEPS, *request.param]
    call(*start, "--stage1-steps", "2", "--stage2-steps", "2", "--out", folder / "whole")
    call(*start, "--stage1-steps", "2", "--stage2-steps", "0", "--out", folder / "first")
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(linearize_run, "train_stage2", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        error(*start, "--stage1-steps", "2", "--stage2-steps", "9", "--out", folder / "second", code=130)
    return folder, start


def fail(*args, **kwargs):
    pytest.fail("trained again")


@pytest.mark.parametrize("source", ["first", "second.training"])
def test_stage_2_after_a_stage_1_of_elsewhere_is_that_of_one_run(world, tmp_path, monkeypatch, source):
    folder, start = world
    monkeypatch.setattr(stage1.AttentionTransfer, "forward", fail)
    before = {path: path.stat().st_mtime_ns for path in (folder / source).rglob("*") if path.name != ".lock"}
    measured = ["--eval-data", folder / "texts", "--eval-length", "200", "--eval-documents", "1"]
    other = ["--stage2-steps", "2", "--seed", "0", "--from", folder / source, *measured, "--out", tmp_path / "out"]
    output = call(*start, *other).output
    assert f"stage1: as trained in {folder / source}" in output and "untrained student" not in output
    whole, out = (load_file(f / "model.safetensors") for f in (folder / "whole", tmp_path / "out"))
    assert whole.keys() == out.keys() and all((whole[name] == out[name]).all() for name in whole)
    told, one = (json.loads((f / "training.json").read_text()) for f in (tmp_path / "out", folder / "whole"))
    assert told["start"] == str(folder / source) and len(told["start_sha256"]) == 64
    assert list(told["stages"]) == list(one["stages"]) and told["config"] == one["config"]
    for stage in told["stages"]:
        for key in ("steps", "losses", "parameters", "data"):
            assert told["stages"][stage][key] == one["stages"][stage][key], key
    after = {path: path.stat().st_mtime_ns for path in (folder / source).rglob("*") if path.name != ".lock"}
    assert after == before  # it is read alone


def test_it_goes_on_with_the_start_it_began_with(world, tmp_path, monkeypatch):
    folder, start = world
    shutil.copytree(folder / "first", tmp_path / "first")
    command = [*start, "--stage2-steps", "2", "--from", tmp_path / "first", "--out", tmp_path / "out"]
    command += ["--set", "stage2.train_new_parameters=false"]
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "refuse_broken", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        error(*command, code=130)
    weights = load_file(tmp_path / "first" / "model.safetensors")
    weights["model.layers.0.self_attn.lizard.gate.bias"] += 1e-3
    save_file(weights, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "first" / SUMS).unlink()
    write_sums(tmp_path / "first")
    assert "other start_sha256" in error(*command, "--resume")
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(folder / "first", tmp_path / "first")
    call(*command, "--resume")
    assert "finished before" in call(*command, "--resume", "auto").output
    command[command.index("--from") + 1] = folder / "first"
    assert "exists already" in error(*command, "--resume", "auto")


def test_what_is_no_finished_stage_1_is_refused_before_anything_is_loaded(world, tmp_path, monkeypatch):
    folder, start = world
    monkeypatch.setattr(linearize_run, "load_teacher", fail)

    def refused(source, *more):
        line = error(*start, *more, "--from", source, "--out", tmp_path / "out")
        assert line.startswith("error: --from: "), line
        return line

    assert "after stage 1 and no stage 2" in refused(folder / "whole")
    assert "neither a model of lizard-attn nor the work of a run" in refused(folder / "teacher")
    assert "attention.window 16, not 32: ask for the same" in refused(folder / "first", "--set", "attention.window=32")
    assert "softmax-layers [], not [1]" in refused(folder / "first", "--softmax-layers", "1")
    assert "nothing is left to do" in refused(folder / "first", "--stage2-steps", "0")
    shutil.copytree(folder / "second.training", tmp_path / "work")
    record = json.loads((tmp_path / "work" / "stage1" / "run.json").read_text())
    (tmp_path / "work" / "stage1" / "run.json").write_text(json.dumps(record | {"steps": 5}))
    assert "stage1 in" in (line := refused(tmp_path / "work")) and "not finished (step 2 of 5)" in line
    assert not (tmp_path / "out.training").exists()


def test_damage_and_another_teacher_are_seen(world, tmp_path):
    folder, start = world
    shutil.copytree(folder / "first", tmp_path / "first")
    shutil.copytree(folder / "second.training", tmp_path / "work")
    for path in (tmp_path / "first" / "model.safetensors", tmp_path / "work/stage1/checkpoint-2/trained.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
        source = tmp_path / path.relative_to(tmp_path).parts[0]
        assert "damaged" in error(*start, "--from", source, "--out", tmp_path / "out")
    for name, file in (("first", "training.json"), ("work", "plan.json")):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(folder / {"first": "first", "work": "second.training"}[name], tmp_path / name)
        record = json.loads((tmp_path / name / file).read_text())
        (tmp_path / name / file).write_text(json.dumps(record | {"teacher_sha256": "0" * 64}))
        line = error(*start, "--from", tmp_path / name, "--out", tmp_path / "out")
        assert "was trained on another teacher (sha256 000000000000, this one's is" in line


def test_layers_are_chosen_after_it_too(world, tmp_path):
    folder, start = world
    wide = ["--set", "wide_window=32", "--widen", "1", "--stage1-steps", "2", "--stage2-steps", "1"]
    call(*start, *wide, "--out", tmp_path / "whole")
    call(*start, *wide, "--from", folder / "first", "--out", tmp_path / "out")
    whole, out = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", tmp_path / "out"))
    assert all((whole[name] == out[name]).all() for name in whole)
    told = [json.loads((f / "training.json").read_text())["config"] for f in (tmp_path / "whole", tmp_path / "out")]
    assert told[0] == told[1] and len(told[0]["wide_layers"]) == 1
