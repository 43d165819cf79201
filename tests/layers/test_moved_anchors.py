"""Anchors that move on with the text, block by block, and states that keep them where they stood."""

import pytest
import torch
from layer_checks import angles, inputs, layer

from lizard_layers import AnchorBlock, PackedBlock, map_state
from lizard_ops import apply_rotary

FIRST, BLOCKS = 8, (3, 2)  # tokens read before, and of the blocks after
FREQUENCIES = 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)  # those of ``angles``


def turned(by: tuple[int, int], moved: tuple[bool, bool], length: int) -> AnchorBlock:
    """The anchors of row i moved on by ``by[i]`` positions."""
    cos, sin = angles(torch.tensor(by))
    shift = torch.where(torch.tensor(moved), torch.tensor(by), 0)
    return AnchorBlock(length, cos.transpose(0, 1), sin.transpose(0, 1), torch.tensor(moved), shift, FREQUENCIES)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["recommended", "window_only"])
@torch.no_grad()
def test_each_block_sees_the_anchors_where_it_has_them(form, inplace):
    attention = layer(form)
    x, q, k, v, rope = inputs(FIRST + sum(BLOCKS))
    parts = torch.arange(FIRST + sum(BLOCKS)).split([FIRST, *BLOCKS])

    def read(part, state, **options):
        here = (t[:, part] for t in (x, q, k, v))
        return attention(*here, tuple(t[:, part] for t in rope), state, use_state=True, **options)

    blocks = [turned((4, 0), (True, False), BLOCKS[0]), turned((7, 2), (True, True), BLOCKS[1])]
    start = read(parts[0], None)[1]
    anchors, wanted, state = start.anchor_k, [], start
    for block, part in zip(blocks, parts[1:], strict=True):
        o, state = read(part, state._replace(anchor_k=apply_rotary(anchors, block.cos, block.sin)))
        wanted.append(o)
    state = state._replace(anchor_k=anchors)

    given = type(start)(*(None if t is None else t.clone() for t in start))
    found, after = read(torch.cat(parts[1:]), given, anchor_blocks=blocks, inplace=inplace)
    torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-12, atol=1e-12)
    for name, field in after._asdict().items():
        if field is None:
            continue
        torch.testing.assert_close(field, getattr(state, name), rtol=1e-12, atol=1e-12)
        if inplace:
            assert field.data_ptr() == getattr(given, name).data_ptr(), name
        else:
            assert torch.equal(getattr(given, name), getattr(start, name)), name


@torch.no_grad()
def test_anchors_that_are_still_to_come_are_not_written_into_the_state_given():
    attention = layer("recommended")  # 3 anchors, of which 2 are there
    *heads, rope = inputs(6)
    state = attention(*(t[:, :2] for t in heads), tuple(t[:, :2] for t in rope), use_state=True)[1]
    before = state.anchor_k.clone()
    rest = (*(t[:, 2:] for t in heads), tuple(t[:, 2:] for t in rope))
    wanted = attention(*rest, state, use_state=True)[1].anchor_k
    found = attention(*rest, state, use_state=True, anchor_blocks=[turned((0, 0), (False, False), 4)])[1].anchor_k
    assert torch.equal(found, wanted) and torch.equal(state.anchor_k, before) and not torch.equal(found, before)


def test_blocks_must_add_up():
    attention = layer("recommended")
    *heads, rope = inputs(FIRST)
    with pytest.raises(ValueError, match=r"anchor_blocks have lengths \[3\], wanted .* the 8 new positions"):
        attention(*heads, rope, anchor_blocks=[turned((4, 0), (True, False), 3)])
    row = [t[:1] for t in heads]
    with pytest.raises(ValueError, match="PackedBlocks with cu_seqlens, AnchorBlocks without"):
        attention(*row, rope, cu_seqlens=torch.tensor([0, 3, 8]), anchor_blocks=[turned((4, 0), (True, False), 8)])
    places = torch.arange(8), torch.arange(2), torch.tensor([0, 3, 8])
    with pytest.raises(ValueError, match="PackedBlocks with cu_seqlens, AnchorBlocks without"):
        attention(*row, rope, anchor_blocks=[PackedBlock(turned((4, 0), (True, False), 8), *places)])


