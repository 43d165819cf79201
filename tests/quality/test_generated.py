"""Measures by generation: questions can be solved from their own text, lengths hold, lines are the source's."""

import hashlib
import json
import re
from collections import Counter

import pytest
import torch
from readable import byte_tokenizer, save_teacher, save_texts
from tiny import teacher

from benchmarks.quality import ruler
from benchmarks.quality.bench import Bench
from benchmarks.quality.generated import Question, continuations
from benchmarks.quality.next_lines import next_line_questions, next_line_scores, read_projects
from benchmarks.quality.rows import Budget, RowSpec
from benchmarks.quality.ruler import CHAIN, KINDS, ROOM, questions, ruler_scores, score
from benchmarks.quality.worker import run_row
from lizard_models.teachers.find import load_teacher

TOKENIZER, BEGINS = byte_tokenizer(), byte_tokenizer(around="<s> $A")
LENGTH = 9000  # bytes: the list of common names alone takes most of it


class Solver:
    """A model that reads a prompt's text, solves it its own way, and answers with a share of the solution."""

    def __init__(self, solve, share=1.0):
        self.solve, self.share = solve, share

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, prompts, attention_mask, max_new_tokens, pad_token_id, **kwargs):
        rows = []
        for ids, mask in zip(prompts, attention_mask, strict=True):
            found = self.solve(TOKENIZER.decode(ids[mask.bool()].tolist()))
            answer = " " + ", ".join(found[: round(len(found) * self.share)])
            rows.append(TOKENIZER(answer)["input_ids"][:max_new_tokens])
        width = max(map(len, rows))
        padded = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([prompts, padded], 1)


def solve(text: str) -> list[str]:
    if text.endswith("they are") and "come most often" in text:
        listed = re.findall(r"^\d+\. (.+)$", text.rpartition("numbered list")[2], re.MULTILINE)
        counted = Counter(listed).most_common(11)
        assert counted[9][1] > counted[10][1]  # there is one right answer
        return [name for name, _ in counted[:10]]
    if text.endswith("they are"):
        value = re.search(r"have the value (\d+), at once or through others\? Answer: they are$", text).group(1)
        known = {value}
        for name, source in re.findall(r"Set (\w+) = (\w+)\.", text.partition("Answer: they are ")[2]):
            known |= {name} if source in known else set()
        return sorted(known - {value})
    asked = re.search(r"The number of ([a-z ]+) is$", text).group(1)
    return re.findall(rf"The number of {asked} is (\d+)\.", text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_has_its_answer_in_its_text(kind):
    asked = questions(TOKENIZER, kind, LENGTH, 4)
    assert asked == questions(TOKENIZER, kind, LENGTH, 4) != questions(TOKENIZER, kind, LENGTH, 4, seed=1)
    unit = {"single": 0, "multi": 60, "tracking": 0, "words": 3 * 30}[kind]
    for question in asked:
        assert LENGTH - unit <= len(question.prompt) + question.room <= LENGTH and question.room == ROOM[kind]
    texts = [TOKENIZER.decode(question.prompt) for question in asked]
    assert len({tuple(question.wanted) for question in asked}) == 4
    for text, question in zip(texts, asked, strict=True):
        assert sorted(solve(text)) == sorted(question.wanted)
    if kind in ("single", "multi"):  # at depths spread over the text
        depths = [text.index(q.wanted[0]) / len(text) for text, q in zip(texts, asked, strict=True)]
        assert depths == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.05)
    with pytest.raises(ValueError, match=f"ruler: {kind} takes .* more than 60"):
        questions(TOKENIZER, kind, 60, 1)
    longest = max(len(q.prompt) for q in questions(BEGINS, kind, LENGTH, 4))
    assert 1 + longest + ROOM[kind] <= LENGTH  # the beginning is put before it


def test_scores_are_shares_of_what_is_wanted(monkeypatch):
    monkeypatch.setitem(ROOM, "words", 400)  # a token a byte
    monkeypatch.setitem(ROOM, "tracking", 60)
    whole = ruler_scores(Solver(solve), TOKENIZER, [LENGTH], trials=2, batch_tokens=2 * LENGTH)
    assert whole == {kind: {str(LENGTH): 1.0} for kind in KINDS}
    half = ruler_scores(Solver(solve, 0.5), TOKENIZER, [LENGTH], trials=2)
    assert half["words"][str(LENGTH)] == 0.5 and half["tracking"][str(LENGTH)] == round(CHAIN * 0.5) / CHAIN
    assert half["single"][str(LENGTH)] == 0
    assert score("it is 1234567.", ["1234567"]) == 1 and score("123456", ["1234567"]) == 0
    with pytest.raises(ValueError, match="no kind 'double'; known are single, multi, tracking, words"):
        questions(TOKENIZER, "double", LENGTH, 1)


