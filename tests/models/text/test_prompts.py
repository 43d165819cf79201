"""Prompts of any length: prefilled in pieces, continued as if read at once, without warnings that mislead."""

import logging

import numpy as np
import pytest
import torch
from readable import SENTENCE, byte_tokenizer, save_teacher
from tiny import student, teacher, tokens
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from lizard_models import LizardConfig, linearize
from lizard_models.cli.main import app
from lizard_models.teachers.find import load_tokenizer, save_tokenizer
from lizard_models.teachers.loading import load_model
from lizard_models.text.prompts import ContinuationStreamer, prefill, prompt_tokens

WARNING = "predefined maximum length"


def pieces_of(row, size):
    return [piece.numpy() for piece in row.split(size)]


@pytest.mark.parametrize("make", [student, teacher, lambda **size: student(softmax_layers=(1,), **size)])
@pytest.mark.parametrize(("length", "size", "chunk"), [(29, 4, 7), (29, 29, 100), (15, 1, 1), (1, 1, 5)])
def test_goes_on_as_after_the_whole_prompt(make, length, size, chunk):
    model, row = make(), tokens(1, length)[0]
    settings = dict(max_new_tokens=9, do_sample=False)
    whole = model.generate(row[None], attention_mask=torch.ones(1, length).long(), **settings)[0, length:]
    read = prefill(model, pieces_of(row, size), chunk)
    assert read.length == length and read.cache.get_seq_length() == length - 1
    assert torch.equal(model.generate(**read.generate_inputs(), **settings)[0, 1:], whole)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        prefill(student(), [])
    with pytest.raises(ValueError, match="prompt is empty"):
        prefill(student(), [np.empty(0, np.int64)])


@pytest.mark.parametrize("chat", [False, True])
def test_pieces_have_the_ids_of_the_whole_prompt(chat):
    tokenizer, text = byte_tokenizer(), "the mill\nturns and turns " * 9
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}ANSWER:"
    pieces = [text[i : i + 11] for i in range(0, len(text), 11)]
    if chat:
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        wanted = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        wanted = tokenizer(text)["input_ids"]
    assert np.concatenate(list(prompt_tokens(pieces, tokenizer, chat))).tolist() == wanted
    assert chat or not list(prompt_tokens([], tokenizer))


def test_the_streamer_prints_the_continuation_alone(capsys):
    tokenizer = byte_tokenizer()
    streamer = ContinuationStreamer(tokenizer)
    ids = torch.tensor(tokenizer("turns away now")["input_ids"])
    streamer.put(ids[None, 4:5])
    for token in ids[5:]:
        streamer.put(token[None])
    streamer.end()
    assert capsys.readouterr().out == " away now\n"


@pytest.fixture
def warned(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: WARNING in caplog.text
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(student, False), (teacher, True), (lambda **size: student(softmax_layers=(1,), **size), True)],
)
def test_only_models_with_a_context_warn_past_it(make, expected, warned):
    transformers_logging.warning_once.cache_clear()
    model, row = make(max_position_embeddings=24), tokens(1, 20)
    model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)
    assert warned() == expected


@pytest.mark.parametrize("kept", [(), (1,)])
def test_the_saved_tokenizer_has_the_limit_of_the_model(kept, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 24
    save_tokenizer(tokenizer, tmp_path, student(softmax_layers=kept).config)
    saved = load_tokenizer(str(tmp_path))
    assert saved.model_max_length == (24 if kept else VERY_LARGE_INTEGER) and tokenizer.model_max_length == 24
    assert saved("the mill")["input_ids"] == tokenizer("the mill")["input_ids"]


def test_a_file_of_any_length_is_continued(tmp_path):
    source = load_model(str(save_teacher(tmp_path / "teacher")))
    model = linearize(source.model, LizardConfig.preset("plain", attention={"window": 8}))
    model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    text = "".join(SENTENCE.format(n=n) for n in range(70))  # 5,900 tokens, past the teacher's 4096
    (tmp_path / "book.txt").write_text(text)

    def call(*arguments, code=0, **options):
        result = CliRunner().invoke(app, ["generate", str(tmp_path / "model"), *map(str, arguments)], **options)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    settings = ["-n", "5", "--device", "cpu"]
    from_file = call("--prompt-file", tmp_path / "book.txt", *settings)
    assert f"{len(text)} tokens read, 5 written" in from_file.stderr and WARNING not in from_file.stderr
    piped = call("-", *settings, input=text)
    assert piped.stdout == text + from_file.stdout
    assert call(text, *settings).stdout == piped.stdout
    for arguments in ([], ["x", "--prompt-file", tmp_path / "book.txt"]):
        assert "give one of PROMPT and --prompt-file" in call(*arguments, code=2).stderr
    assert "nowhere.txt" in call("--prompt-file", tmp_path / "nowhere.txt", code=2).stderr
    assert "positions must be" in call("x", "--positions", "best", code=2).stderr
