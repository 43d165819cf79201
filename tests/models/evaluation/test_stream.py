"""Streams: the losses of one forward, the ids of the whole text, and memory that does not grow."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from readable import byte_tokenizer, save_teacher
from tiny import student, teacher, tokens
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lizard_models import LizardConfig, linearize
from lizard_models.evaluation import measure_stream, stream_losses
from lizard_models.evaluation.plot import save_stream
from lizard_models.evaluation.stream import SAMPLES, StreamMeter, first_tokens
from lizard_models.text.token_stream import count_tokens, stream_tokens, token_chunks, tokenise_pieces


def pieces_of(ids, sizes):
    return [piece.numpy() for piece in torch.as_tensor(ids).split(sizes)]


@pytest.mark.parametrize(
    "model", [teacher(), student(), student("paper"), student(softmax_layers=(1,)), student(family="gemma2")]
)
def test_streamed_losses_are_those_of_one_forward(model):
    ids = tokens(1, 200)[0]
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    wanted = F.cross_entropy(logits, ids[1:], reduction="none")
    for chunk, sizes in ((37, [1, 99, 100]), (199, [200]), (1000, [60, 140]), (50, [50] * 4)):
        parts = list(stream_losses(model, pieces_of(ids, sizes), chunk))
        assert [start for start, _ in parts] == list(range(0, 199, chunk))
        torch.testing.assert_close(torch.cat([losses for _, losses in parts]), wanted, rtol=1e-4, atol=1e-4)


def test_a_stream_is_read_as_it_is_needed():
    given_out = []

    def endless():
        while True:
            given_out.append(len(given_out))
            yield np.array([5, 6, 7])

    for position, _ in stream_losses(student(), endless(), chunk=6):
        if position >= 12:
            break
    assert len(given_out) <= 8
    assert [len(p) for p in first_tokens(endless(), 7)] == [3, 3, 2]
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        next(stream_losses(student(), endless(), chunk=0))


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_chunks_cover_the_ids_in_order(sizes, chunk, overlap):
    ids = np.arange(sum(sizes))
    chunks = list(token_chunks(np.split(ids, np.cumsum(sizes)[:-1]) if sizes else [], chunk, overlap))
    assert all(len(c) == chunk + overlap for c in chunks[:-1])
    starts = [c[0] for c in chunks]
    assert starts == list(range(0, max(0, len(ids) - overlap), chunk))
    assert all(np.array_equal(c, ids[c[0] : c[0] + len(c)]) for c in chunks)


def test_a_report_knows_buckets_memory_and_speed(tmp_path):
    model, ids = student(), tokens(1, 1300)[0]
    shown = []
    report = measure_stream(
        model, pieces_of(ids, 77), title="t", chunk=100, show=lambda meter, sample: shown.append(sample.tokens)
    )
    losses = torch.cat([losses for _, losses in stream_losses(model, [ids.numpy()], 500)])
    assert report.loss.edges == (0, 128, 512, 1024, 1299) and shown == [*range(100, 1300, 100), 1299]
    for mean, start, end in zip(report.loss.means, report.loss.edges, report.loss.edges[1:], strict=False):
        assert mean == pytest.approx(losses[start:end].mean().item(), rel=1e-4)
    held = model(ids[None], use_cache=True).past_key_values.state_bytes()
    assert report.tokens == 1299 and report.state_bytes == held
    assert report.growth("cuda") is None and abs(report.growth()) < 0.5
    saved = save_stream(report, tmp_path)
    assert [path.name for path in saved] == ["stream.json", "stream.png"]
    values = json.loads(saved[0].read_text())
    assert values["loss"]["means"] == list(report.loss.means) and values["samples"][-1]["tokens"] == 1299
    assert "1,299 positions" in report.summary() and "resident" in report.summary()
    short = measure_stream(model, [ids.numpy()], title="t", chunk=100, max_tokens=250)
    assert short.tokens == 250
    with pytest.raises(ValueError, match="fewer than two tokens"):
        measure_stream(model, [ids.numpy()[:1]], title="t")


def test_a_meter_keeps_a_fixed_amount():
    meter = StreamMeter()
    for i in range(5000):
        meter.add(10 * i, torch.full((10,), float(i)))
    assert len(meter.samples) <= SAMPLES and len(meter.sums) < 20
    at = [sample.tokens for sample in meter.samples]
    assert len({b - a for a, b in zip(at, at[1:], strict=False)}) == 1  # evenly spread
    assert meter.losses().past(0) == pytest.approx(4999 / 2)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a space before the text, spaces as letters, merges over the whole text."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,\n"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "t"), ("▁", "▁"), ("i", "n"), ("▁", "in"), ("e", "r")]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *letters, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("i", "n"), ("Ġ", "in"), ("ĠĠ", "in"))
TOKENIZERS = {"byte-level": byte_tokenizer(MERGES), "sentencepiece": sentencepiece_like()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text("the in.\n, ü", max_size=120), size=st.integers(1, 40))
@settings(max_examples=120, deadline=None)
def test_pieces_of_a_text_have_the_ids_of_the_whole(kind, text, size):
    tokenizer = TOKENIZERS[kind]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    pieces = list(tokenise_pieces((text[i : i + size] for i in range(0, len(text), size)), tokenizer))
    assert [int(i) for piece in pieces for i in piece] == whole


def test_a_text_without_spaces_is_cut_anyway():
    tokenizer, text = byte_tokenizer(), "x" * 20_000
    sizes = [len(ids) for ids in tokenise_pieces([text[i : i + 1000] for i in range(0, 20_000, 1000)], tokenizer)]
    assert sum(sizes) == 20_000 and max(sizes) <= 6000


def test_sources_are_laid_end_to_end(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("the wind " * 50)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    np.save(tmp_path / "c.npy", np.arange(5, 90, dtype=np.uint16).reshape(5, 17))
    ids = np.concatenate(list(stream_tokens([str(tmp_path)], tokenizer, vocab_size=259, piece=7)))
    texts = [tokenizer(text)["input_ids"] for text in ("the wind " * 50, "one", "two")]
    end = tokenizer.eos_token_id
    assert ids.tolist() == [*texts[0], end, *texts[1], end, *texts[2], *range(5, 90)]
    assert count_tokens([str(tmp_path)]) is None and count_tokens([str(tmp_path / "c.npy")] * 2) == 170
    only_ids = np.concatenate(list(stream_tokens([str(tmp_path / "c.npy")], piece=6)))
    assert only_ids.tolist() == list(range(5, 90))
    np.save(tmp_path / "float.npy", np.ones(4))
    (tmp_path / "no.npy").write_bytes(b"no array")
    for source, wanted in (
        (tmp_path / "float.npy", "wanted integer ids"),
        (tmp_path / "no.npy", "is not an array of token ids"),
        (tmp_path / "nowhere.txt", "does not exist"),
        ("owner/name", "does not exist; give a file or a folder"),
        (tmp_path / "a.txt", "the model has no tokenizer; give ids"),
    ):
        with pytest.raises(ValueError, match=wanted):
            list(stream_tokens([str(source)]))
    with pytest.raises(ValueError, match="run from 5 to 10, but the vocabulary has 7"):
        list(stream_tokens([str(tmp_path / "c.npy")], vocab_size=7, piece=6))


FLAT = """
import sys
for name in ("datasets", "gguf", "lm_eval"):  # a machine without them
    sys.modules[name] = None
from lizard_models.cli.main import app
app(sys.argv[1:], standalone_mode=False)
"""


def test_resident_memory_is_flat_and_no_extra_package_is_needed(tmp_path):
    save_teacher(tmp_path / "teacher")
    model = linearize(
        teacher(vocab_size=259, num_hidden_layers=1, max_position_embeddings=4096),
        LizardConfig.preset("plain", attention={"window": 16}),
    )
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(5, 259, 30_000, dtype=np.uint16))
    command = ["eval", tmp_path / "model", "--stream", tmp_path / "ids.npy", "--stream-chunk", 500, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", FLAT, *map(str, command), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert report["tokens"] == 29_999 and "16K–29999" in done.stdout
    assert report["resident_growth"] < 0.01
