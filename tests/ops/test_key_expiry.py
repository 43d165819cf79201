"""Until when keys stay exact: the definition against the stream that it describes, the fast forms against it."""

from __future__ import annotations

import heapq
import importlib

import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import DEVICE
from op_checks import examples
from torch._subclasses.fake_tensor import FakeTensorMode

from lizard_ops import NEVER, ExpiryState, key_expiry, naive_key_expiry

FAST = ("torch", "triton")
KINDS = ("ties", "random", "rising", "falling", "constant", "infinite")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few keys, so that short sequences meet every boundary."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.key_expiry.chunk_torch"), "TILE", 4)
    monkeypatch.setattr(importlib.import_module("lizard_ops.key_expiry.triton.op"), "LEAST_BLOCK", 8)


def scores_of(kind, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    rising = torch.arange(shape[1], dtype=torch.float32).view(1, -1, 1)
    return {
        "random": x,
        "ties": x.round() * torch.where(x > 1, 1.0, 0.0),  # -0 among the zeros
        "rising": (rising - 7).expand(shape),
        "falling": (7 - rising).expand(shape),
        "constant": torch.full(shape, -2.5),
        "infinite": torch.where(x > 1, torch.inf, torch.where(x < 0, -torch.inf, x.round())),
    }[kind]


def streamed(scores, window, anchors, places):
    """The rule as a stream follows it: one query after the other, and no limit to how many come after the last key."""
    expiry, kept = [NEVER] * len(scores), []
    for query in range(window + anchors, window + len(scores)):
        heapq.heappush(kept, (scores[query - window], window - query, query - window))
        if len(kept) > places:
            expiry[heapq.heappop(kept)[2]] = query
    return expiry


@st.composite
def calls(draw, lengths=(19, 23, 8, 5, 2, 1, 0)):
    """(scores [B, T, Hk], window, anchors, kept_keys)."""
    shape = draw(st.sampled_from((2, 1))), draw(st.sampled_from(lengths)), draw(st.sampled_from((2, 1)))
    scores = scores_of(draw(st.sampled_from(KINDS)), *shape, seed=draw(st.integers(0, 99)))
    options = [draw(st.sampled_from(x)) for x in ((3, 1, 8), (2, 0, 9), (5, 1, 2, 8, 0, 30))]
    return scores.to(DEVICE), *options


def same(found, wanted):
    """Two results, or states, or fields, bit for bit."""
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    elif wanted is None:
        assert found is None
    else:
        for a, b in zip(found, wanted, strict=True):
            same(a, b)


def test_the_definition_is_the_stream():
    @examples(60, calls())
    def check(call):
        scores, *options = call
        expiry = naive_key_expiry(scores.double(), *options).expiry
        assert expiry.dtype == torch.int64 and expiry.shape == scores.shape
        for b in range(scores.shape[0]):
            for h in range(scores.shape[2]):
                assert expiry[b, :, h].tolist() == streamed(scores[b, :, h].tolist(), *options)


def test_packed_and_padded_rows_are_separate_sequences():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]], device=DEVICE).bool()

    @examples(15, calls(lengths=(9,)))
    def check(call):
        scores, *options = call
        scores, more = scores[:1].expand(2, -1, -1), {"output_final_state": True}
        given = scores.masked_fill(~mask.unsqueeze(-1), torch.nan)
        padded = naive_key_expiry(given, *options, padding_mask=mask, **more)
        assert (padded.expiry[~mask] == NEVER).all()
        for row in range(2):
            alone = naive_key_expiry(scores[row : row + 1, mask[row]], *options, **more)
            same(padded.expiry[row : row + 1, mask[row]], alone.expiry)
            same([x[row : row + 1] for x in padded.state], alone.state)
        packed = naive_key_expiry(scores[:1], *options, cu_seqlens=torch.tensor([0, 4, 4, 9], device=DEVICE), **more)
        for n, piece in enumerate((slice(0, 4), slice(4, 4), slice(4, 9))):
            alone = naive_key_expiry(scores[:1, piece], *options, **more)
            same(packed.expiry[:, piece], alone.expiry)
            same([x[n : n + 1] for x in packed.state], alone.state)


