"""Stage 0: scores learn what the teacher needs late, the model stays, a run that stops goes on as if it had not."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, student, tokens
from torch import nn
from training import Sequences, arguments, fresh, moved, snapshot

from lizard_layers import KeyScore
from lizard_models.distill import TrainingInterrupted, stage0
from lizard_models.distill.key_labels import key_labels
from lizard_models.distill.stage0 import (
    ScoreTransfer,
    first_rows,
    key_scores,
    labels_of,
    read_teacher,
    score_fit,
    start_linear,
    train_stage0,
)
from lizard_models.recipes import Stage0Config
from lizard_models.text.sequences import StreamedTokens

RECIPE = Stage0Config(epochs=None, max_steps=20, batch_size=4, sequence_length=48, learning_rate=3e-3, label_queries=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    model = fresh()
    scores, before = key_scores(model, 16), snapshot(model)
    recipe = dataclasses.replace(RECIPE, max_steps=40, batch_size=8, learning_rate=1e-2)
    result = train_stage0(model, scores, Sequences(32), arguments(tmp_path_factory.mktemp("run")), recipe)
    return model, scores, before, result


def test_the_error_falls_and_the_model_stays(trained):
    """Random tokens of a random teacher: there is little to learn but the rows themselves."""
    model, scores, before, result = trained
    assert moved(before, model) == set()
    assert model.mode == "student" and not model.training
    assert not any(p.requires_grad for p in (*model.parameters(), *scores.parameters()))
    assert result.steps == 40 and result.parameters == sum(p.numel() for p in scores.parameters())
    losses = [loss for _, loss in result.losses]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    linear = key_scores(model, 16)
    transfer = ScoreTransfer(model, linear, labels_of(RECIPE))
    model.set_attention_mode("teacher")
    transfer.start(first_rows(Sequences(32), 4))
    model.set_attention_mode("student")
    transfer.scale_back()
    at_first = score_fit(model, linear, first_rows(Sequences(32), 4), RECIPE)
    for layer, started in zip(result.r2, at_first, strict=True):
        assert len(layer) == 2
        assert all(0 <= first < r2 - 0.15 and 0.3 < r2 < 1 for first, r2 in zip(started.tolist(), layer, strict=True))


def test_r2_is_that_of_the_labels_themselves(trained):
    """Scores are in the labels' own units: squared errors and deviations by hand, all rows at once."""
    model, scores, _, result = trained
    labels, found = [None] * 3, [None] * 3

    def look(number, attention, keys):
        config = attention.lizard.config
        last = 48 - config.window - 8  # the last key with eight later queries
        labels[number] = key_labels(keys.attention, config.window)[:, config.anchors : last + 1]
        found[number] = scores[number](keys.x, keys.k, keys.v)[0][:, config.anchors + 2 : last + 3]

    model.set_attention_mode("teacher")
    read_teacher(model, Sequences(32).rows[:4], labels_of(RECIPE), look)
    model.set_attention_mode("student")
    for number, layer in enumerate(result.r2):
        errors = (found[number] - labels[number]).square().sum((0, 1))
        spread = (labels[number] - labels[number].mean((0, 1))).square().sum((0, 1))
        torch.testing.assert_close(1 - errors / spread, torch.tensor(layer), atol=1e-4, rtol=1e-4)


def test_what_the_input_says_is_learned(tmp_path, monkeypatch):
    """Labels that are a bent function of the inputs from j - 1 to j + 2, on rows that were not trained on."""
    model = fresh(num_hidden_layers=1)

    def labels(self, attention, keys):
        draw = torch.Generator().manual_seed(5)
        ways = torch.randn(4, keys.x.shape[-1], generator=draw) / 8
        parts = [F.pad(keys.x, (0, 0, 1, 0))[:, :-1], keys.x, keys.x.roll(-1, 1), keys.x.roll(-2, 1)]
        total = sum(x @ way for x, way in zip(parts, ways, strict=True))
        both = torch.stack([30 * total.tanh() - 7, total.abs()], -1)
        config = attention.lizard.config
        return both[:, config.anchors : both.shape[1] - config.window - 7]

    monkeypatch.setattr(stage0.Labels, "made", labels)
    scores = key_scores(model, 32)
    recipe = dataclasses.replace(RECIPE, max_steps=120, batch_size=8, learning_rate=1e-2)
    result = train_stage0(model, scores, Sequences(64), arguments(tmp_path), recipe, held_out=tokens(8, 48, seed=9))
    assert min(result.r2[0]) > 0.7


