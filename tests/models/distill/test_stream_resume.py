"""Training data that are read again go on at the item they stopped at, in every epoch; other data are refused."""

import os
import signal

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from training import LENGTH, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import TrainingInterrupted, train_stage1, train_stage2
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.distill.stream import EndlessStream
from lizard_models.text.sequences import StreamedTokens

ITEMS = 7  # an epoch of three steps and a half, in batches of two
ROWS = torch.randint(2, 97, (ITEMS, LENGTH), generator=torch.Generator().manual_seed(4))


class Packed(Dataset):
    digest = "rows"

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": ROWS[index]}


class Plain(IterableDataset):
    """A user's own stream, the same every epoch."""

    def __iter__(self):
        return iter([{"input_ids": row} for row in ROWS])


def streamed() -> StreamedTokens:
    return StreamedTokens(lambda epoch: [row.numpy() for row in ROWS.roll(epoch, 0)], LENGTH, buffer=3)


DATA = {"streamed": streamed, "plain stream": Plain, "packed": Packed}


def seen_in(monkeypatch, kind: type, stop_at: int | None = None) -> list:
    """Sequences that the objective sees; Ctrl-C in that step."""
    plain, seen = kind.forward, []

    def forward(self, input_ids, **kwargs):
        seen.append(input_ids.clone())
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return seen


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("stopped", [3, 4, 8])
@pytest.mark.parametrize("data", DATA)
def test_a_run_goes_on_at_the_item_it_stopped_at(tmp_path, monkeypatch, data, stopped, micro):
    steps = 12
    models, sequences_seen = [fresh() for _ in range(3)], []
    recipe = recipes(models[0], steps=steps)[0]

    def train(model, folder, stop_at=None, **changes):
        with monkeypatch.context() as watched:
            sequences_seen.append(seen_in(watched, AttentionTransfer, stop_at))
            run = arguments(tmp_path / folder, micro_batch_size=micro, save_steps=100, **changes)
            train_stage1(model, DATA[data](), run, recipe)

    train(models[0], "a")
    with pytest.raises(TrainingInterrupted):
        train(models[1], "b", stop_at=stopped * (2 if micro else 1))
    train(models[2], "b", resume=True)
    whole, first, second = sequences_seen
    assert len(first) + len(second) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + second, strict=True))
    assert moved(snapshot(models[0]), models[2]) == set()


def test_stage_2_goes_on_in_the_third_epoch(tmp_path, monkeypatch):
    whole, again = fresh(), fresh()
    recipe = recipes(whole, steps=10)[1]
    whole, _ = train_stage2(whole, streamed(), arguments(tmp_path / "a"), recipe)
    with monkeypatch.context() as watched, pytest.raises(TrainingInterrupted):
        seen_in(watched, LanguageModelling, 8)
        train_stage2(fresh(), streamed(), arguments(tmp_path / "b"), recipe)
    again, _ = train_stage2(again, streamed(), arguments(tmp_path / "b", resume=True), recipe)
    assert moved(snapshot(whole), again) == set()


def test_an_endless_stream_is_its_epochs_one_after_another():
    stream, epochs = streamed(), []
    for epoch in range(3):
        stream.set_epoch(epoch)
        epochs += [item["input_ids"] for item in stream]
    endless = [item["input_ids"] for item, _ in zip(EndlessStream(streamed()), range(3 * ITEMS), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(endless, epochs, strict=True))


@pytest.mark.parametrize(("items", "reason"), [([], "the stream gave nothing; wanted text"), (ROWS, "in epoch 1")])
def test_a_stream_that_ends_for_good_is_named(tmp_path, items, reason):
    class Once(IterableDataset):
        rows = iter([{"input_ids": row} for row in items])

        def __iter__(self):
            return self.rows

    model = fresh()
    with pytest.raises(ValueError, match=f"^data: .*{reason}"):
        train_stage1(model, Once(), arguments(tmp_path), recipes(model, steps=9)[0])
