"""Every family of teachers: equal to it where it should be, saved, cached, padded, packed and distilled."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import student, teacher, tokens
from training import Sequences, arguments, fresh, moved, recipes, snapshot
from transformers import AutoModel, AutoModelForCausalLM

from lizard_models import LizardConfig, Stage1Config, linearize
from lizard_models.distill import held_out_errors, train_stage1, train_stage2
from lizard_models.distill.losses import distillation_loss, logits_of, next_tokens

ROPE_KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)],
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
LOCAL_AND_GLOBAL = {"sliding_attention": ROPE_KINDS["default"], "full_attention": ROPE_KINDS["linear"]}
VARIANTS = {
    "llama": ("llama", {}),
    "sliding mistral": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "sliding qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "global gemma3": ("gemma3_text", {"sliding_window": 40, "rope_parameters": LOCAL_AND_GLOBAL}),
}
every_family = pytest.mark.parametrize(("family", "changes"), VARIANTS.values(), ids=list(VARIANTS))


@torch.no_grad()
@every_family
def test_untrained_student_equals_the_teacher_up_to_the_window(family, changes):
    made, ids = teacher(family, **changes), tokens(2, 12)
    for preset, config in (("plain", {}), ("plain", {"keep_sliding_layers": False}), ("recommended", {})):
        model = linearize(made, LizardConfig.preset(preset, attention={"window": 12}).replace(**config))
        assert model.config.model_type == f"lizard_{family}"
        theirs = made(ids).logits
        assert (model(ids).logits - theirs).abs().max() < 1e-4
    assert torch.equal(model.generate(ids[:, :8], max_new_tokens=4), made.generate(ids[:, :8], max_new_tokens=4))
    longer = tokens(2, 40)
    assert (model(longer).logits - made(longer).logits).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", ROPE_KINDS.values(), ids=list(ROPE_KINDS))
def test_positions_are_the_teachers_own_past_every_limit_of_its_rope(kind):
    made, ids = teacher(rope_parameters=kind, max_position_embeddings=32), tokens(2, 48)
    model = linearize(made, LizardConfig.preset("plain", attention={"window": 48}))
    for length in (12, 24, 48, 20):  # dynamic kinds change their frequencies on the way up, and back
        assert (model(ids[:, :length]).logits - made(ids[:, :length]).logits).abs().max() < 1e-4
    prompt = ids[:, :12]
    assert torch.equal(model.generate(prompt, max_new_tokens=30), made.generate(prompt, max_new_tokens=30))


@torch.no_grad()
def test_layers_without_positions_do_not_move_their_anchors():
    made, ids = teacher("smollm3", no_rope_layers=[0, 0, 0]), tokens(2, 60)
    recommended = LizardConfig.preset("plain", attention={"window": 8, "positions": "true"})
    moving = {"positions": "clamped", "position_limit": 20, "position_step": 5}
    model = linearize(made, recommended.replace(attention=moving))
    assert torch.equal(model(ids).logits, linearize(made, recommended)(ids).logits)


@torch.no_grad()
@every_family
def test_teacher_mode_is_the_teacher(family, changes):
    made, ids = teacher(family, **changes), tokens(2, 30)
    model = linearize(made, LizardConfig.preset("paper", attention={"window": 8}))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model.set_attention_mode("teacher")
    assert torch.equal(model(ids, attention_mask=mask).logits, made(ids, attention_mask=mask).logits)


@torch.no_grad()
@every_family
def test_a_saved_model_comes_back_bit_equal(tmp_path, family, changes):
    model, ids = student("plain", family, **changes), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for _, p in half.lizard_parameters()} == {torch.float32} and half.dtype == torch.bfloat16
    assert all(torch.equal(p, ours[name].to(p.dtype)) for name, p in half.named_parameters())
    decoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
@every_family
def test_any_division_into_chunks_gives_the_same_logits(family, changes):
    model, ids = student("plain", family, **changes), tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    for sizes in ((24,), (9, 1, 2, 12), (1,) * 24):
        cache, parts = model.new_cache(), []
        for part in ids.split(list(sizes), 1):
            parts.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every_family
def test_generation_with_the_cache_is_generation_without(family, changes):
    model, ids = student("plain", family, **changes), tokens(2, 20)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


@torch.no_grad()
@every_family
def test_left_padded_rows_equal_single_runs(family, changes):
    model = student("plain", family, **changes)
    rows = [tokens(1, length, seed=length) for length in (30, 17, 5)]
    ids = torch.cat([F.pad(row, (32 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(32) >= 32 - row.shape[1] for row in rows]).long()
    logits = model(ids, attention_mask=mask).logits
    together = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b, -row.shape[1] :], model(row).logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(together[b, 32:], model.generate(row, max_new_tokens=3, do_sample=False)[0, row.shape[1] :])


@torch.no_grad()
@every_family
def test_packed_documents_do_not_meet(family, changes):
    model, ids = student("plain", family, **changes), tokens(1, 30)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    logits = model(ids, position_ids=positions).logits
    for here in (slice(0, 11), slice(11, 30)):
        torch.testing.assert_close(logits[:, here], model(ids[:, here]).logits, rtol=1e-4, atol=1e-4)


@every_family
def test_distillation_imitates_the_familys_own_attention(family, changes):
    model, ids = student("plain", family, keep_sliding_layers=False, **changes), tokens(2, 30)
    made, seen = teacher(family, **changes), {}
    for i, layer in enumerate(made.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
    made(ids, use_cache=False)
    model.set_attention_mode("distill", Stage1Config(error="relative"))
    targets = []
    for attention in model.lizard_attentions():
        own = attention.teacher_attention

        def remember(*args, own=own, **kwargs):
            targets.append(own(*args, **kwargs))
            return targets[-1]

        attention.teacher_attention = remember
    model(ids)
    for i, target in enumerate(targets):
        torch.testing.assert_close(target.flatten(2), seen[i].detach())
    assert (model.layer_losses() > 1e-3).all()


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_both_stages_train(tmp_path, family):
    model = fresh("plain", family=family)
    first, second = recipes(model, steps=8)
    before, held_out = snapshot(model), tokens(4, 48, seed=7)
    error = held_out_errors(model, held_out)
    of_heads = dataclasses.replace(first, target="heads", max_steps=24)  # what is measured
    train_stage1(model, Sequences(), arguments(tmp_path / "1"), of_heads)
    assert (held_out_errors(model, held_out) < 0.95 * error).all()
    assert moved(before, model) == {name for name, _ in model.lizard_parameters()}
    tuned, result = train_stage2(model, Sequences(2), arguments(tmp_path / "2"), second)
    assert result.losses[-1][1] < result.losses[0][1] and type(tuned) is type(model)


def test_a_soft_cap_of_the_logits_is_in_every_loss():
    made, ids = teacher("gemma2", final_logit_softcapping=2.0), tokens(2, 30)
    hidden, targets = made.model(ids).last_hidden_state, next_tokens(ids)
    torch.testing.assert_close(distillation_loss(hidden, logits_of(made), targets), made(ids, labels=ids).loss)
    bare = F.cross_entropy(made.lm_head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (made(ids, labels=ids).loss - bare).abs() > 0.1