def test_what_a_key_receives_is_learned(tmp_path, monkeypatch):
    """Labels that are a bent function of it, on rows that were not trained on, beside scores that do not read it."""

    def labels(self, attention, keys):
        config, a = attention.lizard.config, keys.attention
        length, group = a.q.shape[1], config.num_heads // config.num_key_heads
        logits = torch.einsum("bihd,bjhd->bhij", a.q, a.k.repeat_interleave(group, 2)) * a.scale
        queries, behind = torch.arange(length)[:, None], torch.arange(length)[:, None] - torch.arange(length)
        seen = (behind >= 0) & ((behind < config.window) | (torch.arange(length) < config.anchors))
        weights = torch.where(seen, logits, -torch.inf).softmax(-1)
        counted = (behind >= 2) & (behind < config.window) & (queries % 2 == 1)
        total = (weights * counted).sum(2).unflatten(1, (-1, group)).sum(2).transpose(1, 2)  # [B, j, Hk]
        return 2 * (total[:, config.anchors : length - config.window - 7].clamp(min=1e-4).log() + 2).abs() + 5

    monkeypatch.setattr(stage0.Labels, "made", labels)
    recipe, r2 = dataclasses.replace(RECIPE, max_steps=120, batch_size=8, learning_rate=1e-2), {}
    for received in (False, True):
        model = fresh(num_hidden_layers=1, attention=dict(score_received=received, score_stride=2))
        run = arguments(tmp_path / str(received))
        r2[received] = train_stage0(model, key_scores(model, 8), Sequences(64), run, recipe, tokens(8, 48, seed=9)).r2
    assert min(r2[True][0]) > 0.8 and max(r2[False][0]) < 0.5


