"""Configs of before fields were retired: they load where these did nothing, and are refused by name otherwise."""

import json

import pytest
import torch
from tiny import student, tokens

from lizard_models import LizardConfig
from lizard_models.config import RETIRED, RETIRED_VALUES
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.model.layer_configs import lizard_config

OLD = {  # name: the default of before, another value of before
    "attention.memory": ("sum", "delta"),
    "attention.beta_init": (0.1, 0.5),
    "attention.key_conv": (0, 4),
    "attention.feature_norm": (False, True),
    "attention.feature_noise": (0.0, 0.1),
    "attention.gate_spread": (1.0, 64.0),
    "attention.merge_mass": ("relative", "absolute"),
    "stage1.attention_weight": (0.0, 0.3),
    "stage1.attention_rows": (128, 64),
}
GONE = {  # name: values that a field still there no longer takes
    "attention.feature_activation": ("identity",),
    "attention.gate": ("query_head",),
    "attention.merge_bias": ("token",),
}
LAST = r"was retired, wanted .*; the last to read it is lizard-attn 0\.1\.0 \(commit a286720\)"


def nested(values: dict) -> dict:
    """{"stage1.seed": 3} -> {"stage1": {"seed": 3}}."""
    found: dict = {}
    for name, value in values.items():
        part, dot, key = name.rpartition(".")
        (found.setdefault(part, {}) if dot else found)[key] = value
    return found


def with_old_fields(config: dict) -> dict:
    """The config as it was written before: every retired field at its default beside the fields of today."""
    for name, (default, _) in OLD.items():
        part, dot, key = name.rpartition(".")
        (config[part] if dot else config)[key] = default
    return config


def test_the_tables_are_those_of_today():
    assert {name: default for name, (default, _) in OLD.items()} == RETIRED
    assert GONE == RETIRED_VALUES


@pytest.mark.parametrize("name", OLD)
def test_a_retired_field_at_its_default_is_left_out(name):
    assert LizardConfig.from_dict(nested({name: OLD[name][0]})) == LizardConfig()
    assert name.rpartition(".")[2] not in json.dumps(LizardConfig().to_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, other) for name, (_, other) in OLD.items()] + [(name, v) for name in GONE for v in GONE[name]],
)
def test_another_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, which {LAST}"):
        LizardConfig.from_dict(nested({name: value}))
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, which {LAST}"):
        LizardConfig.preset("plain", **nested({name: value}))


@pytest.mark.parametrize("preset", ["paper", "paper_literal", "plain", "lolcats", "liger", "window_only"])
def test_whole_configs_of_before_load(preset):
    config = LizardConfig.preset(preset, wide_gate_stretch=1.0)
    assert LizardConfig.from_json(json.dumps(with_old_fields(config.to_dict()))) == config


@torch.no_grad()
def test_a_saved_model_of_before_loads(tmp_path):
    model, ids = student(), tokens(1, 30)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    with_old_fields(values["lizard"])
    file.write_text(json.dumps(values))
    back = LizardLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_config_is_read_once_and_anew_when_it_changes():
    config = student(num_hidden_layers=1).config
    first = lizard_config(config)
    assert lizard_config(config) is first
    config.lizard["attention"]["window"] = 9
    assert lizard_config(config).attention.window == 9 and first.attention.window == 8
    config.lizard["attention"]["window"] = True  # equal to 1, and no number
    with pytest.raises(ValueError, match="window"):
        lizard_config(config)
