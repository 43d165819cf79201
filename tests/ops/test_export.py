"""torch.export with an open batch and length: one program, whose numbers elsewhere are those of the op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from lizard_ops import chunk_gated_attn, window_attn
from lizard_ops.gated_attn import chunk_torch_channels, chunk_torch_tiles
from lizard_ops.gated_attn.chunk_torch_channels import _scan
from lizard_ops.gated_attn.chunk_torch_tiles import Sums, _scan_channel_gate

# shorter than window and tile, a whole tile, one more, beyond the 32 chunks that eager links by one product
SIZES = [(1, 2), (2, 7), (3, 64), (2, 65), (1, 2113)]


class Gated(nn.Module):
    def forward(self, x: dict[str, Tensor]):
        return chunk_gated_attn(x["q"].exp(), x["k"].exp(), x["v"], x["g"], window_offset=5, output_final_state=True)


class Window(nn.Module):
    def forward(self, x: dict[str, Tensor]):
        return window_attn(x["q"], x["k"], x["v"], 11, anchors=3, output_final_state=True)


def inputs(batch: int, length: int) -> tuple:
    draw = torch.Generator().manual_seed(length)
    x = {n: torch.randn(batch, length, h, 4, generator=draw) for n, h in dict(q=4, k=2, v=2).items()}
    return (x | {"g": -0.1 * torch.rand(batch, length, 4, generator=draw)},)


@pytest.mark.parametrize("op, strict", [(Gated(), False), (Window(), True)])
def test_one_program_serves_every_batch_and_length(op, strict):
    """With named dimensions, so that torch has proved every condition for all of them."""
    rows, example = {0: Dim("b"), 1: Dim("t")}, inputs(3, 20)
    shapes = (dict.fromkeys(example[0], rows),)
    program = torch.export.export(op, example, dynamic_shapes=shapes, strict=strict).module()
    for size in SIZES:
        args = inputs(*size)
        for found, wanted in zip(tree_leaves(program(*args)), tree_leaves(op(*args)), strict=True):
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_chunks_of_channel_gates_are_linked_as_by_the_loop_over_them(logs, carried, monkeypatch):
    torch.manual_seed(0)
    items, decay = torch.randn(2, 3, 40, 4, 5).double(), -torch.rand(2, 3, 40, 4).double()
    top = 3 * torch.randn(2, 3, 40, 4).double()
    top[:, 0, :3] = -math.inf  # chunks without a key
    top[:, 1, :, 2] = -math.inf  # and a channel
    items = items.masked_fill(logs & (top == -math.inf).unsqueeze(-1), 0.0)
    start = Sums(torch.randn(2, 3, 1, 4, 5).double(), torch.randn(2, 3, 1).double() if logs else None)
    start = start if carried else None

    def scan():
        found = _scan(items, decay, top, start) if logs else _scan_channel_gate(items, decay, start)
        return [x for x in tree_leaves(found) if x is not None]

    wanted = scan()
    for module in (chunk_torch_tiles, chunk_torch_channels):
        monkeypatch.setattr(module, "is_known", lambda _: False)
    for have, want in zip(scan(), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
