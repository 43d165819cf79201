"""Every family of teachers: equal to it where it should be, saved, cached, padded, packed and distilled."""

import pytest
import torch
from tiny import student, teacher, tokens
from transformers import AutoModelForCausalLM

from lizard_models import LizardConfig, Stage1Config, linearize

VARIANTS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "sliding mistral": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "sliding qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
}
every_family = pytest.mark.parametrize(("family", "changes"), VARIANTS.values(), ids=list(VARIANTS))


@torch.no_grad()
@every_family
def test_untrained_student_equals_the_teacher_up_to_the_window(family, changes):
    made, ids = teacher(family, **changes), tokens(2, 12)
    for config in ({}, {"keep_sliding_layers": False}):
        model = linearize(made, LizardConfig.preset("recommended", attention={"window": 12}).replace(**config))
        assert model.config.model_type == f"lizard_{family}"
        theirs = made(ids).logits
        assert (model(ids).logits - theirs).abs().max() < 1e-4
    assert torch.equal(model.generate(ids[:, :8], max_new_tokens=4), made.generate(ids[:, :8], max_new_tokens=4))
    longer = tokens(2, 40)
    assert (model(longer).logits - made(longer).logits).abs().max() > 1e-2


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
    model, ids = student("recommended", family, **changes), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
@every_family
def test_any_division_into_chunks_gives_the_same_logits(family, changes):
    model, ids = student("recommended", family, **changes), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    for sizes in ((40,), (13, 1, 2, 24), (1,) * 40):
        cache, parts = model.new_cache(), []
        for part in ids.split(list(sizes), 1):
            parts.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every_family
def test_generation_with_the_cache_is_generation_without(family, changes):
    model, ids = student("recommended", family, **changes), tokens(2, 20)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))


@torch.no_grad()
@every_family
def test_left_padded_rows_equal_single_runs(family, changes):
    model = student("recommended", family, **changes)
    rows = [tokens(1, length, seed=length) for length in (30, 17, 5)]
    ids = torch.cat([torch.nn.functional.pad(row, (32 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(32) >= 32 - row.shape[1] for row in rows]).long()
    logits = model(ids, attention_mask=mask).logits
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b, -row.shape[1] :], model(row).logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(together[b, 32:], model.generate(row, max_new_tokens=6, do_sample=False)[0, row.shape[1] :])


@torch.no_grad()
@every_family
def test_packed_documents_do_not_meet(family, changes):
    model, ids = student("recommended", family, **changes), tokens(1, 30)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    logits = model(ids, position_ids=positions).logits
    for here in (slice(0, 11), slice(11, 30)):
        torch.testing.assert_close(logits[:, here], model(ids[:, here]).logits, rtol=1e-4, atol=1e-4)


@every_family
def test_distillation_imitates_the_familys_own_attention(family, changes):
    model, ids = student("recommended", family, keep_sliding_layers=False, **changes), tokens(2, 30)
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
    assert (model.attention_errors() > 1e-3).all()