def in_pieces(attention, heads, shifts, piece):
    """(outputs, state) of a text read in so many tokens at a time, cut where its shift rises; one token is in place."""
    length, state, outputs = len(shifts), None, []
    rises = (shifts.diff() != 0).nonzero().flatten().add(1).tolist()
    cuts = sorted({*range(0, length, piece), *rises, length})
    for a, b in zip(cuts, cuts[1:], strict=False):
        block = turned((int(shifts[a]),) * 2, (bool(shifts[a]),) * 2, b - a)
        here = (*(t[:, a:b] for t in heads), tuple(t for t in angles(torch.arange(a, b))))
        inplace = b - a == 1 and state is not None
        given = map_state(state, lambda t: t.clone(memory_format=torch.contiguous_format)) if inplace else state
        o, state = attention(*here, given, use_state=True, anchor_blocks=[block], inplace=inplace)
        assert not inplace or state.attention.kept_k.data_ptr() == given.attention.kept_k.data_ptr()
        outputs.append(o)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("places", [40, (24, 30)])
@pytest.mark.parametrize("piece", [1, 2, 7])
@torch.no_grad()
def test_kept_keys_are_seen_no_further_back_than_the_anchors(piece, places):
    """So many places that nothing expires: softmax over every key, each turned as its query sees it."""
    attention, length, window = layer("kept", kept_keys=places, window=4, disturbed=False), 29, 4
    x, q, k, v, _ = inputs(length)
    shifts = torch.tensor([0] * 11 + [5] * 7 + [12] * 11)
    group, o = 2, torch.zeros_like(q)
    for i in range(length):
        shift = int(shifts[i])
        behind = [j + shift if j < 2 else max(j, shift) for j in range(max(0, i - window + 1))]
        seen = torch.tensor([*behind, *range(len(behind), i + 1)])
        keys = apply_rotary(k[:, : i + 1], *angles(seen)).repeat_interleave(group, 2)
        query = apply_rotary(q[:, i : i + 1], *angles(torch.tensor([i])))
        weights = torch.einsum("bihd,bjhd->bhj", query, keys).mul(8**-0.5).softmax(-1)
        o[:, i] = torch.einsum("bhj,bjhd->bhd", weights, v[:, : i + 1].repeat_interleave(group, 2))

    found, state = in_pieces(attention, (x, q, k, v), shifts, piece)
    torch.testing.assert_close(found, o, rtol=1e-6, atol=1e-6)  # cos and sin are float32
    true = apply_rotary(k, *angles(torch.arange(length)))
    held, found = state.attention.kept_positions, state.attention.kept_k
    if isinstance(places, tuple):  # each head by itself, as if it had as many as the other
        held, found = (
            torch.cat([x[:, :24], x[:, :6] * 0 + fill, x[:, 24:]], 1) for x, fill in ((held, -1), (found, 0))
        )
        held, found = (x.unflatten(1, (2, 30)).transpose(1, 2) for x in (held, found))
    at = held.clamp(min=0).unsqueeze(-1).expand_as(found)
    kept = torch.where((held >= 0).unsqueeze(-1), true.gather(1, at), 0.0)
    torch.testing.assert_close(found, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("places", [40, (24, 30)])
@pytest.mark.parametrize("piece", [1, 2, 7])
@torch.no_grad()
def test_keys_that_would_have_to_move_are_dropped(piece, places):
    """So many places that nothing expires but what is dropped: softmax over anchors and the keys from the shift on."""
    changed = dict(kept_keys=places, window=4, positions="clamped", kept_past="dropped", coverage="left")
    attention, length, window = layer("kept", disturbed=False, **changed), 29, 4
    x, q, k, v, _ = inputs(length)
    attention.mix.bias.fill_(-60.0)  # which leaves nothing to the linear branch
    shifts = torch.tensor([0] * 11 + [5] * 7 + [12] * 11)
    group, o = 2, torch.zeros_like(q)
    for i in range(length):
        shift = int(shifts[i])
        places_of = {j: j + shift if j < 2 else j for j in range(i + 1) if j < 2 or j >= shift or i - j < window}
        places_of |= {j: j for j in range(max(0, i - window + 1), i + 1)}
        seen = torch.tensor(list(places_of))
        keys = apply_rotary(k[:, seen], *angles(torch.tensor(list(places_of.values())))).repeat_interleave(group, 2)
        query = apply_rotary(q[:, i : i + 1], *angles(torch.tensor([i])))
        weights = torch.einsum("bihd,bjhd->bhj", query, keys).mul(8**-0.5).softmax(-1)
        o[:, i] = torch.einsum("bhj,bjhd->bhd", weights, v[:, seen].repeat_interleave(group, 2))

    found, state = in_pieces(attention, (x, q, k, v), shifts, piece)
    torch.testing.assert_close(found, o, rtol=1e-6, atol=1e-6)
    held = state.attention.kept_positions
    assert held.max() == length - 1 - window and sorted({*held.flatten().tolist()} - {-1})[0] == 12


@torch.no_grad()
def test_a_row_drops_its_keys_by_itself():
    attention = layer("kept", kept_keys=6, window=4, positions="clamped", kept_past="dropped", coverage="left")
    *heads, rope = inputs(15)
    state = attention(*(t[:, :14] for t in heads), tuple(t[:, :14] for t in rope), use_state=True)[1]
    last = (*(t[:, 14:] for t in heads), tuple(t[:, 14:] for t in rope))
    blocks = [turned((9, 0), (True, False), 1)]
    after = attention(*last, state, use_state=True, anchor_blocks=blocks)[1].attention
    before, held = state.attention.kept_positions, after.kept_positions
    assert (before[0] < 9).any() and not ((held[0] >= 0) & (held[0] < 9)).any()
    assert torch.equal(after.kept_scores[0].isinf(), held[0] < 0)
    assert torch.equal(held[1], attention(*last, state, use_state=True)[1].attention.kept_positions[1])


def test_a_step_in_place_that_is_refused_drops_nothing():
    attention = layer("kept", kept_keys=6, window=4, positions="clamped", kept_past="dropped", coverage="left")
    *heads, rope = inputs(15)
    with torch.no_grad():
        state = attention(*(t[:, :14] for t in heads), tuple(t[:, :14] for t in rope), use_state=True)[1]
    before, state = (map_state(state, lambda t: t.clone(memory_format=torch.contiguous_format)) for _ in range(2))
    last = (*(t[:, 14:] for t in heads), tuple(t[:, 14:] for t in rope))
    blocks = [turned((9, 9), (True, True), 1)]
    with pytest.raises(ValueError, match="gradients"):
        attention.requires_grad_()(*last, state, use_state=True, anchor_blocks=blocks, inplace=True)
    assert (before.attention.kept_positions < 9).any()
    for name, field in before.attention._asdict().items():
        assert field is None or torch.equal(field, getattr(state.attention, name)), name
    attention.requires_grad_(False)  # then it is done, whether gradients might be recorded or not
    o, after = attention(*last, before, use_state=True, anchor_blocks=blocks)
    found, there = attention(*last, state, use_state=True, anchor_blocks=blocks, inplace=True)
    assert torch.equal(found, o) and there.attention.kept_positions is state.attention.kept_positions
    assert torch.equal(there.attention.kept_positions.sort(1)[0], after.attention.kept_positions.sort(1)[0])