def test_scores_are_those_of_the_trained_term_in_use(tmp_path):
    """Scores that stage 0 fits are the ones a layer has of the same text: they choose the same keys, step by step."""
    choices = dict(score_received=True, score_stride=2, kept_keys=4, score_dim=8)
    model = fresh(num_hidden_layers=1, attention=choices)
    scores, row = key_scores(model, 8), tokens(1, 48, seed=9)
    recipe = dataclasses.replace(RECIPE, max_steps=10, weight_decay=0.5)
    train_stage0(model, scores, Sequences(16), arguments(tmp_path), recipe)
    other = key_scores(model, 8)
    transfer = ScoreTransfer(model, other, labels_of(RECIPE))
    model.set_attention_mode("teacher")
    transfer.start(first_rows(Sequences(16), 4))
    measured = other[0].received
    assert torch.equal(scores[0].received.mean, measured.mean) and measured.mean.all()
    assert torch.equal(scores[0].received.deviation, measured.deviation) and (measured.deviation != 1).all()
    (attention,), given = model.lizard_attentions(), {}
    attention.lizard.key_score.load_state_dict(scores[0].state_dict())
    model.set_attention_mode("teacher")
    read_teacher(model, row, labels_of(RECIPE), lambda number, attention, keys: given.update({"keys": keys}))
    model.set_attention_mode("student")
    keys, config = given["keys"], attention.lizard.config
    known = scores[0](keys.x, keys.k, keys.v, seen=keys.seen(scores[0]))[0][0, config.window - 1 :]  # of keys 0 to 40
    gone = known[config.anchors : 48 - config.window]  # keys that have left the window of the last token
    with torch.no_grad():
        cache = model(row[:, :30]).past_key_values
        for t in range(30, 48):
            cache = model(row[:, t : t + 1], past_key_values=cache).past_key_values
    held = cache.layers[0].state.attention
    best, places = gone.topk(4, 0)
    assert torch.equal(held.kept_positions[0].sort(0)[0], (places + config.anchors).sort(0)[0])
    torch.testing.assert_close(held.kept_scores[0].sort(0, descending=True)[0], best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_of_the_teachers_own_attention(family):
    """The tensors that labels are made of give each layer's output, whatever the family does to its heads."""
    model, ids = student(family=family), tokens(2, 30)
    given, outputs = {}, {}
    for number, attention in enumerate(model.lizard_attentions()):
        attention.register_forward_hook(lambda m, args, out, n=number: outputs.update({n: out[0]}))
    model.set_attention_mode("teacher")
    read_teacher(model, ids, labels_of(RECIPE), lambda number, attention, keys: given.update({number: keys}))
    assert given.keys() == outputs.keys() and len(given) == len(model.lizard_attentions())
    for number, keys in given.items():
        a = keys.attention
        group = a.q.shape[2] // a.k.shape[2]
        k, v = (t.repeat_interleave(group, 2) for t in (a.k, a.v))
        scores = torch.einsum("bihd,bjhd->bhij", a.q, k) * a.scale
        if a.softcap is not None:
            scores = a.softcap * (scores / a.softcap).tanh()
        behind = torch.arange(30)[:, None] - torch.arange(30)
        seen = (behind >= 0) & (behind < (a.sliding_window or 30))
        heads = torch.einsum("bhij,bjhd->bihd", torch.where(seen, scores, -torch.inf).softmax(-1), v)
        o = F.linear(heads.flatten(2), a.output_weight, a.output_bias)
        torch.testing.assert_close(o, outputs[number], atol=1e-4, rtol=1e-4)
    assert not any(attention._forward_pre_hooks for attention in model.lizard_attentions())


def test_a_run_that_stops_goes_on_as_if_it_had_not(tmp_path):
    recipe = dataclasses.replace(RECIPE, max_steps=6, batch_size=2)
    model = fresh()
    whole = key_scores(model, 8)
    first = train_stage0(model, whole, Sequences(), arguments(tmp_path / "whole", save_steps=2), recipe)
    stopped = key_scores(model, 8)
    with pytest.raises(TrainingInterrupted):
        train_stage0(model, stopped, Sequences(stop_at=4 + 7), arguments(tmp_path / "stopped", save_steps=2), recipe)
    assert model.mode == "student" and not any(p.requires_grad for p in stopped.parameters())
    resumed = key_scores(model, 8)
    run = arguments(tmp_path / "stopped", save_steps=2, resume=True)
    second = train_stage0(model, resumed, Sequences(), run, recipe)
    again = key_scores(model, 8)
    train_stage0(model, again, Sequences(), run, recipe)  # a finished run is only loaded
    for scores in (resumed, again):
        for a, b in zip(whole.parameters(), scores.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert first.r2 == second.r2


def test_a_bfloat16_teacher_and_a_stream(tmp_path):
    model = fresh().to(torch.bfloat16)
    scores = key_scores(model, 8)
    rows = tokens(8, 48).flatten().numpy()
    stream = StreamedTokens(lambda epoch: iter([rows]), 48, digest="rows")
    recipe = dataclasses.replace(RECIPE, max_steps=3, batch_size=2, label="attention", label_block=7)
    result = train_stage0(model, scores, stream, arguments(tmp_path), recipe)
    assert all(p.dtype == torch.float32 for p in scores.parameters())
    assert [step for step, _ in result.losses] == [1, 2, 3] and len(result.r2) == 3


def test_the_linear_start_is_the_best_linear_term():
    draw = torch.Generator().manual_seed(0)
    facts = torch.randn(400, 2, 3, generator=draw) * torch.tensor([0.1, 2.0, 0.5]) + 3
    labels = torch.randn(400, 2, generator=draw) + facts.sum(-1)
    score = KeyScore(4, 2, 3, 5)
    start_linear(score, facts, labels)
    for head in range(2):
        wide = torch.cat([facts[:, head], torch.ones(400, 1)], 1).double()
        best = torch.linalg.lstsq(wide, labels[:, head, None].double()).solution
        mine = torch.cat([score.linear_weight[head], score.bias[head, None]]).double()
        error, least = ((wide @ s - labels[:, head].double()).square().mean() for s in (mine, best[:, 0]))
        assert error < least * 1.001
    assert not score.outer_weight.any()


def test_scores_are_as_wide_as_a_score_by_itself():
    assert {score.score_dim for score in key_scores(fresh())} == {KeyScore(64, 2, 16).score_dim} == {128}


def test_what_is_refused(tmp_path):
    model = fresh()
    with pytest.raises(ValueError, match="scores: got 2, wanted one for each of the 3 converted layers"):
        score_fit(model, nn.ModuleList(list(key_scores(model))[:2]), tokens(1, 48))
    with pytest.raises(ValueError, match=r"scores: of layer 0 got sizes \(64, 2, 8\), wanted \(64, 2, 16\)"):
        score_fit(model, nn.ModuleList(KeyScore(64, 2, 8) for _ in range(3)), tokens(1, 48))
    received = fresh(attention=dict(score_received=True))
    with pytest.raises(ValueError, match=r"scores: of layer 0 read None, wanted WindowForm\(window=\d+, .*stride=8"):
        score_fit(received, key_scores(model), tokens(1, 48))
    with pytest.raises(ValueError, match="rows of 19 tokens, wanted at least 20, .* label_queries=8"):
        score_fit(model, key_scores(model), tokens(1, 19), RECIPE)
    assert model.mode == "student"
    narrow = fresh(window=2)
    with pytest.raises(ValueError, match="window=2 of layer 0: .* at least 3"):
        train_stage0(narrow, key_scores(narrow), Sequences(), arguments(tmp_path), RECIPE)
    transfer = ScoreTransfer(model, key_scores(model), labels_of(RECIPE))
    with pytest.raises(ValueError, match="attention_mask: got a mask"):
        transfer(tokens(1, 48), torch.ones(1, 48))
    for name in ("label_block", "label_queries"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Stage0Config(**{name: 0})
    assert stage0.SAMPLE == len(first_rows(Sequences(), stage0.SAMPLE)) and len(first_rows(Sequences(2), 4)) == 2


def test_layers_without_places_have_no_score_to_fit(tmp_path):
    """The scores of the others start from their own layers' labels."""
    some, every = (fresh(attention=dict(kept_keys=kept, score_dim=8)) for kept in ([[3, 0], [0, 0], [1, 2]], 3))
    for model in (some, every):
        model.set_attention_mode("teacher")
        ScoreTransfer(model, model.key_scores(), labels_of(RECIPE)).start(tokens(2, 48))
    first, _, third = every.key_scores()
    for found, wanted in zip(some.key_scores(), (first, third), strict=True):
        assert torch.equal(found.linear_weight, wanted.linear_weight) and torch.equal(found.bias, wanted.bias)
    some.set_attention_mode("student")
    recipe = dataclasses.replace(RECIPE, max_steps=2)
    assert len(train_stage0(some, some.key_scores(), Sequences(), arguments(tmp_path), recipe).r2) == 2
