"""Keys chosen by what later queries lose without them: the largest labels stay, in any number of blocks."""

import dataclasses

import pytest
import torch
from readable import byte_tokenizer, save_teacher, save_texts
from tiny import disturb, student, teacher, tokens

from benchmarks.quality.bench import Bench, applies
from benchmarks.quality.oracle import choose_by_labels
from benchmarks.quality.rows import ROWS, Budget, RowSpec
from benchmarks.quality.runner import Runner
from benchmarks.quality.worker import run_row
from lizard_models import LizardConfig, linearize
from lizard_models.evaluation import loss_by_position
from lizard_models.recipes import Stage0Config
from lizard_models.teachers.loading import load_model
from lizard_models.text.sequences import load_documents

WINDOW, ANCHORS, PLACES = 8, 4, 5


def needed(model, ids) -> list[torch.Tensor]:
    """[B, T, Hk] of each layer: what share of its output is lost without a key, squared, a mean over later queries.

    From the teacher's own attention matrices and one product per key.
    """
    found = []
    with torch.no_grad():
        read = model(ids, output_attentions=True, output_hidden_states=True)
        for layer, a, x in zip(model.model.layers, read.attentions, read.hidden_states, strict=False):
            attention, x = layer.self_attn, layer.input_layernorm(x)
            heads, dim = a.shape[1], attention.head_dim
            group = heads // model.config.num_key_value_heads
            v = attention.v_proj(x).unflatten(-1, (-1, dim)).repeat_interleave(group, 2)
            weights = attention.o_proj.weight.unflatten(1, (heads, dim))
            alone = torch.einsum("ohd,bthd->btho", weights, v)  # what a key adds, were it seen with weight one
            output = torch.einsum("bhij,bjho->bio", a, alone)
            lost = (
                a.square()
                * alone.square().sum(-1).transpose(1, 2)[:, :, None]
                / output.square().sum(-1)[:, None, :, None]
            )
            length = ids.shape[1]
            far = torch.arange(length)[:, None] >= torch.arange(length) + WINDOW
            mean = lost.masked_fill(~far, 0.0).sum(2) / far.sum(0).clamp(min=1)
            found.append(mean.unflatten(1, (-1, group)).sum(2).transpose(1, 2))
    return found


@pytest.mark.parametrize("received", [False, True])
def test_the_keys_that_later_queries_need_most_stay(received):
    ids, whole = tokens(2, 60), teacher(attn_implementation="eager")
    model = student(attention={"kept_keys": PLACES, "score_received": received}, window=WINDOW)
    labeller = student(attention={"kept_keys": PLACES, "score_received": received}, window=WINDOW)
    handles = choose_by_labels(model, labeller, Stage0Config())
    with torch.no_grad():
        chosen = model(ids, use_cache=True)
        plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(chosen.logits, plain)
    for layer, wanted in zip(chosen.past_key_values.lizard_layers(), needed(whole, ids), strict=True):
        gone = wanted[:, ANCHORS : 60 - WINDOW]  # no anchors; what is in the window has not been judged
        best = gone.topk(PLACES, dim=1).indices.sort(1).values + ANCHORS
        assert torch.equal(layer.state.attention.kept_positions.sort(1).values, best)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert not torch.allclose(model(ids, use_cache=False).logits, plain)


