"""A layer whose sequence lies over ranks is the layer on one: outputs, its state, gradients of all that has one."""

import pytest
import torch
from layer_checks import FORMS, assert_same_state, inputs, layer
from test_moved_anchors import turned

from lizard_layers import EarlierRanks
from tests.rank_threads import on_ranks, threads_as_ranks

LENGTH, CUTS = 29, (0, 1, 9, 12, 29)  # a window of 5 is wider than two parts
PARTS = [slice(a, b) for a, b in zip(CUTS[:-1], CUTS[1:], strict=True)]


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    threads_as_ranks(monkeypatch)


def over_parts(made, tensors, rope, mask=None, blocks=None, **options):
    """(o, the last rank's state) of the layer on a part each rank."""

    def run(rank, group):
        here = PARTS[rank]
        own = {} if blocks is None else {"anchor_blocks": within(blocks, here)}
        padded = {} if mask is None else {"padding_mask": mask[:, here]}
        given = (*(t[:, here] for t in tensors), tuple(t[:, here] for t in rope))
        return made(*given, EarlierRanks(group), **own, **padded, **options)

    found = on_ranks(len(PARTS), run)
    return torch.cat([o for o, _ in found], 1), found[-1][1]


def within(blocks, here):
    """The blocks of the positions ``here``."""
    found, start = [], 0
    for block in blocks:
        first, end = max(start, here.start), min(start + block.length, here.stop)
        start += block.length
        found += [block._replace(length=end - first)] if end > first else []
    return found


def compared(made, whole, parts, heads):
    """Outputs, states but for log scales, and all gradients, of two ways to call the layer."""
    leaves = [t.requires_grad_() for t in heads] + [p for p in made.parameters() if p.requires_grad]
    results = [call() for call in (whole, parts)]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert_same_state(*(one_scale(state) for _, state in reversed(results)), rtol=1e-9, atol=1e-9)
    cotangent = torch.randn(results[0][0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = [torch.autograd.grad(o, leaves, cotangent, allow_unused=True) for o, _ in results]
    for found, wanted in zip(*reversed(grads), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def one_scale(state):
    """A state whose sums have no log scale beside them, but stand for themselves."""
    attention = getattr(state, "attention", state)
    if attention.log_scale is None:
        return state
    scale = attention.log_scale.exp()
    plain = attention._replace(
        s=attention.s * scale[..., None, None], z=attention.z * scale[..., None], log_scale=torch.zeros_like(scale)
    )
    return plain if attention is state else state._replace(attention=plain)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_are_one(form):
    made, (*heads, rope) = layer(form), inputs(LENGTH)
    compared(
        made,
        lambda: made(*heads, rope, use_state=True),
        lambda: over_parts(made, heads, rope, use_state=True),
        heads,
    )


@pytest.mark.parametrize("form", ["recommended", "kept", "received"])
def test_padding_is_not_there(form):
    made, (*heads, rope) = layer(form), inputs(LENGTH)
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[0, :10] = False
    compared(
        made,
        lambda: made(*heads, rope, use_state=True, padding_mask=mask),
        lambda: over_parts(made, heads, rope, mask=mask, use_state=True),
        heads,
    )


@pytest.mark.parametrize("form", ["recommended", "window_only", "kept", "received", "kept_by_head"])
def test_anchors_move_on_over_ranks(form):
    """Wherever a part begins and blocks end: those of position_limit 12 and position_step 6, a window less."""
    made, (*heads, rope) = layer(form), inputs(LENGTH)
    lengths, shifts = (12, 6, 6, 5), (0, 6, 12, 18)
    blocks = [turned((by, by), (by > 0, by > 0), n) for n, by in zip(lengths, shifts, strict=True)]
    compared(
        made,
        lambda: made(*heads, rope, use_state=True, anchor_blocks=blocks),
        lambda: over_parts(made, heads, rope, blocks=blocks, use_state=True),
        heads,
    )


def test_what_earlier_ranks_leave_out_is_refused():
    made, (*heads, rope) = layer("recommended"), inputs(5)
    for name, value in (("inplace", True), ("cu_seqlens", torch.tensor([0, 5]))):
        with pytest.raises(ValueError, match=f"{name}: got .*, wanted none with EarlierRanks"):
            made(*heads, rope, EarlierRanks("a group"), **{name: value})
    with pytest.raises(ValueError, match="EarlierRanks.None., wanted a process group"):
        made(*heads, rope, EarlierRanks(None))
    made = layer("kept", positions="clamped", kept_past="dropped", coverage="left")
    blocks = [turned((4, 0), (True, False), 5)]
    with pytest.raises(ValueError, match='got EarlierRanks past position_limit with kept_past="dropped", wanted'):
        made(*heads, rope, EarlierRanks("a group"), anchor_blocks=blocks)