def test_batches_padded_on_the_left_give_what_single_prompts_give():
    model = teacher("qwen2", vocab_size=len(TOKENIZER), num_hidden_layers=2).eval()
    prompts = ["def mill(", "the wind turns", "x", "river = sea\n" * 3]
    asked = [Question(TOKENIZER(text)["input_ids"], ["a"], 6) for text in prompts]
    together = continuations(model, TOKENIZER, asked, batch_tokens=200)
    assert together == continuations(model, TOKENIZER, asked, batch_tokens=1) and len(set(together)) > 1
    plain = model.generate(torch.tensor([asked[0].prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert together[0] == TOKENIZER.decode(plain[0, len(asked[0].prompt) :], skip_special_tokens=True)


def test_prompts_begin_as_the_tokenizer_begins_a_text():
    """Gemma's tokenizer puts its beginning before a text; others, that have one, do not."""
    read = []

    class Reader(Solver):
        def generate(self, prompts, **kwargs):
            read.extend(prompts.tolist())
            return super().generate(prompts, **kwargs)

    asked = [Question([5, 6], ["a"], 1), Question([7, 8], ["a"], 1)]
    continuations(Reader(lambda text: ["a"]), BEGINS, asked, 100)
    assert sorted(read) == [[1, 5, 6], [1, 7, 8]]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "held_out.jsonl"
    text = "".join(f"def function_{i}(x):\n    return compute_{i}(x)\n\n" for i in range(60))
    records = [{"project": p, "path": f"{p}/m{i}.py", "text": f"# {p}{i}\n{text}"} for p in "ab" for i in range(2)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_lines_follow_their_text_at_every_length(source):
    projects = read_projects(source)
    assert len(projects) == 2 and projects[1].startswith("# b/b/m0.py\n# b0\ndef function_0")
    asked = next_line_questions(TOKENIZER, projects, [64, 512], 12)
    for short, long in zip(asked[64], asked[512], strict=True):
        before = TOKENIZER.decode(long.prompt)
        assert before.endswith(TOKENIZER.decode(short.prompt)) and short.wanted == long.wanted
        assert len(short.prompt) == 64 and len(long.prompt) == 512 and before.endswith("\n")
        assert any(re.search(re.escape(before) + r"\s*" + re.escape(long.wanted[0]) + "\n", text) for text in projects)
        assert len(long.wanted[0]) >= 12 and long.room > len(long.wanted[0])
    assert len({(tuple(q.prompt), q.wanted[0]) for q in asked[512]}) == 12
    begun = next_line_questions(BEGINS, projects, [64, 512], 12)  # a token shorter, for the beginning
    assert [q.prompt for q in begun[64]] == [q.prompt[1:] for q in asked[64]]

    def next_of(text: str) -> list[str]:
        number, returned = re.findall(r"function_(\d+)\(x\):\n(    return)?", text)[-1]
        if text.endswith("(x):\n"):
            return [f"   return compute_{number}(x)\nand more"]
        return [f"def function_{int(number) + 1}(x):\n"]

    exact = next_line_scores(Solver(next_of), TOKENIZER, projects, [128], trials=12)
    assert 0.9 <= exact["128"] <= 1  # the first lines of a file say what nobody can know
    assert next_line_scores(Solver(lambda text: ["pass"]), TOKENIZER, projects, [128], trials=4) == {"128": 0.0}


def test_source_that_is_too_short_or_something_else_is_named(source, tmp_path):
    with pytest.raises(ValueError, match="0 lines follow 50000 tokens of one project, wanted 3"):
        next_line_questions(TOKENIZER, read_projects(source), [50_000], 3)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="x.jsonl' is not a held_out.jsonl of code-data"):
        read_projects(tmp_path / "x.jsonl")


def test_a_row_is_measured_by_generation_and_the_source_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ruler, "OFTEN", 2)
    places = {"teacher": str(save_teacher(tmp_path / "t")), "out": tmp_path / "out", "work": tmp_path / "work"}
    texts = str(save_texts(tmp_path / "texts"))
    tiny = Budget(name="tiny", stage1_steps=1, stage2_steps=1, batch_size=1, sequence_length=48)
    plan = {"data": [texts], "eval_data": [texts], "budget": tiny, "eval_length": 64, "eval_documents": 1, **places}
    with pytest.raises(ValueError, match=r"lines needs held-out source \(--source\)"):
        Bench(**plan, measures=["lines"])
    with pytest.raises(ValueError, match=r"source needs held-out source \(--source\)"):
        Bench(**plan, measures=["source"])
    bench = Bench(**plan, measures=["source", "ruler", "lines"], source=source, ruler_lengths=[2000],
                  line_lengths=[64, 128], line_trials=3, passkey_trials=1, long_length=2000)  # fmt: skip
    spec = RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False)
    record = run_row(spec, Bench.from_json(bench.to_json()), lambda message: None)
    far = record["measures"].pop("source")
    assert [*far["edges"]] == [0, 128, 512, 1024, 2000]
    ids = torch.tensor([TOKENIZER(read_projects(source)[0])["input_ids"][:2001]])
    with torch.no_grad():
        logits = torch.log_softmax(load_teacher(str(tmp_path / "t")).model(ids[:, :-1]).logits[0], -1)
    own = -logits[range(2000), ids[0, 1:]]
    assert far["means"][-1] == pytest.approx(own[1024:].mean().item(), rel=1e-4)  # one document, of the first project
    assert record["measures"] == {
        "ruler": {kind: {"2000": 0.0} for kind in KINDS}, "lines": {"64": 0.0, "128": 0.0},
    }  # fmt: skip
    assert record["hashes"]["source"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert bench.missing(spec, 3) == []