def test_a_layer_that_reads_in_blocks_gets_its_labels_in_turn():
    """Past the teacher's context anchors move, block by block."""
    ids = tokens(1, 150)
    options = dict(attention={"kept_keys": PLACES}, window=WINDOW, max_position_embeddings=64)
    model, labeller = student(**options), student(**options)
    asked = []
    model.lizard_attentions()[1].lizard.key_score.register_forward_hook(
        lambda score, args, output: asked.append(output[0].clone())
    )
    choose_by_labels(model, labeller, Stage0Config())
    told = []
    model.lizard_attentions()[1].lizard.key_score.register_forward_hook(
        lambda score, args, output: told.append(output[0].clone())
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    several = torch.cat(told, 1)
    assert len(told) > 1 and several.shape == (1, 150, 2) and not torch.equal(several, torch.cat(asked, 1))
    wanted = needed(teacher(attn_implementation="eager", max_position_embeddings=64), ids)[1].log() / 2
    counted = slice(0, 150 - WINDOW)
    torch.testing.assert_close(several[:, 2:][:, counted], wanted[:, counted], atol=2e-3, rtol=1e-3)


def test_a_text_that_the_window_holds_and_what_an_oracle_cannot_read():
    model = student(attention={"kept_keys": PLACES}, window=WINDOW)
    before = model(tokens(1, WINDOW + ANCHORS)).logits
    choose_by_labels(model, student(attention={"kept_keys": PLACES}, window=WINDOW), Stage0Config())
    assert torch.equal(model(tokens(1, WINDOW + ANCHORS)).logits, before)
    cache = model(tokens(1, 30), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: got 30 tokens, wanted the whole text at once"):
        model(tokens(1, 1), past_key_values=cache)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask: got padding"):
        model(tokens(1, 30), attention_mask=mask)
    other = linearize(teacher(), LizardConfig.preset("recommended", softmax_layers=[0]))
    disturb(other)
    with pytest.raises(ValueError, match=r"labeller: converts layers \[1, 2\], wanted \[0, 1, 2\]"):
        choose_by_labels(model, other, Stage0Config())


def test_a_row_trains_and_is_measured_by_it(tmp_path):
    save_teacher(tmp_path / "teacher")
    save_texts(tmp_path / "texts", characters=1500)
    budget = Budget(name="tiny", stage1_steps=2, stage2_steps=2, batch_size=2, sequence_length=48, stage0_steps=2)
    plan = Bench(
        teacher=str(tmp_path / "teacher"), data=[str(tmp_path / "texts")], eval_data=[str(tmp_path / "texts")],
        budget=budget, out=tmp_path / "results", work=tmp_path / "work", measures=["loss", "kl"], eval_length=200,
        eval_documents=2, found_lengths=[500], passkey_trials=2,
    )  # fmt: skip
    changes = {"attention": {"window": 16, "kept_keys": 4}}
    spec = RowSpec(name="oracle", changes=changes, oracle=True)
    record = run_row(spec, plan, lambda message: None)
    assert list(record["stages"]) == ["stage1", "stage2"] and "stage0" not in record["hashes"]
    (plan.folder(spec) / "record.json").unlink()  # measured again, of the saved model
    again = run_row(spec, dataclasses.replace(plan, measures=["loss", "found"]), lambda message: None)
    assert again["measures"]["loss"]["means"] == pytest.approx(record["measures"]["loss"]["means"], rel=1e-5)
    assert again["measures"]["found"].keys() == {"filler", "novel"}
    saved = load_model(str(plan.folder(spec) / "model")).model
    documents = load_documents(plan.eval_data, byte_tokenizer(), 201, count=2, vocab_size=len(byte_tokenizer()))
    alone = loss_by_position(saved, documents.tokens).means
    assert alone != pytest.approx(record["measures"]["loss"]["means"], rel=1e-3)
    with pytest.raises(ValueError, match="none.s0: an oracle chooses kept keys, and there are none"):
        run_row(RowSpec(name="none", oracle=True), plan, lambda message: None)


def test_its_rows_stand_beside_learned_scores_and_are_planned():
    row = ROWS["recommended-kept-256-oracle"]
    spec = row.spec(None, 30)
    assert row.reference == "recommended-kept-256" and spec.oracle and not ROWS[row.reference].oracle
    config = spec.config(Budget(name="b", stage1_steps=1, stage2_steps=1, batch_size=1, sequence_length=8), 30)
    known = [
        measure for measure in ("loss", "kl", "length", "passkey", "found", "tasks") if applies(measure, spec, config)
    ]
    assert known == ["loss", "kl", "found"]
    runner = Runner.__new__(Runner)
    runner.bench = type("Plan", (), {"budget": Budget(name="b", stage1_steps=400, stage2_steps=150, batch_size=4,
                                                      sequence_length=1024, stage0_steps=240)})  # fmt: skip
    assert runner._labelled(dataclasses.replace(spec, oracle=False)) == 240
    assert runner._labelled(spec) == 550 / 8  # half the tokens a step, a quarter of the length