@pytest.mark.parametrize("impl", FAST)
def test_fast_forms_are_the_definition(impl, small_tiles):
    """Rows of every kind, with a state and without, and whichever way round its places stand."""
    rows, flags = st.sampled_from(("padded", "packed", "plain")), st.booleans()

    @examples(40 if impl == "torch" or DEVICE == "cuda" else 7, calls(), rows, flags, flags, st.integers(0, 9))
    def check(call, kind, carried, final, seed):
        scores, *options = call
        generator, more = torch.Generator().manual_seed(seed), {"output_final_state": final}
        n = scores.shape[0]
        if kind == "padded":
            mask = torch.rand(*scores.shape[:2], generator=generator).to(DEVICE) > 0.3
            scores = scores.masked_fill(~mask.unsqueeze(-1), torch.nan)
            more["padding_mask"] = mask
        elif kind == "packed":
            scores, length = scores[:1], scores.shape[1]
            cuts = torch.randint(length + 1, (3,), generator=generator).sort()[0].tolist()
            more["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32, device=DEVICE)
            n = 4
        if carried:
            past = scores_of("ties", n, 11, scores.shape[2], seed=seed).to(DEVICE)
            lengths = torch.randint(12, (n, 1), generator=generator).to(DEVICE)
            mask = torch.arange(11, device=DEVICE) < lengths
            state = naive_key_expiry(past, *options, padding_mask=mask, output_final_state=True).state
            around = [x.roll(seed, 1) for x in (state.kept_scores, state.kept_positions)]
            more["initial_state"] = ExpiryState(state.position, *around, state.ring_scores)
        same(key_expiry(scores, *options, impl=impl, **more), key_expiry(scores, *options, impl="naive", **more))


def in_segments(scores, options, cuts, impl):
    """(expiry [B, T, Hk], the last state) of one call after the other: each says it of its keys and its state's."""
    batch, length, heads = scores.shape
    whole, state = torch.full((batch, length, heads), NEVER, device=DEVICE), None
    for a, b in zip([0, *cuts], [*cuts, length], strict=True):
        found = key_expiry(scores[:, a:b], *options, initial_state=state, output_final_state=True, impl=impl)
        if state is not None:
            slot = torch.arange(options[0], device=DEVICE)
            ring = a - 1 - (a - 1 - slot) % options[0]  # the position that each slot of the ring holds
            held = torch.cat([state.kept_positions, ring.view(1, -1, 1).expand(batch, -1, heads)], 1)
            assert (found.carried[held < 0] == NEVER).all()
            row, place, head = (held >= 0).nonzero(as_tuple=True)
            at = row, held[row, place, head], head
            was, now = whole[at], found.carried[row, place, head]
            assert (now[was < NEVER] == was[was < NEVER]).all()  # what was decided stays
            assert ((now >= a) | (held[row, place, head] < options[1])).all()  # no query of the past learns of it now
            whole[at] = now
        whole[:, a:b] = found.expiry
        state = found.state
    return whole, state


@pytest.mark.parametrize("impl", ("naive", *FAST))
def test_segments_and_single_tokens_are_the_whole(impl, small_tiles):
    interpreted = impl == "triton" and DEVICE == "cpu"
    cuts = st.just(range(1, 19)) | st.lists(st.integers(0, 19), max_size=4)
    drawn = (calls(lengths=(9,)), st.just([1, 2, 6])) if interpreted else (calls(lengths=(19, 9)), cuts)

    @examples(2 if interpreted else 25, *drawn)
    def check(call, cuts):
        scores, *options = call
        cuts = sorted(min(c, scores.shape[1]) for c in cuts)
        whole = naive_key_expiry(scores, *options, output_final_state=True)
        same(in_segments(scores, options, cuts, impl), whole[:2])


@pytest.mark.parametrize("impl", ("naive", *FAST))
def test_what_the_rule_makes_of_known_scores(impl):
    window, anchors, places, at = 3, 2, 4, torch.arange(20, device=DEVICE)

    def expiry(kind, places=places):
        return key_expiry(scores_of(kind, 1, 20, 1).to(DEVICE), window, anchors, places, impl=impl).expiry.flatten()

    left = at.clone()
    left[:anchors] = NEVER
    newest = torch.where(at + places < 20, left + places + window, NEVER)  # those with enough newer keys
    same(expiry("rising"), torch.where(at < anchors, NEVER, newest))  # a wider window
    first = torch.where(at < anchors + places, NEVER, left + window)  # wide anchors
    same(expiry("falling"), first)
    same(expiry("constant"), first)
    same(expiry("random", 0), torch.where(at < anchors, NEVER, left + window))
    same(expiry("random", 18), torch.full_like(at, NEVER))


@pytest.mark.parametrize("impl", FAST)
def test_places_are_never_exceeded_and_one_key_expires_at_a_query(impl, small_tiles):
    scores, window, anchors, places = scores_of("ties", 2, 40, 2, seed=3).to(DEVICE), 4, 1, 5
    expiry = key_expiry(scores, window, anchors, places, impl=impl).expiry
    j, query = torch.arange(40, device=DEVICE).view(-1, 1, 1, 1), torch.arange(44, device=DEVICE)
    e = expiry.movedim(1, 0).unsqueeze(-1)
    alive = ((j >= anchors) & (query >= j + window) & (query < e)).sum(0)
    assert (alive == (query - window - anchors + 1).clamp(0, places)).all()
    assert ((e == query).sum(0) == (query >= window + anchors + places)).all()


@pytest.mark.parametrize("impl", FAST)
def test_tiles_of_their_own_size(impl):
    length, places = (20_000, 200) if impl == "torch" else (2**20, 256) if DEVICE == "cuda" else (300, 70)
    scores = scores_of("random", 1, length, 1, seed=5)
    found = key_expiry(scores.to(DEVICE), 128, 4, places, impl=impl).expiry
    assert found.flatten().tolist() == streamed(scores.flatten().tolist(), 128, 4, places)


@pytest.mark.parametrize("places", [2048, 4096])
def test_heads_that_keep_thousands(places):
    """Beside one that keeps few: blocks as long as the most places, and as many warps."""
    if DEVICE == "cpu" and places > 2048:
        pytest.skip("takes a minute in the interpreter")
    length = 5 * places // 4 if DEVICE == "cpu" else 3 * places
    scores = scores_of("random", 1, length, 2, seed=7)
    found = key_expiry(scores.to(DEVICE), 128, 4, (places, 16), impl="triton").expiry.cpu()
    for head, kept in enumerate((places, 16)):
        assert found[0, :, head].tolist() == streamed(scores[0, :, head].tolist(), 128, 4, kept)


def test_a_million_positions_take_as_many_launches_as_a_few(monkeypatch):
    """Five, and no loop on the host: the kernels are not run."""
    module, launched = importlib.import_module("lizard_ops.key_expiry.triton.op"), []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, grid))

    for name in [name for name in vars(module) if name.endswith("_kernel") and name != "launch_kernel"]:
        monkeypatch.setattr(module, name, Recorded(name))

    def launches(length):
        launched.clear()
        module.fresh(torch.zeros(1, length, 1, device=DEVICE), None, 128, 4, 256)
        return dict(launched)

    few, many = launches(300), launches(2**20)
    assert len(launched) == len(many) == 5 and list(few) == list(many)
    assert many["scan_kernel"] == (1,) and many["displaced_kernel"] == (2**20 // 256 * 2,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ("naive", *FAST))
def test_scores_are_compared_as_float32_and_have_no_gradient(impl, dtype):
    scores = scores_of("random", 1, 20, 2).to(DEVICE, dtype).requires_grad_()
    found = key_expiry(scores, 3, 1, 4, impl=impl, output_final_state=True)
    same(found, key_expiry(scores.detach().float(), 3, 1, 4, impl=impl, output_final_state=True))
    assert not any(x.requires_grad for x in found.state)
    near = torch.tensor([1.0, 1.0 + 1e-12, 0.0], device=DEVICE, dtype=torch.float64).view(1, -1, 1)
    assert key_expiry(near, 1, 0, 1, impl=impl).expiry.flatten().tolist() == [NEVER, 2, 3]


def test_registered_as_torch_wants_them():
    from lizard_ops.key_expiry.chunk_torch import displaced as tiles
    from lizard_ops.key_expiry.stream import LOWEST, ranks_of
    from lizard_ops.key_expiry.triton.op import displaced as kernels
    from lizard_ops.key_expiry.triton.op import fresh

    ranks = ranks_of(scores_of("ties", 2, 9, 2).to(DEVICE), torch.arange(3, 12, device=DEVICE).view(1, -1, 1))
    kept, ends = torch.full((2, 3, 2), LOWEST, device=DEVICE), torch.tensor([0, 4, 18], device=DEVICE)
    torch.library.opcheck(tiles, (kept, ranks, 4))
    flat, judged = ranks.flatten(0, 1).T, torch.tensor([2, 7], device=DEVICE)
    torch.library.opcheck(kernels, (kept.transpose(1, 2), flat, ends, judged))
    for lengths in (None, torch.tensor([4, 9], device=DEVICE)):
        for each in (None, (4, 0)):
            torch.library.opcheck(fresh, (scores_of("ties", 2, 9, 2).to(DEVICE), lengths, 3, 1, 4, each))


@pytest.mark.parametrize("impl", FAST)
def test_compiles_to_one_graph(impl):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def run(scores, mask, state):
        options = {"initial_state": state, "output_final_state": True, "impl": impl}
        return key_expiry(scores, 3, 1, 4, padding_mask=mask, **options)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    sizes = ((2, 5), (3, 7))[: 1 if impl == "triton" else 2]  # the second with sizes that are not known
    for batch, length in sizes:
        scores = scores_of("ties", batch, length, 1).to(DEVICE)
        mask = torch.arange(length, device=DEVICE) >= torch.arange(batch, device=DEVICE).unsqueeze(1)
        state = naive_key_expiry(scores, 3, 1, 4, output_final_state=True).state
        same(compiled(scores, mask, state), run(scores, mask, state))
    assert len(graphs) == len(sizes)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("impl", FAST)
def test_shapes_without_values(impl, kind, monkeypatch):
    def run(device):
        scores, mask = torch.zeros(2, 9, 3, device=device), torch.ones(2, 9, dtype=torch.bool, device=device)
        first = key_expiry(scores, 3, 1, 4, padding_mask=mask, output_final_state=True, impl=impl)
        return first, key_expiry(scores, 3, 1, 4, initial_state=first.state, impl=impl)

    wanted = run(DEVICE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for meta tensors alone: kernels that a GPU compiles would be others
    if kind == "meta":
        found = run("meta")
    else:
        with FakeTensorMode():
            found = run(DEVICE)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (found, wanted)), strict=True):
        assert a is b is None or (a.shape == b.shape and a.dtype == b.dtype)


