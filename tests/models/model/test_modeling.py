"""Forward passes of whole models: padding, packing, distillation, gradient checkpointing, refusals."""

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_slopes, disturb, student, teacher, tokens
from transformers import DynamicCache

from lizard_models import LizardConfig, Stage1Config, linearize
from lizard_models.model.forward_plan import ForwardPlan
from lizard_models.model.layer_loss import output_error


def padded(rows: list[torch.Tensor], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, T] with each row's tokens at the left, at the right, or with holes between them."""
    length = max(len(r) for r in rows) + 3
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        at = {"right": torch.arange(len(row)), "left": torch.arange(length - len(row), length)}.get(layout)
        if at is None:
            at = torch.randperm(length, generator=torch.Generator().manual_seed(b))[: len(row)].sort().values
        ids[b, at], mask[b, at] = row, 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "right", "mixed"])
@pytest.mark.parametrize("preset", ["plain", "paper", "lolcats", "liger", "window_only"])
def test_padded_rows_equal_single_runs(preset, layout):
    model = student(preset)
    rows = [tokens(1, length, seed=length)[0] for length in (30, 17, 5, 1)]
    ids, mask = padded(rows, layout)
    logits = model(ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(logits[b, mask[b].bool()], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_rows_with_kept_softmax_layers_equal_single_runs():
    model = student(softmax_layers=(1,))
    rows = [tokens(1, length, seed=length)[0] for length in (30, 17, 5)]
    for layout in ("left", "right"):
        ids, mask = padded(rows, layout)
        logits = model(ids, attention_mask=mask).logits
        for b, row in enumerate(rows):
            torch.testing.assert_close(logits[b, mask[b].bool()], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (1,)])
def test_packed_documents_do_not_meet(kept):
    model, ids = student(softmax_layers=kept), tokens(2, 30)
    positions = torch.stack([torch.cat([torch.arange(11), torch.arange(19)]), torch.arange(30)])
    output = model(ids, position_ids=positions)
    logits = output.logits
    assert output.past_key_values is None
    with pytest.raises(ValueError, match="packed sequences keeps no cache"):
        model(ids, position_ids=positions, use_cache=True)
    for row, here in ((0, slice(0, 11)), (0, slice(11, 30)), (1, slice(0, 30))):
        torch.testing.assert_close(logits[row, here], model(ids[row : row + 1, here]).logits[0], rtol=1e-4, atol=1e-4)


# Distillation


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("error", ["relative", "mse"])
def test_errors_are_those_of_the_layers_on_the_teachers_stream(family, error, attn_implementation):
    model = student(family=family, attn_implementation=attn_implementation)
    ids = tokens(2, 30)
    seen = {}

    def remember(name):
        return lambda module, args, kwargs, out: seen.__setitem__(name, (kwargs, out))

    model.set_attention_mode("teacher")
    hooks = [a.register_forward_hook(remember(i), with_kwargs=True) for i, a in enumerate(model.lizard_attentions())]
    teacher_logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    same = teacher(family, attn_implementation=attn_implementation)
    assert torch.equal(teacher_logits, same(ids, use_cache=False).logits)
    expected = []
    for i, attention in enumerate(model.lizard_attentions()):
        kwargs, _ = seen[i]
        x, rope = kwargs["hidden_states"], kwargs["position_embeddings"]
        heads = (p(x).unflatten(-1, (-1, 16)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k, v = heads
        mask = None if kwargs.get("plan", ForwardPlan()).without_mask else kwargs["attention_mask"]
        wanted = attention.teacher_attention(q, k, v, rope, mask)
        o, _ = attention.lizard(x, q, k, v, rope)
        expected.append(
            torch.stack([F.mse_loss(o[:, :, h], wanted[:, :, h]) / wanted[:, :, h].square().mean() for h in range(4)])
            .mean() if error == "relative" else F.mse_loss(o, wanted)
        )  # fmt: skip
    model.set_attention_mode("distill", Stage1Config(error=error))
    output = model(ids)
    torch.testing.assert_close(model.layer_losses(), torch.stack(expected), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(output.loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-8)
    assert output.logits is None


@pytest.mark.parametrize("target", ["heads", "output"])
def test_gradients_taken_at_once_are_the_gradients(target):
    model = student("paper").requires_grad_(True)
    ids = tokens(2, 30)
    model.set_attention_mode("distill", Stage1Config(target=target))
    (2.0 * model(ids).loss).backward()
    new = dict(model.lizard_parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in new)
    for attention in model.lizard_attentions():
        attention.lizard.requires_grad_(False)
    index = 1
    name, parameter = next((n, p) for n, p in new.items() if "layers.1" in n and "alpha" in n)
    with torch.no_grad():
        step, errors = 1e-2, []
        for sign in (1, -1):
            parameter += sign * step
            model(ids)
            errors.append(model.layer_losses()[index].item())
            parameter -= sign * step
    numeric = 2.0 / 3 * (errors[0] - errors[1]) / (2 * step)
    assert abs(parameter.grad.item() - numeric) < 2e-2 * abs(numeric)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize(("target", "products"), [("heads", 1), ("output", 2)])
def test_distillation_projects_no_output_twice(inputs, target, products):
    model, ids = student(), tokens(1, 40)
    model.set_attention_mode("distill", Stage1Config(target=target, inputs=inputs))
    made = []
    hook = model.lizard_attentions()[0].o_proj.register_forward_hook(lambda *args: made.append(args[2]))
    layer = model.model.layers[0].self_attn.register_forward_hook(lambda *args: made.append(args[2][0]))
    model(ids)
    hook.remove()
    layer.remove()
    *projected, passed_on = made
    assert len(projected) == products
    which = 0 if inputs == "teacher" else -1  # the target's comes first
    assert torch.equal(passed_on, projected[which])


def test_distillation_reads_the_students_stream_when_told():
    model, ids = student(), tokens(2, 30)
    model.set_attention_mode("distill", Stage1Config(error="relative"))
    model(ids)
    forced = model.layer_losses()
    model.set_attention_mode("distill", Stage1Config(error="relative", inputs="student"))
    model(ids)
    free = model.layer_losses()
    torch.testing.assert_close(free[0], forced[0])
    assert (free[1:] != forced[1:]).all()


def test_padding_counts_for_nothing_in_the_error():
    model = student().requires_grad_(True)
    model.set_attention_mode("distill")
    model(tokens(1, 20))
    alone = model.layer_losses().detach()
    ids, mask = padded([tokens(1, 20)[0]], "right")
    model(ids, attention_mask=mask).loss.backward()
    torch.testing.assert_close(model.layer_losses().detach(), alone, rtol=1e-4, atol=1e-7)


def test_distillation_keeps_one_layers_graph():
    model = student().requires_grad_(True)
    model.set_attention_mode("distill")
    loss = model(tokens(2, 64)).loss
    graph, kept = [loss.grad_fn], 0
    while graph:
        node = graph.pop()
        graph.extend(child for child, _ in node.next_functions if child is not None)
        kept += sum(t.numel() for t in getattr(node, "saved_tensors", ()) if t is not None)
    assert kept == sum(p.numel() for _, p in model.lizard_parameters())


@pytest.mark.parametrize("preset", ["plain", "paper"])
def test_text_shorter_than_the_window_trains_too(preset):
    model, ids = student(preset, window=32).double().requires_grad_(True), tokens(2, 10)
    model.set_attention_mode("distill")
    assert_slopes(model, lambda: model(ids).loss)


def test_a_training_step_of_stage1_lowers_the_error():
    model, ids = student(seed=None), tokens(4, 64)
    trained = [p.requires_grad_() for _, p in model.lizard_parameters()]
    model.set_attention_mode("distill")
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(15):
        loss = model.train()(ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_modes_and_errors_are_refused_by_name():
    model, ids = student(), tokens(1, 9)
    with pytest.raises(ValueError, match="mode must be one of student, teacher, distill, got 'pupil'"):
        model.set_attention_mode("pupil")
    with pytest.raises(ValueError, match="no losses of layers"):
        model.layer_losses()
    cache = model.new_cache()
    model.set_attention_mode("distill")
    with pytest.raises(ValueError, match="keeps no cache"):
        model(ids, use_cache=True)
    model.set_attention_mode("teacher")
    with pytest.raises(ValueError, match="cannot fill a LizardCache"):
        model(ids, past_key_values=cache)


def test_attention_error_by_hand():
    target = torch.tensor([[[[3.0, 4.0]], [[1.0, 0.0]]]])
    wrong = target + torch.tensor([0.5, 0.0])
    assert output_error(wrong, target, "relative").item() == pytest.approx(0.5 / 26)
    assert output_error(wrong, target, "mse").item() == pytest.approx(0.125)
    first = torch.tensor([[True, False]])
    assert output_error(wrong, target, "relative", first).item() == pytest.approx(0.25 / 25)
    assert output_error(wrong, target, "mse", first).item() == pytest.approx(0.125)


# Training the whole student


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = student().requires_grad_(True).train(), tokens(2, 30)
    gradients = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_training_makes_no_cache_unless_asked():
    model, ids = student(), tokens(1, 9)
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    assert model.eval()(ids).past_key_values is not None


# Refusals


def test_wrong_inputs_are_named():
    model, ids = student(), tokens(2, 9)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\), wanted \[2, 9\]"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 9, 9\)"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="must be a LizardCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="no attention matrices"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@torch.no_grad()
def test_hidden_states_and_embeddings():
    model, ids = student(), tokens(2, 20)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    from_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(from_embeddings, out.logits)


def test_disturbed_students_differ_from_fresh_ones():
    model = linearize(teacher(), LizardConfig.preset("plain", attention={"window": 8}))
    ids = tokens(1, 20)
    before = model(ids).logits
    disturb(model)
    assert (model(ids).logits - before).abs().max() > 1e-4


@torch.no_grad()
def test_half_precision_keeps_the_frequencies_of_rope():
    model, ids = student(), tokens(1, 30)
    exact = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.bfloat16().model.rotary_emb.inv_freq, exact)
    rounded = linearize(teacher().bfloat16(), LizardConfig.preset("plain", attention={"window": 8}))
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact)
    disturb(rounded)
    assert torch.equal(rounded(ids).logits, model(ids).logits)
