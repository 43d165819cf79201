"""What heads lose with so many places, query by query and key by key."""

import pytest
import torch
from tiny import student, tokens

from lizard_models.distill.stage0 import labels_of, read_teacher
from lizard_models.evaluation.place_errors import place_errors
from lizard_models.model.layer_configs import lizard_config
from lizard_models.recipes import Stage0Config

WINDOW, ANCHORS, LENGTH, LEVELS = 8, 4, 40, (0, 3, 16, 40, 64)


def kept(**attention):
    return student(attention={"kept_keys": 4, "score_dim": 12} | attention)


def by_hand(model, row, places):
    """[L, Hk]: softmax over the keys that are left, one query after the other."""
    found, layers = {}, model.lizard_attentions()
    model.set_attention_mode("teacher")
    labels = labels_of(Stage0Config(label_queries=8))
    read_teacher(model, row, labels, lambda number, attention, keys: found.update({number: keys}))
    model.set_attention_mode("student")
    errors = torch.zeros(len(layers), 2, dtype=torch.float64)
    for number, attention in enumerate(layers):
        keys, score = found[number], attention.lizard.key_score
        scores = score(keys.x, keys.k, keys.v, seen=keys.seen(score))[0][0, score.delay :]  # of key j at j
        q, k, v = (t[0].double() for t in keys.attention[:3])
        weight = attention.o_proj.weight.double().unflatten(1, (4, -1))  # [hidden, Hq, D]
        whole = 0.0
        for i in range(LENGTH):
            o = torch.zeros(64, dtype=torch.float64)
            for hk in range(2):
                lost = torch.zeros_like(o)
                gone = range(ANCHORS, i - WINDOW + 1)
                best = sorted(gone, key=lambda j, hk=hk: (-scores[j, hk].item(), j))[:places]
                near = [j for j in range(i + 1) if j > i - WINDOW or j < ANCHORS]
                for h in (2 * hk, 2 * hk + 1):
                    logits = k[: i + 1, hk] @ q[i, h] * attention.scaling
                    exact = logits.softmax(0) @ v[: i + 1, hk]
                    seen = near + best
                    lost += weight[:, h] @ (logits[seen].softmax(0) @ v[seen, hk] - exact)
                    o += weight[:, h] @ exact
                errors[number, hk] += lost.square().sum()
            whole += o.square().sum()
        errors[number] /= whole
    return errors


@torch.no_grad()
@pytest.mark.parametrize("choices", [{}, {"score_received": True, "score_stride": 2}], ids=["input", "received"])
def test_errors_are_those_of_softmax_over_what_is_left(choices):
    model, rows = kept(**choices), tokens(1, LENGTH)
    found = place_errors(model, rows, LEVELS, block=7)
    wanted = torch.stack([by_hand(model, rows, places) for places in LEVELS], -1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)
    assert (found[..., 0] > 0.01).all() and (found[..., -1] < 1e-9).all()
    assert model.mode == "student"


@torch.no_grad()
def test_rows_add_up():
    """Errors and outputs, not their ratios; and blocks of queries of any size."""
    model, rows, calls = kept(), tokens(3, LENGTH), []
    whole = place_errors(model, rows, LEVELS, advance=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    torch.testing.assert_close(whole, place_errors(model, rows, LEVELS, block=9))
    alone = torch.stack([place_errors(model, row, LEVELS) for row in rows.split(1)])
    assert ((alone.amin(0) <= whole + 1e-12) & (whole <= alone.amax(0) + 1e-12)).all()
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="model: has no layer that keeps keys"):
        place_errors(student(), tokens(1, LENGTH))
    model = kept()
    with pytest.raises(ValueError, match="rows of 12 tokens, wanted at least 13"):
        place_errors(model, tokens(1, 12))
    assert model.mode == "student" and lizard_config(model.config).attention.kept_keys == 4
