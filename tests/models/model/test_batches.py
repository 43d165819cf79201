"""Batches: padding anywhere and packed rows equal the sequences alone."""

import pytest
import torch
from tiny import student, teacher, tokens
from transformers import DataCollatorWithFlattening

from lizard_models.model.packing import find_packing, positions_of_documents

LENGTHS = (17, 9, 3, 0)  # a row without a token as well
LAYOUTS = ["left", "right", "mixed"]


def padded(layout: str, width: int = 20) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(rows, ids [B, T], mask [B, T]) with padding on one side, on either side, or between tokens too."""
    rows = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    ids, mask = tokens(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.long)
    draw = torch.Generator().manual_seed(0)
    for b, row in enumerate(rows):
        places = torch.arange(len(row)) + (width - len(row) if layout == "left" else 0)
        if layout == "mixed":
            places = torch.randperm(width, generator=draw)[: len(row)].sort().values
        ids[b, places], mask[b, places] = row, 1
    return rows, ids, mask


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [(), (1,)])
def test_padded_logits_and_states_equal_single_runs(layout, kept):
    model = student(softmax_layers=kept)
    rows, ids, mask = padded(layout)
    cache, pieces = model.new_cache(), []
    for start, end in ((0, 20), (0, 13), (13, 14), (14, 20)):  # at once, then in pieces
        if start == 0:
            cache = model.new_cache()
        pieces.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    for logits in (pieces[0], torch.cat(pieces[1:], 1)):
        assert logits.isfinite().all()
        for b, row in enumerate(rows):
            if len(row):
                wanted = model(row[None], use_cache=False).logits[0]
                torch.testing.assert_close(logits[b][mask[b] == 1], wanted, rtol=1e-4, atol=1e-4)
    for b, row in enumerate(rows):
        alone = model.new_cache().allocate(1)
        if len(row):
            model(row[None], past_key_values=alone)
        for ours, theirs in zip(cache.lizard_layers(), alone.lizard_layers(), strict=True):
            for name, a, s in zip(ours.state._fields, ours.state, theirs.state, strict=True):
                if a is not None:
                    torch.testing.assert_close(a[b : b + 1], s, rtol=1e-4, atol=1e-4, msg=f"{name} of row {b}")
    assert cache.positions().tolist() == list(LENGTHS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept, beams", [((), 1), ((1,), 1), ((1,), 3)])
def test_padded_rows_write_what_they_write_alone(layout, kept, beams):
    model = student(softmax_layers=kept)
    rows, ids, mask = padded(layout)
    settings = dict(max_new_tokens=8, do_sample=False, num_beams=beams)
    settings["return_dict_in_generate"] = True
    together = model.generate(ids, attention_mask=mask, **settings)
    for b, row in enumerate(rows):
        if not len(row):
            continue
        alone = model.generate(row[None], **settings)
        assert torch.equal(together.sequences[b, -8:], alone.sequences[0, -8:])
        if beams == 1:
            states = (out.past_key_values.lizard_layers()[-1].state for out in (together, alone))
            for ours, theirs in zip(*states, strict=True):
                if ours is not None:
                    torch.testing.assert_close(ours[b : b + 1], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampled_tokens_do_not_depend_on_the_padding(layout):
    """The same draws from the same distributions: the rows that are full are left as they are."""
    model = student()
    _, ids, mask = padded(layout)
    _, left, left_mask = padded("left")
    settings = dict(max_new_tokens=8, do_sample=True)
    torch.manual_seed(4)
    wanted = model.generate(left, attention_mask=left_mask, **settings)[:3, -8:]
    torch.manual_seed(4)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings)[:3, -8:], wanted)


def test_right_padding_in_chunks_is_refused():
    _, ids, mask = padded("right")
    with pytest.raises(ValueError, match="prefill_chunk_size=7: rows padded on the right"):
        student().generate(ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=7)


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    """A batch of one row as transformers packs it."""
    features = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in lengths]
    return dict(DataCollatorWithFlattening(return_tensors="pt")(features))


FORMS = {
    "position ids": lambda batch: batch,
    "and a mask": lambda batch: batch | {"attention_mask": torch.ones_like(batch["input_ids"])},
    "boundaries": lambda batch: (
        {k: x for k, x in batch.items() if k != "position_ids"}
        | {"cu_seq_lens_q": torch.tensor([0, 11, 18, 32], dtype=torch.int32)}
    ),
    "seq_idx": lambda batch: (
        {k: x for k, x in batch.items() if k != "position_ids"}
        | {"seq_idx": torch.tensor([[0] * 11 + [1] * 7 + [2] * 14], dtype=torch.int32)}
    ),
}


@pytest.mark.parametrize("form", ["boundaries", "seq_idx"])
def test_boundaries_stand_for_the_position_ids_that_transformers_makes(form):
    batch = packed(11, 7, 14)
    found = positions_of_documents(FORMS[form](batch), 32)
    assert torch.equal(found, batch["position_ids"]) and found[0, :13].tolist() == [*range(11), 0, 1]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [(), (1,)])
def test_packed_documents_do_not_see_each_other(form, kept):
    model = student(softmax_layers=kept).train()
    batch = FORMS[form](packed(11, 7, 14))
    logits = model(**batch).logits
    alone = [model(tokens(1, length, seed=length)).logits for length in (11, 7, 14)]
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    for changed in (slice(0, 11), slice(18, 32)):  # what stands beside the second document is nothing to it
        other = batch["input_ids"].clone()
        other[:, changed] = tokens(1, changed.stop - changed.start, seed=7)
        assert torch.equal(model(**batch | {"input_ids": other}).logits[:, 11:18], logits[:, 11:18])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["student", "distill"])
@pytest.mark.parametrize("kept", [(), (1,)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_rows(mode, kept, attention):
    model = student(softmax_layers=kept, attn_implementation=attention).train()
    batch, short = packed(11, 7), packed(5)
    ids = torch.stack([batch["input_ids"][0], torch.cat([short["input_ids"][0], tokens(1, 13)[0]])])
    positions = torch.stack([batch["position_ids"][0], torch.arange(18)])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if mode == "student":
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for b, at, row in ((0, slice(0, 11), 11), (0, slice(11, 18), 7), (1, slice(0, 5), 5)):
            wanted = model(tokens(1, row, seed=row)).logits[0]
            torch.testing.assert_close(logits[b, at], wanted, rtol=1e-4, atol=1e-4)
        return
    model.set_attention_mode("distill")
    losses = []
    for seed in (1, 2):
        ids[1, 5:] = tokens(1, 13, seed=seed)[0]
        losses.append(model(ids, attention_mask=mask, position_ids=positions).loss)
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_packed_rows_keep_no_cache():
    batch, model = packed(11, 7), student()
    with pytest.raises(ValueError, match="packed sequences keeps no cache"):
        model(**batch, past_key_values=model.new_cache())
    assert model(**batch).past_key_values is None


def test_padding_alone_is_not_packing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    positions = torch.tensor([[0, 0, 0, 1, 2], [4, 5, 5, 6, 6], [1, 1, 1, 1, 1]])
    assert find_packing(positions, 3, mask) is None
    assert find_packing(torch.tensor([[3, 4, 5, 6]]), 2, None) is None
    assert find_packing(torch.tensor([[3, 4, 0, 1]]), 2, None).cu_seqlens.tolist() == [0, 2, 4, 6, 8]
    going_on = torch.tensor([[0, 1, 0, 1], [2, 3, 0, 1]])  # a row begins one after where the row before it ends
    assert find_packing(going_on, 2, None).cu_seqlens.tolist() == [0, 2, 4, 6, 8]
    real = torch.tensor([[True, True, True, False], [True, True, False, True]])
    assert find_packing(torch.tensor([[0, 1, 0, 0], [1, 2, 0, 0]]), 2, real).cu_seqlens.tolist() == [0, 2, 3, 5, 6]


def test_training_on_packed_rows_equals_training_on_documents():
    model, batch = student().train().requires_grad_(True), packed(11, 7, 14)
    model(**batch | {"attention_mask": torch.ones_like(batch["input_ids"])}).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0
    for length in (11, 7, 14):
        ids = tokens(1, length, seed=length)
        total = total + model(ids, labels=ids).loss * (length - 1)
    (total / (10 + 6 + 13)).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_teacher_reads_padded_rows_alike():
    """Left padding, which transformers supports: an untrained student within its window is its teacher."""
    rows, ids, mask = padded("left")
    settings = dict(max_new_tokens=4, do_sample=False)
    ours = student(window=32, seed=None).generate(ids, attention_mask=mask, **settings)
    theirs = teacher().generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours[:3], theirs[:3])
