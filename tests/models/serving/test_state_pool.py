"""Many texts over one pool of pages write what each writes alone; and the benchmark that serves so."""

import cProfile
import json
import pstats

import pytest
import torch
from tiny import student, tokens

from benchmarks.gpu.no_launch import without_kernels
from benchmarks.serving import pool as serving
from lizard_models import StatePool
from lizard_models.model.step_recorder import Uncapturable

KINDS = {
    "wide, kept keys": dict(wide_layers=[0], wide_window=24, attention=dict(kept_keys=4, score_dim=8)),
    "anchors that move": dict(attention=dict(positions="clamped", position_limit=20, position_step=4)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_come_and_go_have_the_logits_of_each_alone(kind):
    """In rows of one length, of which some are nobody's, in pages that other texts have left."""
    model = student(**KINDS[kind]).double()
    texts = tokens(3, 31)
    alone = [model(text[None]).logits[0] for text in texts]
    pool = StatePool(model, 4)
    pool.read(tokens(2, 9, seed=5), torch.tensor([0, 3]), torch.tensor([False, False]))

    def check(found, rows, place):
        for row, logits in zip(rows, found, strict=True):
            if row is not None:
                torch.testing.assert_close(logits, alone[row][place], rtol=1e-9, atol=1e-9)

    pages, far = {0: 3, 1: 1, 2: 0}, 31 if kind == "anchors that move" else None
    for rows, begin, end in (([0, 1], 0, 13), ([1, 0], 13, 14), ([0, None, 1], 14, 25), ([2], 0, 25)):
        ids = torch.stack([texts[row or 0, begin:end] for row in rows])
        given = torch.tensor([-1 if row is None else pages[row] for row in rows])
        has = torch.full((len(rows),), begin > 0)
        check(pool.read(ids, given, has, far), rows, end - 1)
    for place in range(25, 31):
        rows = [2, None, 0, 1] if place % 2 else [1, 0, 2]
        ids = torch.stack([texts[row or 0, place : place + 1] for row in rows])
        given = torch.tensor([-1 if row is None else pages[row] for row in rows], dtype=torch.int32)
        check(pool.read(ids, given, furthest=far), rows, place)


def python_calls(run) -> int:
    profiler = cProfile.Profile()
    profiler.enable()
    run()
    profiler.disable()
    return sum(calls for (file, *_), (_, calls, *_) in pstats.Stats(profiler).stats.items() if file != "~")


@torch.no_grad()
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_asks_the_host_no_more_for_many_texts(kind, kernels):
    """As many calls of Python for 40 as for 3, with PyTorch and on the way of the kernels, which a graph can hold."""
    model, far, counted = student(num_hidden_layers=1, **KINDS[kind]), 31 if kind == "anchors that move" else 1, []
    for texts in (3, 40):
        pool, pages = StatePool(model, texts), torch.arange(texts)
        pool.read(tokens(texts, 9), pages, torch.zeros(texts, dtype=torch.bool), 9)
        ids = tokens(texts, 1)

        def step(pool=pool, ids=ids, pages=pages):
            return pool.read(ids, pages, furthest=far)

        if not kernels:
            step()
            counted.append(python_calls(step))
            continue
        with without_kernels() as launches:
            with Uncapturable() as looking:
                step()
            once = launches.count()
            counted.append((python_calls(step), once, launches.count() - once))
        assert looking.found is None and once > 0
    assert counted[0] == counted[1]


def test_what_has_no_page_is_refused():
    with pytest.raises(ValueError, match=r"model: layers \[1\] are kept softmax"):
        StatePool(student(softmax_layers=[1]), 2)
    with pytest.raises(ValueError, match="pages: got 0"):
        StatePool(student(), 0)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["plain", "recommended"])
def test_the_benchmark_serves_every_text_as_generate_writes_it(preset, tmp_path, capsys):
    given = "--shape tiny --window 8 --together 3 --requests 7 --prompts 3 40 --answers 2 9 --chunk 16 --rate 200"
    records, (texts,), model = serving.main([*given.split(), "--preset", preset, "--out", str(tmp_path / "pool.json")])
    assert json.loads((tmp_path / "pool.json").read_text())["preset"] == preset
    for text in texts:
        prompt = text.prompt[None]
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=text.answer)
        assert text.written == wanted[0, prompt.shape[1] :].tolist()
    (record,) = records
    assert record["at_once"] == 3 and record["requests"] == 7
    state = sum(memory.shape[1] for memory in StatePool(model, 1).memory)
    assert record["page_bytes"] == state and record["texts_a_gib"] == round(2**30 / state, 2)
    assert serving.teacher_bytes(model.config, 17, 2) == 2 * 2 * 2 * 16 * 2 * 32  # layers, k and v, heads, dim, bytes
    assert "requests/s" in capsys.readouterr().out
