"""Kept keys in models from scratch: their bytes are the hybrid's, and their scores learn from the model itself."""

import dataclasses
import math

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.quality import mqar_scores
from benchmarks.quality.__main__ import app
from benchmarks.quality.mqar import (
    IGNORED,
    KEPT,
    KeptKeys,
    Recall,
    RecallModel,
    build_mixer,
    memory_line,
    recall_batch,
    run_recall,
    train_recall,
)
from benchmarks.quality.mqar_scores import ScoreLessons, layer_labels, mixer_inputs, values_kept
from benchmarks.quality.records import merge_records, read_record
from benchmarks.quality.report import write_docs
from lizard_layers import HybridAttention, state_bytes
from lizard_ops import apply_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Recall(length=40, pairs=(4, 8), vocabulary=48, width=16, heads=2, window=16, steps=4, batch_size=8)


def small_model(kind: str = "kept", recall: Recall = SMALL, sharper: float = 1.0) -> RecallModel:
    """sharper: factor of queries and keys, so that attention is not the same for all keys."""
    torch.manual_seed(0)
    model = RecallModel(recall, kind)
    with torch.no_grad():
        for block in model.blocks:
            for projection in block.projections[:2]:
                projection.weight.mul_(sharper)
    return model


def rows(pairs: int = 8, seed: int = 0, count: int = 8) -> torch.Tensor:
    return recall_batch(SMALL, pairs, count, torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize("kind", KEPT)
def test_places_take_what_window_and_features_leave(kind):
    """The shape of the docs, counted by hand: two heads of dim 64, window 8, 4 anchors, 64 features of 32 columns."""
    left = KEPT[kind][0] == "left"
    key = 4 * (2 * 64 + 32 + 1)  # key, value, features, gate
    place = 4 * (2 * 64 + 1) + 8 + (0 if left else 4 * (32 + 1))  # key, value, score, position
    sums = 4 * 64 * (64 + 1) + 4
    score = 4 * 3 * 32 + 2 * (4 * 2 + 8 * 64) + 8
    rest = 2 * (8 * key + 4 * 4 * 2 * 64 + sums + (8 - 2) * 4) + score + 8
    allowed = build_mixer("lizard", Recall())[1]
    places = (allowed - rest) // (2 * place)
    assert build_mixer(kind, Recall())[1] == rest + 2 * places * place
    assert f"window 8, 64 features, {places} kept keys a head" in memory_line(kind, Recall())
    layer, bytes_a_row = build_mixer(kind, SMALL)
    given = mixer_inputs(small_model(kind), rows())[0]
    assert state_bytes(layer.lizard(*given, use_state=True)[1]) == 8 * bytes_a_row


@pytest.mark.parametrize("kind", ["kept", "kept-outside"])
def test_one_pass_pieces_tokens_and_the_naive_form_agree(kind):
    model = small_model(kind, sharper=3.0)
    layer, (x, q, k, v, rope) = model.blocks[0].mixer.lizard, mixer_inputs(model, rows(count=2))[0]
    torch.nn.init.normal_(layer.key_score.outer_weight)
    naive = HybridAttention(dataclasses.replace(layer.config, impl="naive"))
    naive.load_state_dict(layer.state_dict())
    with torch.no_grad():
        wanted = naive(x, q, k, v, rope)[0]
        torch.testing.assert_close(layer(x, q, k, v, rope)[0], wanted, rtol=1e-4, atol=1e-5)
        for size in (7, 1):
            state, found = None, []
            for parts in zip(*(t.split(size, 1) for t in (x, q, k, v, *rope)), strict=True):
                o, state = layer(*parts[:4], parts[4:], state, use_state=True)
                found.append(o)
            torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-5)


