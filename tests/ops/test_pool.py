"""States in a pool of pages: the numbers of the same call on the states alone, and no other byte of the pool."""

from __future__ import annotations

import functools

import pytest
import torch
from kernel_checks import DEVICE
from op_cases import call, cases, state_in
from op_checks import one_of
from test_kept_state import scored

from lizard_ops import AttentionState, PageLayout, PoolRows, checked

pytest.importorskip("lizard_ops.hybrid_attn.triton.decode")

MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "merge_mass": "relative", "sinks": False}
SUM = MERGE | {"mix": "sum", "normalize": True, "weight": "token"}
SIZES = {"B": 3, "Hk": 2, "G": 2, "K": 8, "V": 5, "Fp": 4, "window": 4, "anchors": 1, "sink_form": "exp", "decay": 0.5}
KINDS = {
    "key gate": (MERGE | {"gate": "key", "weight": "head"}, {}),
    "one gate for all": (MERGE | {"gate": "token", "anchors": 0}, {}),
    "query gates, exp": (SUM | {"gate": "query", "Hk": 1, "feature_map": "exp"}, {}),
    "channel gates": (MERGE | {"gate": "channel", "Hk": 1}, {}),
    "all keys": (SUM | {"gate": None, "Hk": 1, "coverage": "all", "window": 9}, {}),
    "kept keys": (MERGE | {"gate": "key"}, {"kept_keys": 3, "score_delay": 1}),
    "kept keys, left": (MERGE | {"gate": "query", "Hk": 1, "coverage": "left"}, {"kept_keys": 3}),
    "places per head": (MERGE | {"gate": "query"}, {"kept_keys": (3, 1), "score_delay": 1}),
}
PAGES = (4, 0, 6)  # of the three rows


@functools.cache
def made(kind, dtype=torch.float32, length=11):
    """(case, what it takes beside it, the states of its rows after all tokens but the last): nobody writes to them."""
    fixed, more = KINDS[kind]
    case = one_of(cases("hybrid", **(SIZES | {"T": length} | fixed)))
    case = (scored(case) if more else case).cast(dtype, DEVICE)
    past = case.part(slice(None), slice(0, length - 1))
    with torch.no_grad():
        return case, more, state_in(call(past, "chunk", impl="torch", **more))


def named(state):
    return {name: x for name, x in state._asdict().items() if x is not None}


def pool_of(state, packed=True, pages=8, seed=1):
    """(bytes, the pool) of pages that hold anything but these states in theirs."""
    layout = PageLayout({name: x[:1].cpu() for name, x in named(state).items()})
    draw = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 255, (pages, layout.nbytes + 48), dtype=torch.uint8, generator=draw).to(DEVICE)
    views = layout.views(memory)
    if not packed:
        views = {name: x.clone() for name, x in views.items()}
    for name, x in views.items():
        x[list(PAGES)] = named(state)[name]
    return memory, AttentionState(**views)


def taken(pool, pages):
    return {f"state.{name}": x[pages].clone() for name, x in named(pool).items()}


@torch.no_grad()
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_on_the_states_alone_bit_for_bit(kind, impl):
    """A row of nobody among them gives 0 and leaves nothing, whatever its token is."""
    case, more, state = made(kind, torch.float16 if kind == "places per head" else torch.float32)
    step = case.part(slice(None), slice(10, 11))
    alone = AttentionState(**{name: x[[0, 0, 2]] for name, x in named(state).items()})
    wanted = call(step, "recurrent", alone, impl=impl, **more)
    for packed in (True, False) if kind == "key gate" else (True,):
        memory, pool = pool_of(state, packed)
        before = {name: as_bytes(x) for name, x in named(pool).items()}
        ends = memory.clone()
        indices = torch.tensor([PAGES[0], -1, PAGES[2]], dtype=torch.int32, device=DEVICE)
        found = call(step, "recurrent", pool, impl=impl, state_indices=indices, **more)
        assert torch.equal(found["o"][[0, 2]], wanted["o"][[0, 2]])
        assert not found["o"][1].any() and wanted["o"][1].any()
        for name, x in taken(pool, [PAGES[0], PAGES[2]]).items():
            assert torch.equal(x, wanted[name][[0, 2]].to(x.dtype)), name
        others = [page for page in range(8) if page not in (PAGES[0], PAGES[2])]
        for name, x in named(pool).items():
            assert torch.equal(as_bytes(x)[others], before[name][others]), name
        assert torch.equal(memory[others], ends[others]) and torch.equal(memory[:, -48:], ends[:, -48:])


