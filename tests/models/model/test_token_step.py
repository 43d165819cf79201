"""A token of one text straight through a layer on a CPU: the numbers of its modules, and who sees that."""

import copy
import pickle

import pytest
import torch
from tiny import student as copied_student
from tiny import teacher, tokens
from torch import nn

from lizard_models import LizardConfig, linearize
from lizard_models.model import row_product, token_step
from lizard_models.model.token_step import LayerStep

student = copied_student.__wrapped__  # a copy's weights do not lie side by side
PRESETS = {
    "plain": dict(preset="plain", attention={"anchors": 2}),
    "recommended": dict(preset="recommended", attention={"anchors": 2, "kept_keys": 5, "score_stride": 2}),
}
TAKES = {"llama": 3, "mistral": 3, "qwen2": 3, "smollm3": 3, "qwen3": 0, "gemma2": 0, "gemma3_text": 0}  # layers
LENGTH = 40


@pytest.fixture
def straight(monkeypatch):
    """The layers that went straight."""
    went, step = [], LayerStep.step

    def counted(self, *given):
        y = step(self, *given)
        went.extend([] if y is None else [self])
        return y

    monkeypatch.setattr(LayerStep, "step", counted)
    return went


def steps(model, ids, begin=3, cache=None):
    """Logits of each token from ``begin`` on, one by one."""
    cache = cache or model.new_cache()
    model(ids[:, :begin], past_key_values=cache)
    logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(begin, ids.shape[1])]
    return torch.cat(logits, 1)


def through_modules(model, ids, begin=3):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_step.TokenSteps, "step", lambda *given: None)
        return steps(model, ids, begin)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", TAKES)
def test_the_numbers_of_the_modules(straight, family, preset):
    model, ids = student(family=family, **PRESETS[preset]), tokens(1, LENGTH)
    found = steps(model, ids)
    took = len(straight)
    if family == "smollm3":  # whose every fourth layer has no positions, of three none
        assert all(layer.self_attn.use_rope for layer in model.model.layers)
    assert took == TAKES[family] * (LENGTH - 3)
    close(found, through_modules(model, ids))
    assert len(straight) == took


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_generation_and_the_state_behind_it(straight, preset):
    model, ids = student(**PRESETS[preset]), tokens(1, 12)
    cache, other = model.new_cache(), model.new_cache()
    new = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert straight
    close(model(new, use_cache=False).logits[:, -1:], steps(model, new, 31))
    model(new[:, :-1], past_key_values=other)
    for a, b in zip(cache.lizard_layers(), other.lizard_layers(), strict=True):
        close(a.state.position, b.state.position)
    next_ids = tokens(1, 1)
    close(model(next_ids, past_key_values=cache).logits, model(next_ids, past_key_values=other).logits)


@torch.no_grad()
def test_who_looks_has_the_modules(straight):
    model, ids, seen = student(**PRESETS["plain"]), tokens(1, 8), []
    layer = model.model.layers[1]
    for module in (layer.self_attn, layer.mlp.down_proj, layer.self_attn.lizard.gate, layer.post_attention_layernorm):
        steps(model, ids)
        straight.clear(), seen.clear()
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        wanted = steps(model, ids)
        handle.remove()
        assert len(seen) == 6 and len(straight) == 2 * 5  # the other layers'
        close(steps(model, ids), wanted)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    straight.clear()
    steps(model, ids)
    handle.remove()
    assert not straight


@torch.no_grad()
def test_weights_that_change_are_followed(straight):
    model, ids = student(**PRESETS["plain"]), tokens(1, 8)
    steps(model, ids)
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[2].mlp
    attn.k_proj.weight.mul_(1.5)
    attn.lizard.mix.bias.add_(0.3)
    close(steps(model, ids), through_modules(model, ids))
    straight.clear()
    attn.o_proj.weight = nn.Parameter(attn.o_proj.weight * 0.5, requires_grad=False)
    mlp.act_fn = nn.SiLU()
    found = steps(model, ids)
    assert len(straight) == 3 * 5
    close(found, through_modules(model, ids))
    straight.clear()
    mlp.up_proj = nn.Sequential(mlp.up_proj)  # not a Linear
    close(steps(model, ids), through_modules(model, ids))
    attn.q_proj.weight.data = attn.q_proj.weight.data.clone()  # no longer beside the others
    close(steps(model, ids), through_modules(model, ids))
    assert len(straight) == (2 + 1) * 5