def test_kernels_train_it_as_pytorch_does():
    pytest.importorskip("triton")
    model = small_model(recall=dataclasses.replace(SMALL, width=32, kept=KeptKeys(window=4)), sharper=3.0).to(DEVICE)
    layer, (x, q, k, v, rope) = model.blocks[0].mixer.lizard, mixer_inputs(model, rows(count=1).to(DEVICE))[0]
    found = []
    for impl in ("torch", "triton"):
        same = HybridAttention(dataclasses.replace(layer.config, impl=impl)).to(DEVICE)
        same.load_state_dict(layer.state_dict())
        heads = [t.clone().requires_grad_() for t in (q, k, v)]
        o = same(x, *heads, rope)[0]
        learned = [p for p in same.parameters() if p.requires_grad]
        found.append((o, *torch.autograd.grad(o.sin().sum(), heads + learned)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_labels_are_the_largest_later_attention_of_the_models_own_softmax():
    model = small_model(sharper=4.0)
    block, given = model.blocks[1], mixer_inputs(model, rows())[1]
    q, k = (apply_rotary(t, *given[4]).double().transpose(1, 2) for t in given[1:3])
    a = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf).softmax(-1)
    window, anchors = block.mixer.lizard.config.window, block.mixer.lizard.config.anchors
    wanted = [a[:, :, j + window :, j].amax(2).log() for j in range(anchors, 40 - window)]
    found = layer_labels(block, given, "attention")
    torch.testing.assert_close(found.double(), torch.stack(wanted, 1), rtol=1e-4, atol=1e-4)


def test_each_key_learns_its_own_label(monkeypatch):
    """Labels that the linear term can say in full, the norms of values: those of a neighbour it could not."""

    def norms(attention, window, kind):
        return torch.linalg.vector_norm(attention.v, dim=-1).log()

    monkeypatch.setattr(mqar_scores, "key_labels", norms)
    lessons = ScoreLessons(small_model(), KeptKeys(rows=8, learning_rate=0.1))
    for score in lessons.scores:
        score.outer_weight.requires_grad_(False)  # zero: the inner layer, which reads the neighbours, says nothing
    losses = [lessons.give(rows()) for _ in range(150)]
    assert losses[0] > 0.5 and losses[-1] < 0.1  # 0.67 one place beside the key


def test_scores_learn_what_the_model_attends_to_and_nothing_else_moves():
    model = small_model(sharper=4.0)
    lessons = ScoreLessons(model, KeptKeys(rows=8, learning_rate=1e-2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    unseen = rows(seed=10_000)
    with torch.no_grad():
        first = lessons.loss(unseen).item()
    for seed in range(60):
        lessons.give(rows(4 + 4 * (seed % 2), seed))
    with torch.no_grad():
        assert lessons.loss(unseen).item() < 0.75 * first
    for name, p in model.named_parameters():
        assert ("key_score" in name) != torch.equal(p, before[name]) and p.grad is None

    tokens, targets = recall_batch(SMALL, 4, 4, torch.Generator().manual_seed(0))
    counted = targets != IGNORED
    torch.nn.functional.cross_entropy(model(tokens, counted), targets[counted]).backward()
    assert all((p.grad is None) == ("key_score" in name) for name, p in model.named_parameters())


def test_values_kept_counts_places_and_anchors():
    model = small_model(recall=dataclasses.replace(SMALL, window=8))
    for block in model.blocks:  # every score 0: the earliest keys stay
        torch.nn.init.zeros_(block.mixer.lizard.key_score.linear_weight)
    config = model.blocks[0].mixer.lizard.config
    stay = config.anchors + config.kept_keys
    assert 8 < stay < 16
    assert values_kept(model, rows(8), 8) == len(range(1, stay, 2)) / 8


def test_training_teaches_the_scores_or_leaves_them_as_they_start():
    longer = dataclasses.replace(SMALL, steps=24, kept=KeptKeys(every=2, learning_rate=2e-2))
    learnt = train_recall("kept", longer, "cpu")
    assert learnt["score_losses"][-1][1] < learnt["score_losses"][0][1]
    assert set(learnt["values_kept"]) == {"4", "8"} and learnt["losses"][-1][1] < learnt["losses"][0][1]
    fixed = train_recall("kept-fixed", SMALL, "cpu")
    assert fixed["score_losses"] == [] and 0 <= fixed["values_kept"]["8"] <= 1
    whole, halves = (train_recall("kept", dataclasses.replace(SMALL, precision=p), "cpu") for p in ("fp32", "bf16"))
    assert halves["losses"][-1][1] == pytest.approx(whole["losses"][-1][1], rel=0.05)


def test_rows_of_other_mixers_do_not_depend_on_kept_keys(tmp_path):
    out, said = tmp_path / "mqar.jsonl", []
    tiny = dataclasses.replace(SMALL, steps=1)
    for kind in ("window", "kept"):
        run_recall(out, [(kind, tiny)], [1e-3], device="cpu", say=said.append)
    assert "kept" not in read_record(out, "window.s0")["settings"]
    assert read_record(out, "kept.s0")["settings"]["kept"] == dataclasses.asdict(tiny.kept)
    merge_records(out, {"window.s0": read_record(out, "window.s0") | {"accuracy": "of earlier"}})
    other = dataclasses.replace(tiny, kept=KeptKeys(window=4))
    run_recall(out, [("window", other), ("kept", other)], [1e-3], device="cpu", say=said.append)
    assert read_record(out, "window.s0")["accuracy"] == "of earlier"
    assert read_record(out, "kept.s0")["settings"]["kept"]["window"] == 4 and len(said) == 3


def test_the_command_says_what_each_memory_takes(tmp_path):
    task = "--length 40 --pairs 4 --vocabulary 48 --width 16 --window 16 --steps 1 --batch-size 2 --learning-rates 1e-3"
    shown = CliRunner().invoke(app, ["mqar", *task.split(), "--mixers", "lizard,kept", "--kept-window", "4",
                                     "--out", str(tmp_path), "--device", "cpu"]).output  # fmt: skip
    recall = dataclasses.replace(SMALL, pairs=(4,), kept=KeptKeys(window=4))
    for kind in ("lizard", "kept"):
        assert memory_line(kind, recall) in shown and f"{kind}.s0" in shown


def test_the_page_says_what_kept_keys_bring(folder, tmp_path):
    hybrid = read_record(folder / "mqar.jsonl", "lizard.s0")
    for seed, share in ((0, 0.75), (1, 0.25)):
        settings = hybrid["settings"] | {"mixer": "kept", "seed": seed}
        record = hybrid | {"settings": settings, "accuracy": {"4": share}, "values_kept": {"4": share / 2}}
        merge_records(folder / "mqar.jsonl", {f"kept.s{seed}": record})
    write_docs(tmp_path / "TABLES.md", tmp_path / "figures", folder)
    page = (tmp_path / "TABLES.md").read_text()
    assert "| kept | 4,096 | 50.0% (25 to 75) | 2 |" in page
    beside = "the hybrid with kept keys 50.0%, not above the hybrid without (50.0%); above it in 1 of 1 seeds."
    assert beside in page and "hybrid 50.0%, above its linear branch alone (25.0%); above it in 1 of 1 seeds." in page
    assert "`kept`: values that are a kept key of any head at the row's end: 4 pairs 25%." in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 2}, "window of a memory with kept keys must be at least 3 or None, got 2"),
        ({"columns": 0}, "columns must be at least 1 or None, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"label": "norm"}, "label must be 'attention' or 'output', got 'norm'"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        KeptKeys(**changes)


def test_memories_too_small_for_a_place_are_refused():
    with pytest.raises(ValueError, match="kept: one kept key takes .* bytes a layer, wanted at most the hybrid's"):
        build_mixer("kept", dataclasses.replace(SMALL, kept=KeptKeys(window=16, columns=64)))
