"""Mode "distill" under a stock Trainer: steps do not depend on how a batch is cut."""

import copy

import pytest
import torch
from tiny import student, tokens
from transformers import Trainer, TrainingArguments

from lizard_models import Stage1Config


class Rows(torch.utils.data.Dataset):
    """Eight rows; the first labels of each do not count, of other rows more."""

    ids = tokens(8, 20, 7)

    def __init__(self, ignored: int):
        self.labels = self.ids.clone()
        for b in range(8):
            self.labels[b, : b * ignored] = -100

    def __len__(self):
        return 8

    def __getitem__(self, b):
        return dict(input_ids=self.ids[b], labels=self.labels[b])


def step(model, folder, rows: int, accumulated: int, ignored: int = 0) -> tuple[torch.Tensor, float]:
    """What one step of a stock Trainer took from the new parameters, and the loss it tells."""
    model = copy.deepcopy(model).requires_grad_(True)
    before = torch.cat([p.detach().flatten().clone() for _, p in model.lizard_parameters()])
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="no",
        disable_tqdm=True,
    )
    told = Trainer(model, arguments, train_dataset=Rows(ignored)).train().training_loss
    return before - torch.cat([p.detach().flatten() for _, p in model.lizard_parameters()]), told


def test_accumulated_steps_are_equal(tmp_path):
    model = student(num_hidden_layers=2)
    model.set_attention_mode("distill", Stage1Config(error="mse"))  # a mean over tokens: equal to rounding
    wanted, told = step(model, tmp_path, 8, 1)
    assert wanted.norm() > 0
    for rows, accumulated in ((4, 2), (2, 4), (1, 8)):
        found, loss = step(model, tmp_path, rows, accumulated)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(told, rel=1e-4)


def test_relative_errors_are_averaged_over_the_forwards_of_a_step(tmp_path):
    model = student(num_hidden_layers=2)
    model.set_attention_mode("distill")
    wanted, told = step(model, tmp_path, 8, 1)
    found, loss = step(model, tmp_path, 2, 4)  # each forward divides by its own targets
    assert (found.norm() / wanted.norm()).item() == pytest.approx(1, abs=0.05) and loss == pytest.approx(told, rel=0.05)


@torch.no_grad()
def test_forwards_count_by_their_labels():
    model, ids = student(num_hidden_layers=2), tokens(2, 20)
    model.set_attention_mode("distill")
    labels = ids.clone()
    labels[:, :11] = -100
    loss = model(ids, labels=labels).loss
    share = model(ids, labels=labels, num_items_in_batch=torch.tensor(36)).loss
    torch.testing.assert_close(share, loss / 2)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=18).loss, loss)
    shifted = model(ids, labels=labels, shift_labels=labels[:, 1:], num_items_in_batch=18).loss
    torch.testing.assert_close(shifted, loss)
    with pytest.raises(ValueError, match="num_items_in_batch: got a number, but no labels"):
        model(ids, num_items_in_batch=36)
