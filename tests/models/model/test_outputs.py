"""Tuples in place of fields, wherever they are asked for."""

import pytest
import torch
from tiny import student, teacher, tokens


@torch.no_grad()
@pytest.mark.parametrize("by", ["argument", "config"])
@pytest.mark.parametrize("mode", ["student", "teacher", "distill"])
@pytest.mark.parametrize("padding", [False, True])
def test_tuples_hold_what_the_fields_do(by, mode, padding):
    model, ids = student(num_hidden_layers=1), tokens(2, 20)
    model.set_attention_mode(mode)
    mask = torch.ones_like(ids)
    mask[0, 15:] = int(not padding)
    given = dict(attention_mask=mask, output_hidden_states=True) | ({} if mode == "distill" else {"use_cache": True})
    for part in (model, model.model):
        model.config.return_dict = True
        fields = part(ids, **given)
        model.config.return_dict = by == "argument"
        found = part(ids, **given, **({"return_dict": False} if by == "argument" else {}))
        assert isinstance(found, tuple) and len(found) == len(fields.to_tuple())
        assert torch.equal(found[0], fields[0])
        assert all(torch.equal(a, b) for a, b in zip(found[-1], fields.hidden_states, strict=True))
        if by == "config":
            assert torch.equal(part(ids, **given, return_dict=True)[0], fields[0])


@torch.no_grad()
def test_a_config_of_tuples_generates():
    model, ids = student(num_hidden_layers=1), tokens(2, 20)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.config.return_dict = False
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    assert type(teacher(num_hidden_layers=1)(ids, return_dict=False)) is type(model(ids))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"softmax_layers": (1,)}, {"family": "gemma3_text"}])
@pytest.mark.parametrize("preset", ["plain", "paper", "liger"])
def test_shapes_are_known_without_data(preset, options):
    """A whole model on the meta device: a prompt and a step."""
    model, ids = student(preset, **options), tokens(2, 20)
    wanted = model(ids)
    found = model.to("meta")(ids.to("meta"))
    assert found.logits.is_meta and found.logits.shape == wanted.logits.shape
    assert found.past_key_values.state_bytes() == wanted.past_key_values.state_bytes()
    assert model(ids[:, :1].to("meta"), past_key_values=found.past_key_values).logits.shape == (
        *ids[:, :1].shape,
        wanted.logits.shape[-1],
    )