@torch.no_grad()
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_step_of_nobody_touches_nothing(impl):
    case, more, state = made("kept keys")
    step = case.part(slice(0, 1), slice(10, 11)).map(lambda name, x: x * torch.nan if name in "qkv" else x)
    memory, pool = pool_of(state)
    before, indices = memory.clone(), torch.tensor([-1], device=DEVICE)
    o = call(step, "recurrent", pool, impl=impl, state_indices=indices, **more)["o"]
    assert not o.any() and torch.equal(memory, before)


def as_bytes(x):
    """[P, bytes]."""
    return x.contiguous().view(len(x), -1).view(torch.uint8).clone()


@torch.no_grad()
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_go_on_in_their_pages_as_the_reference_has_it(kind, form):
    """One begins in a page of anything; the reference takes each alone, from its page and back."""
    case, more, state = made(kind, torch.float64)
    indices = torch.tensor([PAGES[0], -1, 3], device=DEVICE)
    has = torch.tensor([True, True, form == "recurrent"], device=DEVICE)
    given = {"state_indices": indices} | ({"has_state": has} if form == "chunk" else {})
    piece = case.part(slice(None), slice(2, 7))
    pools, outputs = [], []
    for impl in ("naive", "torch"):
        memory, pool = pool_of(state)
        if form == "recurrent":
            for name, x in named(pool).items():
                x[3] = named(state)[name][2]
        outputs.append(call(piece, form, pool, impl=impl, **given, **more)["o"])
        pools.append(taken(pool, [PAGES[0], 3]) | {"others": memory[[1, 2, 5, 6]]})
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert not outputs[1][1].any() and outputs[1][0].any()
    ordered = [in_places(pool) for pool in pools]
    for name, x in ordered[0].items():
        torch.testing.assert_close(ordered[1][name], x, rtol=1e-9, atol=1e-9, msg=name)
    assert ordered[0]["state.position"].tolist() == [15, 5 if form == "chunk" else 15]


