"""What is not finite stops a run at its step, by name, and reaches no checkpoint and no finished model."""

import dataclasses
import json

import pytest
import torch
from cli_calls import error
from readable import save_teacher, save_texts
from safetensors.torch import load_file, save_file
from training import Sequences, arguments, fresh, moved, recipes, snapshot
from transformers import Trainer

from lizard_models import LizardConfig
from lizard_models.distill import finite, train_stage1, train_stage2, trainer
from lizard_models.distill.checkpoint_files import SUMS, read_optimizer_state, write_sums
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.files.weights import nonfinite
from lizard_models.runs.plan import work_folder

WEIGHT = "model.model.layers.1.self_attn.lizard.gate.weight"


def spoil(monkeypatch, kind: type, step: int, how: str) -> None:
    """The loss, or one parameter's gradient alone, is NaN in that step."""
    plain, calls = kind.forward, []

    def forward(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)["loss"]
        calls.append(1)
        if len(calls) == step:
            if how == "loss":
                return {"loss": loss * torch.nan}
            parameter = next(p for name, p in self.named_parameters() if name.endswith(WEIGHT[len("model.") :]))
            return {"loss": loss + (0 * parameter.sum()).sqrt()}  # 0, with a gradient of 0 times infinity
        return {"loss": loss}

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 8, 12])
def test_the_step_the_parameter_and_the_checkpoint_are_named(tmp_path, monkeypatch, how, step):
    """Step 12 is the last, and no step of the log."""
    whole, model, again = fresh(), fresh(), fresh()
    recipe = recipes(model, steps=12)[0]
    run = dataclasses.replace(arguments(tmp_path / "b", save_steps=3), logging_steps=10)
    with monkeypatch.context() as spoiled, pytest.raises(FloatingPointError) as raised:
        spoil(spoiled, AttentionTransfer, step, how)
        train_stage1(model, Sequences(), run, recipe)
    kept = (step - 1) // 3 * 3
    text = str(raised.value)
    assert f"at step {step}," in text and "relative error is" in text
    assert (f"its gradient is not finite in {WEIGHT};" if how == "gradient" else "relative error is nan") in text
    assert (f"checkpoint-{kept}" if kept else "there is no checkpoint yet") in text
    assert nonfinite(dict(model.state_dict())) == []  # stopped before the update
    for checkpoint in trainer.checkpoints(tmp_path / "b"):
        assert nonfinite(load_file(checkpoint / trainer.TRAINED)) == []
        state = read_optimizer_state(checkpoint / "optimizer.safetensors")["state"]
        assert all(v.isfinite().all() for values in state.values() for v in values.values())
    if kept:  # what it says works
        train_stage1(whole, Sequences(), arguments(tmp_path / "a"), recipe)
        train_stage1(again, Sequences(), dataclasses.replace(run, resume=True), recipe)
        assert moved(snapshot(whole), again) == set()


def test_stage_2_is_watched_too(tmp_path, monkeypatch):
    model = fresh()
    spoil(monkeypatch, LanguageModelling, 4, "gradient")
    with pytest.raises(FloatingPointError, match=r"KL is .* at step 4, its gradient is not finite in .*gate.weight"):
        train_stage2(model, Sequences(), arguments(tmp_path), dataclasses.replace(recipes(model, 6)[1], kl_weight=1.0))


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.0])
def test_watching_changes_no_bit(tmp_path, monkeypatch, max_grad_norm):
    """Against Trainer's own clipping, with accumulation, clipped and not."""
    models, logs = [], []
    for own in (True, False):
        with monkeypatch.context() as plain:
            for name in () if own else ("_clip_grad_norm", "_get_grad_norm"):
                plain.setattr(trainer.DistillTrainer, name, getattr(Trainer, name))
            models.append(fresh())
            run = arguments(tmp_path / str(own), micro_batch_size=1)
            recipe = recipes(models[-1], steps=3, max_grad_norm=max_grad_norm)[0]
            logs.append(train_stage1(models[-1], Sequences(), run, recipe).losses)
        state = json.loads((tmp_path / str(own) / "checkpoint-3" / "trainer_state.json").read_text())
        logs[-1] = [(entry.get("loss"), entry.get("grad_norm")) for entry in state["log_history"]]
    assert moved(snapshot(models[0]), models[1]) == set() and logs[0] == logs[1]
    assert logs[0][0][1] > 0.01


