"""What a step of ``generate`` does with tensors as long as the text: it joins the new ids to them, and no more."""

from collections import Counter

import pytest
import torch
from tape import TapeRecorder
from tiny import student, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor

from lizard_models.model import decode_graph

LENGTH, STEPS = 700, 12  # longer than any other side of a tensor here
VIEWS = (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten.alias.default)


class LongTensors(TorchDispatchMode):
    """Counts the operations, but views, that read or write a tensor with a side of at least ``LENGTH``."""

    def __init__(self):
        super().__init__()
        self.found, self.counting = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if self.counting and func not in VIEWS and any(max(t.shape, default=0) >= LENGTH for t in tensors):
            self.found[str(func)] += 1
        return out


class CountFrom(LogitsProcessor):
    """Lets a ``LongTensors`` count from the given token on: the prompt has been read, a graph captured."""

    def __init__(self, long, first):
        self.long, self.left = long, first

    def __call__(self, input_ids, scores):
        self.left -= 1
        self.long.counting = self.left <= 0
        return scores


def padded(length=LENGTH):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    return mask


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": padded()},
        {"do_sample": True, "top_k": 5},
        {"eos_token_id": [1], "min_new_tokens": STEPS},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_ids_are_joined_and_nothing_else_grows(graph, options, monkeypatch):
    recorder = TapeRecorder()
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: recorder if graph else None)
    model, first = student(num_hidden_layers=1), 5
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": STEPS} | options
    with LongTensors() as long:
        model.generate(tokens(2, LENGTH), logits_processor=[CountFrom(long, first)], **settings)
    steps = STEPS - first
    # the first counted token's own join comes after its logits
    assert long.found == {"aten.cat.default": steps + 1}
    assert (recorder.replays > 0) is graph


@pytest.mark.parametrize("options", [{"attention_mask": padded(9)}, {"num_beams": 2, "attention_mask": padded(9)}, {}])
def test_the_text_is_that_of_whole_masks_and_positions(options, monkeypatch):
    model, found = student(num_hidden_layers=2), []
    settings = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True) | options
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(type(model), "_without_the_past", lambda self, kwargs: None)
        found.append(model.generate(tokens(2, 9), **settings))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(found[0].logits, found[1].logits, strict=True))
    assert torch.equal(found[0].past_key_values.positions(), found[1].past_key_values.positions())