def in_places(fields, places=(3, 1)):
    """Kept keys in the order of their positions, which a step leaves in any; places of each head, where they differ."""
    held = fields.get("state.kept_positions")
    if held is None:
        return fields
    listed = held.ndim == 2
    order = torch.where(held < 0, 2**62, held)
    heads = order.split(places, 1) if listed else [order]
    order = torch.cat([part.argsort(dim=1, stable=True) for part in heads], 1)
    if listed:
        order[:, places[0] :] += places[0]
    for name in [name for name in fields if name.startswith("state.kept_")]:
        x = fields[name]
        index = order if listed else order.repeat_interleave(x.shape[2] // order.shape[2], 2)
        fields[name] = x.gather(1, index.view(*index.shape, *[1] * (x.ndim - index.ndim)).expand_as(x))
    return fields


@torch.no_grad()
def test_packed_sequences_have_pages_too():
    case, more, state = made("kept keys", torch.float64)
    tokens = case.part(slice(0, 1), slice(0, 9))
    ends = torch.tensor([0, 4, 4, 6, 9], device=DEVICE)
    given = dict(state_indices=torch.tensor([0, 6, -1, 4], device=DEVICE), cu_seqlens=ends)
    given["has_state"] = torch.tensor([True, True, True, False], device=DEVICE)
    found, memories = [], []
    for impl in ("naive", "torch"):
        memory, pool = pool_of(state)
        found.append(call(tokens, "chunk", pool, impl=impl, **given, **more)["o"])
        memories.append(in_places(taken(pool, [0, 6, 4])))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert not found[1][0, 4:6].any()
    for name, x in memories[0].items():
        torch.testing.assert_close(memories[1][name], x, rtol=1e-9, atol=1e-9, msg=name)


@torch.no_grad()
def test_steps_of_one_shape_are_checked_once_and_their_values_each_time():
    case, more, state = made("key gate")
    step = case.part(slice(None), slice(10, 11))
    memory, pool = pool_of(state)
    indices = torch.tensor(PAGES, device=DEVICE)
    for wrong, match in (
        (torch.tensor([4, 0, 8]), "-1 or pages of the 8"),
        (torch.tensor([4, 0, 4]), "no page twice"),
        (torch.tensor([4, 0, -2]), "-1 or pages"),
        (torch.tensor([4.0, 0, 6]), r"an int32 or int64 tensor \[3\]"),
        (torch.tensor([4, 0]), r"an int32 or int64 tensor \[3\]"),
    ):
        call(step, "recurrent", pool, impl="torch", state_indices=indices)
        with checked(), pytest.raises(ValueError, match=f"state_indices: got .*{match}"):
            call(step, "recurrent", pool, impl="torch", state_indices=wrong.to(DEVICE))
    pool.position[4] = -3
    with checked(), pytest.raises(ValueError, match="initial_state.position: got -3"):
        call(step, "recurrent", pool, impl="torch", state_indices=indices)
    call(step, "recurrent", pool, impl="torch", state_indices=torch.tensor([1, 0, 6], device=DEVICE))


def test_what_does_not_fit_is_refused():
    case, more, state = made("key gate")
    step = case.part(slice(None), slice(10, 11))
    memory, pool = pool_of(state)
    indices = torch.tensor(PAGES, device=DEVICE)
    with pytest.raises(ValueError, match="has_state: got .* without state_indices"):
        call(step, "chunk", None, impl="torch", has_state=torch.ones(3, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"has_state: got .*a bool tensor \[3\]"):
        call(step, "chunk", pool, impl="torch", state_indices=indices, has_state=indices)
    with pytest.raises(ValueError, match="initial_state: got None, wanted a pool"):
        call(step, "recurrent", None, impl="torch", state_indices=indices)
    odd = pool._replace(s=pool.s.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match="initial_state.s: got 'strides .* rows that lie together"):
        call(step, "recurrent", odd, impl="torch", state_indices=indices)
    apart = pool._replace(s=pool.s.clone())
    with pytest.raises(ValueError, match="initial_state: got .* fields of one pool"):
        call(step, "recurrent", apart, impl="torch", state_indices=indices)
    learning = step.map(lambda name, x: x.clone().requires_grad_(name == "q"))
    with pytest.raises(ValueError, match="state_indices: got .* where gradients are recorded"):
        call(learning, "recurrent", pool, impl="torch", state_indices=indices)


def test_a_layout_is_packed_and_its_pages_are_blank():
    _, _, state = made("kept keys")
    blank = {name: x[:1].cpu() for name, x in named(state).items()}
    layout = PageLayout(blank)
    spans = sorted((f.start, f.start + f.nbytes) for f in layout.fields.values())
    assert all(start % 16 == 0 for start, _ in spans)
    after = [start for start, _ in spans[1:]] + [layout.nbytes]
    assert all(0 <= begin - end < 16 for (_, end), begin in zip(spans, after, strict=True))
    pages = layout.views(layout.pages(3))
    for name, x in pages.items():
        assert x.dtype == blank[name].dtype and torch.equal(x, blank[name].expand_as(x))


def test_rows_of_nobody_copy_somebody():
    rows = PoolRows.of(torch.tensor([-1, 5, -1, 3]))
    assert rows.page.tolist() == [5, 5, 5, 3] and rows.row.tolist() == [1, 1, 1, 3]
    assert PoolRows.of(torch.tensor([2, 0])).row is None
