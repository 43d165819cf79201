"""torch.export of a model with an open batch and length, with its cache and without."""

import pytest
import torch
from tiny import student, tokens
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

OPEN = {0: Dim("b"), 1: Dim("t")}


class WithCache(nn.Module):
    """What a program can return of a forward with a cache: logits, and the tensors of its states."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        out = self.model(ids, attention_mask=mask, use_cache=True)
        return out.logits, [[t for t in layer.state if t is not None] for layer in out.past_key_values.lizard_layers()]


def padded(rows, length):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return tokens(rows, length), mask


@torch.no_grad()
def test_one_program_reads_every_batch_and_length_and_leaves_its_state():
    model = WithCache(student(num_hidden_layers=2, softmax_layers=(1,)))
    program = torch.export.export(model, padded(3, 20), dynamic_shapes=(OPEN, OPEN)).module()
    for size in [(2, 7), (1, 2), (3, 64), (2, 131)]:  # within the window of 8, and beyond
        inputs = padded(*size)
        for found, wanted in zip(tree_leaves(program(*inputs)), tree_leaves(model(*inputs)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="positions reach position_limit=256"):  # from there on anchors move
        program(tokens(1, 300), torch.ones(1, 300, dtype=torch.long))
