"""Evaluation: each measure against its definition, and the report as table, JSON and plot."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from readable import byte_tokenizer
from rich.console import Console
from tiny import student, teacher, tokens

from lizard_models.evaluation import (
    PositionLoss,
    Report,
    Row,
    bucket_edges,
    loss_by_position,
    passkey_accuracy,
    recovered_share,
)
from lizard_models.evaluation.passkey import passkey_examples, passkey_prompt, shortest_length
from lizard_models.evaluation.plot import save_report
from lizard_models.evaluation.report import past_edge
from lizard_models.evaluation.tasks import run_tasks


def test_buckets_double_from_512():
    assert bucket_edges(100) == (0, 100)
    assert bucket_edges(128) == (0, 128)
    assert bucket_edges(1000) == (0, 128, 512, 1000)
    assert bucket_edges(4096) == (0, 128, 512, 1024, 2048, 4096)
    assert bucket_edges(5000)[-2:] == (4096, 5000)
    assert [past_edge(bucket_edges(n)) for n in (128, 500, 2048, 4096, 65_536)] == [None, 128, 1024, 2048, 2048]


@pytest.mark.parametrize("model", [teacher(), student()], ids=["teacher", "student"])
def test_loss_by_position_is_the_mean_cross_entropy(model):
    ids = tokens(3, 201)
    done = []
    measured = loss_by_position(model, ids, batch_size=2, advance=done.append)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert measured.edges == (0, 128, 200) and done == [2, 1]
    for i, part in enumerate((losses[:, :128], losses[:, 128:])):
        assert measured.means[i] == pytest.approx(part.mean().item(), rel=1e-5)
        assert measured.errors[i] == pytest.approx(part.mean(1).std().item() / math.sqrt(3), rel=1e-4)
    assert measured.perplexities[0] == pytest.approx(math.exp(measured.means[0]))
    assert measured.past(0) == pytest.approx(losses.mean().item(), rel=1e-5)
    assert math.isnan(loss_by_position(model, ids[:1]).errors[0])


def test_the_recovered_share_runs_from_control_to_teacher():
    best, control, student_loss = (PositionLoss((0, 8, 16), (1.0, mean), (0.0, 0.0)) for mean in (2.0, 3.0, 2.25))
    assert recovered_share(best, control, student_loss, 8) == pytest.approx(0.75)
    assert recovered_share(best, control, best, 8) == 1 and recovered_share(best, control, control, 8) == 0


def test_the_shortest_length_holds_every_key_that_may_be_drawn():
    tokenizer = byte_tokenizer()
    one = shortest_length(tokenizer, 1)
    assert all(len(a) + len(b) == one for a, b in passkey_examples(tokenizer, one, 5))
    with pytest.raises(ValueError, match="the question alone takes"):
        passkey_examples(tokenizer, one - 1, 1)
    five = shortest_length(tokenizer, 5)
    assert all(len(a) + len(b) == five for a, b in passkey_examples(tokenizer, five, 40, keys=5)) and five > 2 * one


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_passkey_prompts_have_their_length_and_their_key(depth):
    tokenizer = byte_tokenizer()
    prompt, answer = passkey_prompt(tokenizer, 900, depth, "48213")
    text = tokenizer.decode(prompt)
    assert len(prompt) + len(answer) == 900 and tokenizer.decode(answer) == "48213"
    assert text.count("48213") == 2 and text.endswith("The pass key is ")
    assert abs(text.index("48213") / len(text) - depth) < 0.25
    with pytest.raises(ValueError, match=r"passkey length 50 is too short, the question alone takes \d+ tokens"):
        passkey_prompt(tokenizer, 50, depth, "48213")


def test_answers_are_keys_without_the_space_before_them():
    """What stands there instead, "the" or "a", says nothing about the key."""
    tokenizer = byte_tokenizer()
    for keys in (1, 5):
        for prompt, answer in passkey_examples(tokenizer, 1100, 5, keys=keys):
            assert tokenizer.decode(answer).isdigit() and tokenizer.decode(prompt).endswith(" is ")


def test_passkey_accuracy_counts_exact_answers():
    tokenizer = byte_tokenizer()

    class EveryOther(torch.nn.Linear):
        """Repeats every second key and gets one digit of the others wrong."""

        asked = 0

        def generate(self, prompts, max_new_tokens, **kwargs):
            rows = []
            for prompt in prompts:
                text = tokenizer.decode(prompt)
                key = text[text.index("pass key is ") + 12 :][:5]
                wrong = str((int(key[-1]) + self.asked % 2) % 10)
                EveryOther.asked += 1
                rows.append(tokenizer(f"{key[:-1]}{wrong}", return_tensors="pt")["input_ids"][0])
            return torch.cat([prompts, torch.stack(rows)], 1)

    accuracy = passkey_accuracy(EveryOther(1, 1), tokenizer, [500, 700], trials=6, batch_tokens=2100)
    assert accuracy == {500: 0.5, 700: 0.5}


def test_models_answer_passkeys_by_generating():
    tokenizer = byte_tokenizer()
    model = student(vocab_size=len(tokenizer), max_position_embeddings=1024)
    assert passkey_accuracy(model, tokenizer, [400], trials=2) == {400: 0.0}


@pytest.fixture
def report() -> Report:
    edges = (0, 128, 256)
    rows = [
        Row("teacher", PositionLoss(edges, (4.0, 3.0), (0.1, math.nan)), {256: 1.0, 512: 0.9}),
        Row("window control", PositionLoss(edges, (4.0, 4.0), (0.1, 0.1)), {256: 0.0, 512: 0.0}),
        Row("after stage 1", PositionLoss(edges, (4.0, 3.5), (0.1, 0.1)), {256: 0.5}, relative_error=0.0123),
    ]
    tasks = {"quiz": {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": 0.01}}
    return Report("a title", [*rows, Row("tasks alone", tasks=tasks)], {"seed": 1})


def test_the_report_is_read_back_and_holds_no_nan(report, tmp_path):
    files = save_report(report, tmp_path)
    assert [file.name for file in files] == ["evaluation.json", "evaluation.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG") and files[1].stat().st_size > 10_000
    saved = json.loads(files[0].read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert saved["settings"] == {"seed": 1} and {"date", "device", "versions", "cores"} <= set(saved["environment"])
    rows = [Row.from_dict(row) for row in saved["rows"]]
    assert rows[2] == report.rows[2] and rows[3] == report.rows[3]
    assert saved["rows"][2]["loss"]["perplexities"] == pytest.approx([math.exp(4), math.exp(3.5)])


def test_the_table_shows_losses_shares_and_passkeys(report):
    console = Console(record=True, width=140, file=open("/dev/null", "w"))
    for table in report.tables():
        console.print(table)
    text = console.export_text()
    for cell in ("128–256", "closed from 128 on", "50%", "0.0123", "3.500", "512", "90%", "0.5000 ± 0.0100"):
        assert cell in text
    assert "nan" not in text


def test_without_matplotlib_the_json_is_there(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert [file.name for file in save_report(report, tmp_path)] == ["evaluation.json"]


def test_tasks_run_through_lm_eval_or_say_how_to_get_it(tmp_path):
    tokenizer = byte_tokenizer()
    model = student(vocab_size=len(tokenizer), max_position_embeddings=1024)
    lines = [{"question": "the mill", "choices": [" turns", " sinks"], "answer": n % 2} for n in range(4)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "quiz.yaml").write_text(
        f"task: quiz\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {tmp_path / 'quiz.jsonl'}}}}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'lizard-attn\[eval\]'"):
            run_tasks(model, tokenizer, ["quiz"])
        return
    with pytest.raises(ValueError, match="lm-eval knows no nonsense"):
        run_tasks(model, tokenizer, ["nonsense"])
    metrics = run_tasks(model, tokenizer, ["quiz"], include_path=str(tmp_path), batch_size=2)
    assert metrics["quiz"]["acc,none"] == 0.5  # the same question, answered the same way
