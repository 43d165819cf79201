"""Two processes give what one gives, whether each holds the model or they share it (FSDP-2)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_run import one_run
from safetensors.torch import load_file
from training import arguments, fresh, recipes

from lizard_models.distill import parallel
from lizard_models.distill.arguments import check_parts, training_arguments
from lizard_models.distill.parallel import sharded
from lizard_models.distill.resume import RUN, checkpoint_to_resume, checkpoints
from lizard_models.distill.stage1 import AttentionTransfer

START = """
import os, pathlib, sys
from parallel_run import main
started = []
for rank in map(str, range(2)):
    started.append(os.fork())
    if not started[-1]:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        main(pathlib.Path(sys.argv[1]))
print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started))
"""  # two processes, whose imports one has made


def launch(folder: Path) -> tuple[list[int], str]:
    """How two processes ended that have the environment that torchrun gives, and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(folder)],
        env=os.environ | shared,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [int(code) for code in said.split()[-2:]], errors


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    codes, errors = launch(folder)
    assert codes == [0, -signal.SIGKILL], errors
    said = sorted(line for line in errors.splitlines() if "is no text" in line)
    return {**torch.load(folder / "found.pt"), "folder": folder, "said": said}


@pytest.mark.parametrize(
    ("stage", "way"),
    [
        *((stage, way) for stage in (0, 1, 2) for way in ("ddp", "fsdp")),
        (0, "kept"),
        (1, "kept"),
        (1, "context"),
        (2, "context"),
    ],
)
def test_two_processes_learn_what_one_learns(found, stage, way, tmp_path):
    losses, parameters = found[f"stage {stage}, {way}"]
    expected_losses, expected = one_run(stage, tmp_path, kept=way == "kept")
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    torch.testing.assert_close([loss for _, loss in losses], [loss for _, loss in expected_losses], rtol=1e-4, atol=0)
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-3, atol=1e-4)


def test_each_process_holds_its_share(found):
    assert 0.49 * found["whole"] < found["held"] < 0.52 * found["whole"]


def test_new_parameters_of_a_sharded_bfloat16_model_are_float32(found):
    losses, parameters = found["bfloat16"]
    kinds = {dtype: {".lizard." in n for n, p in parameters.items() if p.dtype == dtype} for dtype in
             (torch.float32, torch.bfloat16)}  # fmt: skip
    assert kinds == {torch.float32: {True}, torch.bfloat16: {False}} and losses[-1][1] < losses[0][1]


def test_one_checkpoint_format_for_all(found):
    folders = [found["folder"] / f"1-{fsdp}" / "checkpoint-4" for fsdp in (False, True)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    saved = [load_file(folder / "trained.safetensors") for folder in folders]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_stopped_run_goes_on(found):
    assert "test stopped at step" in found["stopped"]
    whole, resumed = found["stage 1, fsdp"], found["resumed"]
    assert resumed[0] == whole[0]
    assert all(torch.equal(value, whole[1][name]) for name, value in resumed[1].items())


def test_a_sharded_run_may_go_on_in_one_process(found, tmp_path):
    folder = found["folder"] / "1-True"
    (folder / "checkpoint-4").rename(tmp_path / "last")
    losses, parameters = one_run(1, folder, resume=True)
    for name, value in found["stage 1, ddp"][1].items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-3, atol=1e-4)
    assert [step for step, _ in losses] == [1, 2, 3, 4]


def test_an_error_is_said_by_the_process_that_has_it_and_once_where_all_have_it(found):
    assert found["said"] == ["error: data: both.txt is no text", "process 1: error: data: nobody.txt is no text"]
    assert found["ended"] == [0, 2]  # of the main process


def test_a_process_that_is_killed_ends_the_run_and_one_goes_on(found):
    """With the losses of a run that nothing happened to."""
    assert found["gone after"] < 30 and found["gone"]
    folder = found["folder"] / "killed"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    losses, parameters = one_run(1, folder, resume=True)
    whole_losses, whole = found["stage 1, ddp"]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in whole_losses], rel=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-3, atol=1e-4)


def test_shards_lie_on_the_device_of_the_run(monkeypatch):
    """On one mesh, the layers before the whole: torch's own choice would be a GPU wherever there is one."""
    meshes, wrapped = [], []
    monkeypatch.setattr(parallel, "init_device_mesh", lambda kind, shape: meshes.append((kind, shape)) or "mesh")
    monkeypatch.setattr(parallel, "fully_shard", lambda module, mesh=None: wrapped.append((module, mesh)))
    objective = AttentionTransfer(fresh())
    for device in ("cpu", "cuda:1"):
        copied = sharded(objective, device)
        assert meshes.pop() == (device.partition(":")[0], (1,)) and not meshes
        layers = list(copied.model.model.layers)
        assert [module for module, _ in wrapped] == [*layers, copied] and {mesh for _, mesh in wrapped} == {"mesh"}
        wrapped.clear()


def test_only_the_main_process_writes_the_record_of_a_run(monkeypatch, tmp_path):
    record = {"recipe": {}, "steps": 1, "data": "", "model": ""}
    for rank, files in (("1", []), ("0", [RUN])):
        monkeypatch.setenv("RANK", rank)
        assert checkpoint_to_resume(tmp_path / "run", False, record) is None
        assert [path.name for path in tmp_path.glob("run/*")] == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel": 3}, "context_parallel: got 3, wanted a divisor of the number of processes, 2"),
        ({"context_parallel": 0}, "context_parallel: got 0, wanted a divisor"),
        ({"context_parallel": 2, "cuda_graph": True}, "cuda_graph: a graph holds no exchange"),
    ],
)
def test_groups_that_processes_do_not_fall_into(changes, message, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        training_arguments(recipes(fresh())[0], arguments(tmp_path, **changes), 4)


def test_rows_that_do_not_fall_into_parts():
    for changes, length, softmax, message in (
        ({}, 47, True, "47 tokens fall into no 2 equal parts"),
        ({}, 2, True, "2 tokens fall into no 2 equal parts"),
        ({"softmax_layers": (1,)}, 48, False, "kept softmax layers need the keys of all ranks"),
        ({"attn_implementation": "eager"}, 48, True, 'in mode "distill" the teacher attends to the keys of all ranks'),
    ):
        model = fresh(**changes)
        recipe = recipes(model, sequence_length=length)[0]
        with pytest.raises(ValueError, match=message):
            check_parts(model, recipe, 2, softmax)
        check_parts(model, recipe, 1, softmax)


def test_what_the_launcher_must_not_ask(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="fsdp: one process has nobody to share with"):
        one_run(1, tmp_path, fsdp=True)
    with pytest.raises(ValueError, match="leave out one of it and fsdp"):
        one_run(1, tmp_path, fsdp=True, cuda_graph=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="give fsdp=True"):
        parallel.join("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="launch with --mixed_precision no"):
        parallel.join("cpu")