def test_weights_that_an_update_makes_infinite_are_not_saved(tmp_path):
    model = fresh()
    recipe = dataclasses.replace(recipes(model, steps=1)[0], learning_rate=1e30, weight_decay=1e30)
    with pytest.raises(FloatingPointError, match=r"not finite after step 1: model\..* no checkpoint is written"):
        train_stage1(model, Sequences(), arguments(tmp_path), recipe)
    assert trainer.checkpoints(tmp_path) == []


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tmp_path):
    """As versions before this check wrote them."""
    model = fresh()
    recipe = recipes(model, steps=6)[0]
    train_stage1(model, Sequences(), arguments(tmp_path, save_steps=3), recipe)
    newest = tmp_path / "checkpoint-6"
    state = load_file(newest / trainer.TRAINED)
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, newest / trainer.TRAINED)
    (newest / SUMS).unlink()
    write_sums(newest)
    wanted = "checkpoint-6/.* not finite: .*; delete '.*checkpoint-6', .* goes on from .*checkpoint-3"
    with pytest.raises(ValueError, match=wanted):
        train_stage1(fresh(), Sequences(), arguments(tmp_path, resume=True), recipe)


SMALL = ["--seq-len", "64", "--batch-size", "2", "--device", "cpu"]


@pytest.mark.parametrize("steps", [1, 9])
def test_a_rate_that_breaks_the_model_saves_none(tmp_path, steps):
    save_teacher(tmp_path / "teacher")
    save_texts(tmp_path / "texts")
    line = error(
        *("linearize", tmp_path / "teacher", "--data", tmp_path / "texts", "--preset", "window_only", *SMALL),
        *("--stage2-steps", str(steps), "--set", "stage2.learning_rate=1e30", "--out", tmp_path / "out"),
    )
    assert "not finite" in line or "nan at step" in line or "inf at step" in line
    assert not (tmp_path / "out").exists()
    assert work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_settings_that_are_not_finite_are_refused_by_name(value):
    for stage, names in {
        "stage1": ("learning_rate", "min_learning_rate_ratio", "max_grad_norm", "warmup_ratio", "eps", "epochs",
                   "weight_decay", "gate_learning_rate"),
        "stage2": ("learning_rate", "new_learning_rate", "lora_dropout", "cross_entropy_weight", "kl_weight"),
    }.items():  # fmt: skip
        for name in names:
            with pytest.raises(ValueError, match=f"^{name} must be finite, got"):
                LizardConfig.preset("plain", **{stage: {name: value}})
        with pytest.raises(ValueError, match="^betas must be finite"):
            LizardConfig.preset("plain", **{stage: {"betas": [0.9, value]}})
    for name in ("wide_gate_stretch", "softmax_share"):
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            LizardConfig.preset("plain", **{name: value})
    attention = LizardConfig.preset("plain").to_dict()["attention"]
    for name in [name for name, number in attention.items() if isinstance(number, float)]:
        with pytest.raises(ValueError, match=name.partition("_init")[0]):
            LizardConfig.preset("plain", attention={name: value})


def test_shares_beyond_their_range_are_refused():
    for stage, name, value in (
        ("stage1", "warmup_ratio", 5),
        ("stage1", "betas", [2, 3]),
        ("stage2", "lora_dropout", 1.0),
        ("stage1", "gate_learning_rate", -1.0),
    ):
        with pytest.raises(ValueError, match=name.partition("_init")[0]):
            LizardConfig.preset("plain", **{stage: {name: value}})