@torch.no_grad()
def test_copies_and_pickles_begin_anew(straight):
    model, ids = student(**PRESETS["plain"]), tokens(1, 8)
    wanted = steps(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(vars(layer)["token_step"] is None for layer in other.model.layers)
        other.model.layers[0].mlp.down_proj.weight.zero_()
        close(steps(other, ids), through_modules(other, ids))
    assert torch.equal(steps(model, ids), wanted)


@torch.no_grad()
def test_what_is_no_plain_step_goes_through_modules(straight):
    model, ids = student(**PRESETS["recommended"]), tokens(2, 8)
    steps(model, ids)
    steps(model.double(), ids[:1])
    model.float()
    cache = model.new_cache()
    cache.activate_past_recording()
    recorded = steps(model, ids[:1], cache=cache)
    with torch.enable_grad():
        model.model.layers[0].mlp.down_proj.weight.requires_grad_()
        assert steps(model, ids[:1]).requires_grad
        model.requires_grad_(False)
    padded = model.new_cache()
    mask = torch.tensor([[0, 1, 1, 1]])
    model(ids[:1, :4], attention_mask=mask, past_key_values=padded)
    assert not straight
    close(steps(model, ids[:1]), recorded)
    assert straight


def test_states_of_inference_mode(straight):
    model, ids = student(**PRESETS["recommended"]), tokens(1, 30)
    with torch.no_grad():
        wanted = steps(model, ids)
    with torch.inference_mode():
        close(steps(model, ids), wanted)
    cache = model.new_cache()
    with torch.inference_mode():
        steps(model, ids[:, :20], cache=cache)
    with torch.no_grad():
        rest = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    close(torch.cat(rest, 1), wanted[:, 17:])
    assert len(straight) == 3 * (27 + 27 + 17 + 10)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_one_row_by_all_threads(threads, monkeypatch):
    """A product of one row is as ``F.linear`` gives it, in parts where the weight is large."""
    monkeypatch.setattr(row_product, "LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, bias = torch.randn(24), torch.randn(40)
    for rows in (40, 7, 1):
        weight = torch.randn(rows, 24)
        torch.testing.assert_close(row_product.row_product(weight, x), weight @ x)
        torch.testing.assert_close(row_product.row_product(weight, x, bias[:rows]), weight @ x + bias[:rows])


def test_a_linear_of_one_row_is_a_linear(monkeypatch):
    """For other dtypes, under autograd, for weights with gaps and for several rows too."""
    monkeypatch.setattr(row_product, "LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for bias in (False, True):
        made = nn.Linear(24, 40, bias)
        linear = row_product.with_row_product(made)
        for x in (torch.randn(1, 1, 24), torch.randn(24), torch.randn(2, 3, 24), torch.randn(1, 48)[:, ::2]):
            with torch.no_grad():
                torch.testing.assert_close(linear(x), made(x))
            leaf = x.clone().requires_grad_()
            got, wanted = (torch.autograd.grad(m(leaf).square().sum(), [leaf, *m.parameters()]) for m in (linear, made))
            torch.testing.assert_close(got, wanted)
        with torch.no_grad():
            one = torch.randn(1, 24, dtype=torch.float64)
            torch.testing.assert_close(linear.double()(one), made.double()(one))
            linear.float().weight = nn.Parameter(torch.randn(24, 40).T)
            row = torch.randn(1, 24)
            torch.testing.assert_close(linear(row), nn.functional.linear(row, linear.weight, linear.bias))


def test_the_head_is_such_a_linear_and_its_teachers_is_none():
    made = teacher(tie_word_embeddings=True)
    model = linearize(made, LizardConfig.preset("plain"))
    assert type(made.lm_head) is nn.Linear and type(model.lm_head) is row_product.RowLinear
    assert model.lm_head.weight is made.lm_head.weight is model.model.embed_tokens.weight
    assert type(pickle.loads(pickle.dumps(model)).lm_head) is row_product.RowLinear


@torch.no_grad()
def test_logits_of_one_thread_and_of_several(monkeypatch):
    model, ids = student(**PRESETS["plain"]), tokens(1, 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    wanted = steps(model, ids)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(row_product, "LEAST", 1)
    close(steps(model, ids), wanted)
