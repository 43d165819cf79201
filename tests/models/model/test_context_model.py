"""A text over ranks through a whole model: logits, loss and gradients are those of one rank."""

import pytest
import torch
from tiny import student, tokens

from lizard_models import context_part
from lizard_models.model import context
from tests.rank_threads import on_ranks, threads_as_ranks

RANKS, LENGTH = 3, 41
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    threads_as_ranks(monkeypatch)
    monkeypatch.setattr(context, "every_rank", lambda x, group: group.gathered({"x": x})["x"])


def trainable(preset, **changes):
    model = student(preset, **changes).double()
    for _, parameter in model.stage_parameters():
        parameter.requires_grad_(True)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    return model


CASES = {
    "plain": {},
    "kept keys": {"attention": {"kept_keys": 3, "score_received": True, "score_dim": 6}},
    "anchors that move on": {"attention": {"position_limit": 24, "position_step": 8}},
    "kept keys that move on": {"attention": {"kept_keys": 3, "score_dim": 6, "position_limit": 24, "position_step": 8}},
    "sliding gemma": {"family": "gemma3_text", "keep_sliding_layers": False},
}


@pytest.mark.parametrize(
    ("case", "padded"), [*((case, False) for case in CASES), ("plain", True), ("kept keys that move on", True)]
)
def test_ranks_are_one(case, padded):
    model, ids = trainable("plain", **CASES[case]), tokens(2, LENGTH)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, :16], mask[1, 25:] = False, False  # the first part of one row, and the last of the other
        batch |= {"attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    count = int((batch["labels"][:, 1:] != -100).sum())
    whole = model(**batch, use_cache=False)
    found = on_ranks(RANKS, lambda rank, group: model(**context_part(batch, group), num_items_in_batch=count))
    logits = torch.cat([part.logits for part in found], 1)
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(logits[real], whole.logits[real], rtol=1e-5, atol=1e-6)
    loss = sum(part.loss for part in found)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-6, atol=0)
    learn = [p for p in model.parameters() if p.requires_grad]
    for mine, wanted in zip(*(torch.autograd.grad(x, learn) for x in (loss, whole.loss)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_positions_need_not_be_given():
    model, ids = student().double(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0

    def run(rank, group):
        own = context_part({"input_ids": ids, "attention_mask": mask}, group)
        del own["position_ids"]
        return model(**own).logits

    found = torch.cat(on_ranks(RANKS, run), 1)
    wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, {"use_cache": True}, "leaves no cache"),
        ({}, {"labels": tokens(1, 9)}, "give shift_labels too"),
        ({}, {"position_ids": torch.arange(9)[None] % 4}, "packed sequences"),
        ({"softmax_layers": (1,)}, {}, "kept softmax layers need the keys of all ranks"),
    ],
)
def test_what_a_part_leaves_out_is_refused(changes, more, message):
    model = student(**changes)
    with pytest.raises(ValueError, match=message):
        on_ranks(1, lambda rank, group: model(input_ids=tokens(1, 9), context_group=group, **more))


@torch.no_grad()
def test_the_teacher_reads_parts_too():
    """Softmax over the keys of all ranks up to its own; gradients, and the mode "distill", are for processes."""
    model, ids = student().double(), tokens(2, 42)
    model.set_attention_mode("teacher")
    found = on_ranks(RANKS, lambda rank, group: model(**context_part({"input_ids": ids}, group)).logits)
    torch.testing.assert_close(torch.cat(found, 1), model(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)

    def without_positions(rank, group):
        return model(input_ids=ids.chunk(RANKS, 1)[rank], context_group=group).logits

    assert torch.equal(torch.cat(on_ranks(RANKS, without_positions), 1), torch.cat(found, 1))


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, {"input_ids": tokens(1, 11)}, "got parts of .4, 4, 3. positions, wanted as many on every rank"),
        ({}, {"attention_mask": torch.zeros(1, 9).long()}, "attention_mask: got padding, wanted full rows"),
        ({"attn_implementation": "eager"}, {}, 'in mode "teacher" .* wanted attn_implementation="sdpa"'),
        ({"rope_parameters": DYNAMIC}, {}, "RoPE of the kind dynamic chooses its angles by the length"),
    ],
)
@torch.no_grad()
def test_what_a_teacher_leaves_out_is_refused(changes, more, message):
    model = student(**changes)
    model.set_attention_mode("teacher")
    with pytest.raises(ValueError, match=message):
        on_ranks(RANKS, lambda rank, group: model(**context_part({"input_ids": tokens(1, 9)} | more, group)))


def test_the_teacher_does_not_learn_over_ranks():
    model = student()
    model.set_attention_mode("teacher")
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="softmax over ranks has no gradient; call it under torch.no_grad"):
        on_ranks(1, lambda rank, group: model(input_ids=tokens(1, 9), context_group=group))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": tokens(1, 9)}, r"got \['labels'\], wanted input_ids"),
        ({"input_ids": tokens(1, 9), "pixel_values": tokens(1, 9)}, "got pixel_values, wanted"),
        ({"input_ids": tokens(1, 9), "labels": tokens(1, 8)}, "got labels, wanted"),
        ({"input_ids": tokens(1, 2)}, "got 2 positions for 3 ranks"),
    ],
)
def test_batches_that_are_not_cut(batch, message):
    with pytest.raises(ValueError, match=message):
        on_ranks(3, lambda rank, group: context_part(batch, group))