def test_readings_that_are_still_on_their_way_are_waited_for(tmp_path):
    """As on a GPU, whose copies to the host end later: a step is looked at when it is there, and before any saving."""

    class Event:
        """Until it is there, the memory on the host holds something else."""

        def __init__(self, readings: torch.Tensor) -> None:
            self.there, self.readings, self.host = False, readings, torch.zeros(2)

        def query(self) -> bool:
            return self.there

        def synchronize(self) -> None:
            self.there = True
            self.host.copy_(self.readings)

    def step(number: int, norms: list[float]) -> finite._Step:
        all_norms = torch.tensor(norms)
        ready = Event(torch.stack([torch.ones(()), all_norms.norm()]))
        return finite._Step(number, ["a", "b"], all_norms, ready.host, ready)

    watch = finite.FiniteWatch("test", "KL", tmp_path)
    watch.waiting.extend([step(3, [1.0, 2.0]), step(4, [1.0, torch.inf]), step(5, [torch.nan, torch.nan])])
    watch.look()
    assert len(watch.waiting) == 3
    watch.waiting[0].ready.synchronize()
    watch.look()
    assert len(watch.waiting) == 2
    with pytest.raises(FloatingPointError, match="test: KL is 1.0 at step 4, its gradient is not finite in b;"):
        watch.state(5, [], None)
    watch.waiting.clear()
    watch.waiting.append(step(6, [1.0, 2.0]))
    watch.settle()
    assert not watch.waiting


def test_a_stage_that_does_harm_is_warned_of(tmp_path, capfd):
    model = fresh()
    recipe = dataclasses.replace(recipes(model, steps=30)[0], learning_rate=1e6)
    result = train_stage1(model, Sequences(), arguments(tmp_path / "a"), recipe)
    first, last = result.losses[0][1], result.final_loss
    assert last > 1.5 * first
    assert f"warning: test: relative error rose from {first:.4g} to {last:.4g}" in " ".join(
        capfd.readouterr().err.split()
    )
    model = fresh()
    train_stage1(model, Sequences(), arguments(tmp_path / "b"), recipes(model, steps=6)[0])
    said = capfd.readouterr()
    assert "warning: test" not in said.err
    assert "'loss'" not in said.out  # no lines of dicts from transformers beside our own


def test_a_loss_that_rounds_below_0_is_no_harm(tmp_path, capfd, monkeypatch):
    """As the KL of a student that is its teacher still."""
    model = fresh()
    parameter = next(p for _, p in model.lizard_parameters())
    monkeypatch.setattr(LanguageModelling, "forward", lambda *args, **given: {"loss": 0 * parameter.sum() - 1e-9})
    _, result = train_stage2(model, Sequences(), arguments(tmp_path), recipes(model, steps=2)[1])
    assert result.final_loss == pytest.approx(-1e-9) and "warning: test" not in capfd.readouterr().err


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.2.mlp.down_proj.weight"])
def test_a_teacher_that_is_not_finite_is_not_trained_against(tmp_path, stage, name):
    """Stage 1 does not read all of them, so its loss would not show it."""
    model = fresh()
    dict(model.named_parameters())[name].data.flatten()[0] = torch.inf
    train = train_stage1 if stage == 1 else train_stage2
    module = name.removesuffix(".weight")  # between them an adapted one has ``base_layer``
    with pytest.raises(ValueError, match=f"weights that are not finite: .*{module}.*; load its teacher again"):
        train(model, Sequences(), arguments(tmp_path), recipes(model)[stage - 1])
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_row_of_a_shared_weight_is_looked_at_like_any_other(tmp_path):
    """With shards, a weight of fewer rows than processes is empty in some."""
    watch = finite.FiniteWatch("test", "loss", tmp_path)
    named = {"empty": torch.nn.Parameter(torch.empty(0, 3)), "full": torch.nn.Parameter(torch.full((2, 3), 1e30))}
    watch.updated(1, named.items())
    for bad in (float("nan"), float("inf"), float("-inf")):
        with torch.no_grad():
            named["full"][1, 2] = bad
        with pytest.raises(FloatingPointError, match="not finite after step 2: full"):
            watch.updated(2, named.items())
