"""Requests recorded, scored elsewhere and answered: the same numbers as lm-eval's own model gives."""

import json

import numpy as np
import pytest
from readable import byte_tokenizer
from tiny import student, teacher

from benchmarks.quality.options import recorded_lm
from benchmarks.quality.records import merge_records, read_record
from benchmarks.quality.tasks.requests import Requests, Scores, score

WORDS = "the mill turns and river runs down to sea in wind sun cart comes back year after".split()


def write_sets(folder, count=6):
    draw = np.random.default_rng(0)

    def phrase(low=2, high=8):
        return " ".join(draw.choice(WORDS, draw.integers(low, high)))

    def records(kind, n=count):
        for i in range(n):
            if kind == "piqa":
                yield {"goal": phrase(), "sol1": phrase(), "sol2": phrase(), "label": i % 2}
            elif kind == "hellaswag":
                yield {
                    "ind": i, "activity_label": phrase(1, 3), "ctx_a": phrase() + ".", "ctx_b": "he", "ctx": phrase(),
                    "endings": [phrase() for _ in range(4)], "source_id": "x", "split": "val", "split_type": "in",
                    "label": str(i % 4),
                }  # fmt: skip
            elif kind == "arc_easy":
                choices = {"text": [phrase() for _ in range(4)], "label": list("ABCD")}
                yield {"id": str(i), "question": phrase() + "?", "choices": choices, "answerKey": "ABCD"[i % 4]}
            elif kind == "lambada_openai":
                yield {"text": phrase(6, 12)}
            else:
                subject = "world_history"
                yield {
                    "question": phrase(),
                    "subject": subject,
                    "choices": [phrase(1, 4) for _ in "1234"],
                    "answer": i % 4,
                }

    files = {"piqa": "validation", "hellaswag": "validation", "arc_easy": "test", "lambada_openai": "test"}
    for kind, stem in files.items():
        (folder / kind).mkdir()
        (folder / kind / f"{stem}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(kind)))
    (folder / "mmlu").mkdir()
    for stem, n in (("dev", 5), ("test", count)):
        (folder / "mmlu" / f"{stem}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records("mmlu", n)))


def test_requests_keep_distinct_pairs_and_score_like_a_plain_forward(tmp_path):
    import torch

    pairs = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([5, 6, 7], [8, 9]), ([4], [3, 2, 6, 7]), ([9, 8, 7], [6, 5, 4])]
    requests = Requests.from_pairs(pairs)
    assert len(requests) == 4 and requests.contexts.dtype == np.uint16
    requests.save(tmp_path / "r.xz")
    read = Requests.load(tmp_path / "r.xz")
    assert read.digest == requests.digest
    with pytest.raises(ValueError, match="must have at least one token"):
        Requests.from_pairs([([], [1])])
    (tmp_path / "bad").write_text("nothing")
    with pytest.raises(ValueError, match="is not a file that `requests` wrote"):
        Requests.load(tmp_path / "bad")
    for model in (teacher(), student(window=2)):
        found = score(model, read, batch_tokens=8)
        few = score(model, read, batch_rows=3)
        np.testing.assert_allclose(few.log_likelihoods, found.log_likelihoods, rtol=1e-4)
        found.save(tmp_path / "s.npz")
        found = Scores.load(tmp_path / "s.npz")
        for i in range(len(read)):
            context, wanted = read.context(read.context_of[i]).tolist(), read.continuation(i).tolist()
            with torch.no_grad():
                logits = model(torch.tensor([context + wanted])).logits[0, len(context) - 1 : -1]
            log = torch.log_softmax(logits, -1)[range(len(wanted)), wanted]
            assert found.log_likelihoods[i] == pytest.approx(log.sum().item(), rel=1e-4)
            assert found.greedy[i] == (logits.argmax(-1).tolist() == wanted)


def test_recorded_tasks_give_the_numbers_of_lm_eval(tmp_path):
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'lizard-attn\[eval\]'"):
            recorded_lm()
        return

    from benchmarks.quality.tasks.metrics import add_task_metrics
    from benchmarks.quality.tasks.recorded_lm import (
        AskedTasks,
        RecordedLM,
        answers_of,
        evaluate,
        metrics_of,
        record_requests,
        rotated,
        split_limits,
        write_tasks,
    )

    (tmp_path / "data").mkdir()
    write_sets(tmp_path / "data")
    every = ["piqa", "hellaswag", "arc_easy", "lambada_openai", "mmlu", "mmlu_letters"]
    names = write_tasks(tmp_path / "data", tmp_path / "tasks", every)
    assert names.keys() == set(every) and len(names["mmlu_letters"]) == 4
    names = {name: names[name][:2] for name in ("hellaswag", "lambada_openai", "mmlu_letters")}  # one of each kind
    tokenizer = byte_tokenizer()
    model = student(vocab_size=len(tokenizer), max_position_embeddings=700)
    lm = RecordedLM(tokenizer)
    evaluate(lm, tmp_path / "tasks", names)
    requests = Requests.from_pairs(lm.pairs)
    scores = score(model, requests)
    lm.answer_from(requests, scores)
    ours = evaluate(lm, tmp_path / "tasks", names)
    assert AskedTasks(tokenizer, tmp_path / "tasks", names, {}).metrics(answers_of(requests, scores)) == ours
    theirs = evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=700), tmp_path / "tasks", names
    )
    assert ours.keys() == theirs.keys() == {"hellaswag", "lambada_openai", "mmlu_letters0", "mmlu_letters1"}
    for name, metrics in ours.items():
        letters = metrics.pop("letters", None)
        assert metrics["documents"] == 6 and letters == theirs[name].pop("letters", None)
        assert (letters is None) == (not name.startswith("mmlu_letters")) and sum((letters or {"": 6}).values()) == 6
        assert metrics == pytest.approx(theirs[name], rel=1e-3)
    assert "ties" in ours["hellaswag"] and ours["lambada_openai"]["perplexity"] > 1

    begins = byte_tokenizer(around="<s> $A")
    recorder, own = RecordedLM(begins), HFLM(pretrained=model, tokenizer=begins, max_length=700)
    for text in ("the mill", "<s>the mill", ""):
        for special in (None, False):
            assert recorder.tok_encode(text, special) == own.tok_encode(text, special)
    assert recorder.tok_encode("the mill")[0] == 1 and recorder._encode_pair("a ", "b") == own._encode_pair("a ", "b")

    with pytest.raises(ValueError, match="they answer other requests"):
        lm.answer_from(requests, Scores(np.zeros(1), np.zeros(1, bool), "other"))
    with pytest.raises(ValueError, match="sets: no 'nonsense'"):
        write_tasks(tmp_path / "data", tmp_path / "other", ["nonsense"])
    assert split_limits(["piqa", "mmlu_letters:3"], 7) == {"piqa": 7, "mmlu_letters": 3}
    with pytest.raises(ValueError, match="sets: 'piqa:x', wanted a name"):
        split_limits(["piqa:x"])
    record = {"choices": ["a", "b", "c", "d"], "answer": 3}
    assert rotated(record, 1) == {"choices": ["d", "a", "b", "c"], "answer": 0}

    results, scored = tmp_path / "quick.jsonl", tmp_path / "scores" / "quick"
    scored.mkdir(parents=True)
    merge_records(results, {name: {"measures": {}} for name in ("other.s0", "row.s0")})
    some = ["lambada_openai:6", "mmlu_letters:2"]
    recorded = record_requests(tmp_path / "data", tokenizer, some)
    for name in ("row.s0", "unfinished.s0"):
        score(model, recorded).save(scored / f"{name}.npz")
    said: list[str] = []
    for _ in range(2):  # the second time there is nothing left to do
        add_task_metrics(results, scored, tmp_path / "data", tokenizer, recorded, some, say=said.append)
    saved = read_record(results, "row.s0")["measures"]["tasks"]
    unfinished = [line for line in said if line.startswith("unfinished.s0: has scores, but no finished record")]
    assert saved["metrics"]["lambada_openai"] == pytest.approx(ours["lambada_openai"]) and len(said) == 3
    assert len(unfinished) == 2 and read_record(results, "other.s0") == {"measures": {}}
    letters = saved["metrics"]["mmlu_letters3"]
    assert letters["documents"] == 2 and sum(letters["letters"].values()) == 2 and letters["acc"] in (0, 0.5, 1)
    with pytest.raises(ValueError, match="a request of local_piqa has no answer"):
        next(metrics_of([score(model, recorded)], tmp_path / "data", tokenizer, recorded, ["piqa"]))
