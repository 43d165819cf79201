"""Teachers whose weights are missing, too many, misshapen or not finite are refused, and theirs names said."""

import json
from pathlib import Path

import pytest
import torch
from cli_calls import error
from readable import save_teacher, save_texts
from safetensors.torch import load_file, save_file
from tiny import teacher

from lizard_models import LizardConfig, linearize_folder
from lizard_models.teachers.find import load_teacher
from lizard_models.teachers.loading import load_model

PROJECTION, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
EMBEDDING, MLP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
READERS = {
    "teacher": load_teacher,
    "model": load_model,
    "converted": lambda folder: linearize_folder(folder, f"{folder}-out", LizardConfig.preset("plain")),
}


def edit(folder, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def configure(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("missing", [PROJECTION, NORM, EMBEDDING, "lm_head.weight"])
def test_missing_tensors_are_named(tmp_path, reader, missing):
    folder = save_teacher(tmp_path / "t")
    edit(folder, lambda weights: weights.pop(missing))
    with pytest.raises(ValueError, match=f"missing (keys|tensors).*: {missing}"):
        READERS[reader](str(folder))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("layers", "reason"), [(2, "unexpected .*model.layers.2"), (4, "missing .*model.layers.3")], ids=["fewer", "more"]
)
def test_another_number_of_layers_is_seen(tmp_path, reader, layers, reason):
    folder = save_teacher(tmp_path / "t")
    configure(folder, num_hidden_layers=layers)
    with pytest.raises(ValueError, match=reason):
        READERS[reader](str(folder))


@pytest.mark.parametrize("reader", READERS)
def test_a_shard_that_the_index_forgot_is_seen(tmp_path, reader):
    teacher().save_pretrained(tmp_path / "t", max_shard_size="50KB")
    path = tmp_path / "t" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = sorted(set(index["weight_map"].values()))[1]
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != lost}
    path.write_text(json.dumps(index))
    (tmp_path / "t" / lost).unlink()
    with pytest.raises(ValueError, match="missing (keys|tensors)"):
        READERS[reader](str(tmp_path / "t"))


@pytest.mark.parametrize("reader", READERS)
def test_another_shape_is_seen(tmp_path, reader):
    folder = save_teacher(tmp_path / "t")
    configure(folder, intermediate_size=112)
    with pytest.raises(ValueError, match="mlp"):
        READERS[reader](str(folder))


@pytest.mark.parametrize("reader", READERS)
def test_a_tied_head_and_old_rotary_buffers_are_no_fault(tmp_path, reader):
    made = teacher(tie_word_embeddings=True)
    made.save_pretrained(tmp_path / "t")
    edit(tmp_path / "t", lambda w: w.pop("lm_head.weight", None))
    edit(tmp_path / "t", lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    READERS[reader](str(tmp_path / "t"))
    assert torch.equal(load_teacher(str(tmp_path / "t")).model.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [MLP, NORM, EMBEDDING])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, reader, name, value):
    folder = save_teacher(tmp_path / "t")

    def spoil(weights) -> None:
        weights[name].flatten()[3] = value

    edit(folder, spoil)
    with pytest.raises(ValueError, match=f"{name}.* (is|are) not finite|not finite: {name};"):
        READERS[reader](str(folder))


def test_a_cast_that_overflows_is_refused(tmp_path):
    folder = save_teacher(tmp_path / "t")
    edit(folder, lambda weights: weights[NORM].fill_(1e6))
    with pytest.raises(ValueError, match=f"not finite: {NORM}; .* load it in float32"):
        load_teacher(str(folder), dtype=torch.float16)
    with pytest.raises(ValueError, match=f"{NORM} .* is not finite as torch.float16: give another dtype"):
        linearize_folder(folder, tmp_path / "out", LizardConfig.preset("plain"), dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_the_command_trains_on_none_of_them(tmp_path):
    folder = save_teacher(tmp_path / "t")
    save_texts(tmp_path / "texts")
    edit(folder, lambda weights: weights.pop(NORM))
    line = error("linearize", folder, "--data", tmp_path / "texts", "--out", tmp_path / "out", "--device", "cpu")
    assert f"has missing keys: {NORM}" in line and not (tmp_path / "out.training").exists()


def test_weights_that_may_not_be_read_are_said_to_be_so(tmp_path, monkeypatch):
    """safetensors says of them that they do not exist."""
    folder, plain = save_teacher(tmp_path / "t"), Path.open

    def refused(self, *args, **kwargs):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    for command in ("convert", "linearize"):
        line = error(command, folder, "--out", tmp_path / "out")
        assert line.startswith(f"error: {folder / 'model.safetensors'}: Permission denied")