STATE = naive_key_expiry(torch.zeros(2, 9, 2), 3, 1, 4, output_final_state=True).state
BAD = [
    ({"scores": torch.zeros(2, 6)}, "scores: got shape"),
    ({"scores": torch.zeros(2, 6, 2, dtype=torch.int64)}, "scores: got shape"),
    ({"scores": [[1.0]]}, "scores: got"),
    ({"scores": torch.zeros(2, 6, 0)}, "scores: got shape"),
    ({"scores": torch.full((2, 6, 2), torch.nan)}, "scores: got 24"),
    ({"window": 0}, "window: got 0"),
    ({"anchors": -1}, "anchors: got -1"),
    ({"kept_keys": -1}, "kept_keys: got -1"),
    ({"kept_keys": 2.0}, "kept_keys: got 2.0"),
    ({"padding_mask": torch.ones(2, 6)}, "padding_mask: got"),
    ({"cu_seqlens": torch.tensor([0, 6])}, "scores: got shape"),
    ({"scores": torch.zeros(1, 6, 2), "cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens: got [0, 7]"),
    ({"output_final_state": 1}, "output_final_state: got 1"),
    ({"initial_state": tuple(STATE)}, "initial_state: got 'tuple'"),
    ({"initial_state": STATE._replace(position=STATE.position.int())}, "initial_state.position: got"),
    ({"initial_state": STATE._replace(position=STATE.position - 99)}, "initial_state.position: got -90"),
    ({"initial_state": STATE, "kept_keys": 5}, "initial_state.kept_scores: got"),
    ({"initial_state": STATE, "window": 4}, "initial_state.ring_scores: got"),
    ({"initial_state": STATE._replace(kept_positions=STATE.kept_positions + 4)}, "initial_state.kept_positions: got"),
    ({"impl": "fast"}, "impl: got 'fast'"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused_by_name(changes, message):
    given = {"scores": torch.zeros(2, 6, 2), "window": 3, "anchors": 1, "kept_keys": 4} | changes
    for op in (key_expiry, naive_key_expiry) if "impl" not in changes else (key_expiry,):
        with pytest.raises(ValueError) as error:
            op(**given)
        assert str(error.value).startswith(message)
