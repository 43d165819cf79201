"""A layer over a pool of pages: many texts in mixed batches, each as it is alone. Without vLLM."""

import ast
import random
from pathlib import Path

import pytest
import torch
from tiny import student

import lizard_vllm
from benchmarks.gpu.no_launch import without_kernels
from lizard_layers import PagedState, page_layout, state_of
from lizard_models.model.families import FAMILIES, load_family
from lizard_models.model.positions import anchor_blocks, packed_anchor_blocks
from lizard_models.model.step_recorder import Uncapturable
from lizard_vllm.names import ARCHITECTURES
from lizard_vllm.pages import Moves, Steps, read_batch

KINDS = {
    "plain": {},
    "paper": dict(preset="paper"),
    "liger": dict(preset="liger"),
    "window": dict(preset="window_only"),
    "channel gate": dict(attention=dict(gate="channel")),
    "softcap": dict(family="gemma2", layer_types=["full_attention"]),
    "kept keys": dict(attention=dict(kept_keys=4, score_dim=8)),
    "left, places of each head": dict(attention=dict(kept_keys=[3, 1], score_dim=8, coverage="left")),
    "received": dict(attention=dict(kept_keys=4, score_dim=8, score_received=True, score_stride=4)),
}
LENGTHS = (1, 5, 23, 40, 17)


class Pool:
    """A layer with random inputs for some texts, and pages full of what other texts left."""

    def __init__(self, dtype=torch.float64, pages: int = 9, **kind) -> None:
        self.model = student(num_hidden_layers=1, **kind).to(dtype)
        (attention,) = self.model.lizard_attentions()
        self.attention, self.rotary = attention.lizard, self.model.model.rotary_emb
        self.layout = page_layout(self.attention.config, dtype)
        size = -(-self.layout.nbytes // 16) * 16 + 48  # padded, as an engine pads them
        draw = torch.Generator().manual_seed(0)
        self.pages = torch.randint(0, 255, (pages, size), dtype=torch.uint8, generator=draw)
        self.views = self.layout.views(self.pages)
        self.state = state_of(self.views)
        config = self.attention.config
        self.kind = self.model.config.layer_types[0] if len(self.rotary.kinds()) > 1 else None
        self.range = self.model.model.position_range
        self.rotary.reach(self.range)

        def texts(*shape):
            return [torch.randn(n, *shape, dtype=dtype, generator=draw) for n in LENGTHS]

        heads = [(config.num_heads, config.head_dim), *[(config.num_key_heads, config.head_dim)] * 2]
        self.texts = list(zip(texts(config.hidden_size), *(texts(*shape) for shape in heads), strict=True))

    def turns(self, x, positions):
        rope = self.rotary(x, positions[None], *([self.kind] if self.kind else []))
        return tuple(t[0] for t in rope)

    def blocks(self, positions, whole):
        return anchor_blocks(self.rotary, positions, self.range, whole)[self.kind]

    @property
    def moves(self):
        def packed(starts, lengths):
            blocks = packed_anchor_blocks(self.rotary, starts, lengths, self.range, "cpu")
            return None if blocks is None else blocks[self.kind]

        return Moves(lambda positions: self.blocks(positions, True), packed)

    def alone(self, text: int):
        """One forward over the whole text."""
        heads = [t[None] for t in self.texts[text]]
        positions = torch.arange(LENGTHS[text])
        rope = tuple(t[None] for t in self.turns(heads[0], positions))
        moved = self.blocks(positions[None], False) if self.model.model.moves_anchors else None
        return self.attention(*heads, rope, anchor_blocks=moved)[0][0]

    def run(self, seed: int, far: bool = False, padding: int = 0):
        """All texts in random pieces, in batches of decodes and prefills as an engine makes them."""
        draw = random.Random(seed)
        slots = draw.sample(range(1, len(self.pages)), len(LENGTHS))
        done, out = [0] * len(LENGTHS), [[] for _ in LENGTHS]
        while open_texts := [i for i, n in enumerate(done) if n < LENGTHS[i]]:
            chosen = draw.sample(open_texts, draw.randint(1, len(open_texts)))
            pieces = {i: draw.choice([1, 1, draw.randint(1, LENGTHS[i] - done[i])]) for i in chosen}
            decodes = [i for i in chosen if done[i] and pieces[i] == 1]
            prefills = [i for i in chosen if i not in decodes]
            order = decodes + prefills
            parts = [slice(done[i], done[i] + pieces[i]) for i in order]
            extra = 0 if prefills else padding  # rows of graph padding
            parts_of = list(zip(order, parts, strict=True))
            heads = []
            for n, like in enumerate(self.texts[0]):
                unread = torch.full((extra, *like.shape[1:]), 1e4, dtype=like.dtype)
                heads.append(torch.cat([*(self.texts[i][n][part] for i, part in parts_of), unread]))
            places = [torch.arange(part.start, part.stop) for part in parts]
            positions = torch.cat([*places, torch.zeros(extra, dtype=torch.int64)])
            lengths = [pieces[i] for i in prefills]
            steps = Steps(
                decode_slots=torch.tensor([slots[i] for i in decodes] + [-1] * extra, dtype=torch.int32),
                prefill_slots=torch.tensor([slots[i] for i in prefills], dtype=torch.int64),
                prefill_starts=torch.tensor([0, *lengths]).cumsum(0).int(),
                has_state=torch.tensor([done[i] > 0 for i in prefills], dtype=torch.bool),
                prefill_lengths=lengths,
                prefill_begins=[done[i] for i in prefills],
                far=far,
            )
            rope = self.turns(heads[0], positions)
            o = read_batch(self.attention, self.state, heads, rope, positions, steps, self.moves)
            for i, piece in zip(order, o.split([pieces[i] for i in order] + [extra] * bool(extra)), strict=False):
                out[i].append(piece)
                done[i] += pieces[i]
        return [torch.cat(pieces) for pieces in out]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches_are_each_text_alone(kind):
    pool = Pool(**KINDS[kind])
    expected = [pool.alone(i) for i in range(len(LENGTHS))]
    nobody = pool.pages[0].clone()
    for seed in range(3):  # pages hold the run before
        for found, wanted in zip(pool.run(seed, padding=2 * (seed > 0)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(pool.pages[0], nobody)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 4, [3, 1]])
def test_anchors_move_on_in_mixed_batches(kept):
    keys = dict(kept_keys=kept, score_dim=8, coverage="left") if kept else {}
    choices = dict(positions="clamped", position_limit=14, position_step=4, **keys)
    pool = Pool(attention=choices)
    moved, plain = pool.run(0, far=True), pool.run(1, far=False)
    for i, found in enumerate(moved):
        torch.testing.assert_close(found, pool.alone(i), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(plain[i][:14], found[:14], rtol=1e-9, atol=1e-9)
    assert (plain[3] - moved[3]).abs().max() > 1e-3  # the case is one


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "dynamic RoPE"])
def test_a_graph_can_hold_a_step_of_decodes(kind):
    """On the way of the kernels, with rows of padding: nothing waits for the device, whose values Python would fix."""
    rescaled = dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4))
    pool = Pool(torch.float32, **KINDS.get(kind, rescaled))
    heads = [torch.cat([t[:1] for t in tensors]) for tensors in zip(*pool.texts, strict=True)]
    none, positions = torch.zeros(0, dtype=torch.int64), torch.full((len(LENGTHS),), 9)
    slots = torch.tensor([3, 1, 4, -1, -1], dtype=torch.int32)
    for far in (False, True):
        with without_kernels() as launches, Uncapturable() as looking:
            rope = pool.turns(heads[0], positions)
            steps = Steps(slots, none, none.new_zeros(1), none.bool(), [], [], far)
            read_batch(pool.attention, pool.state, heads, rope, positions, steps, pool.moves)
        assert looking.found is None and launches.count() > 0


@torch.no_grad()
def test_half_precision_keeps_its_sums_in_float32():
    pool = Pool(torch.bfloat16)
    assert pool.views["s"].dtype == torch.float32 and pool.views["ring_k"].dtype == torch.bfloat16
    exact = Pool(torch.float64)
    exact.texts = [tuple(t.double() for t in text) for text in pool.texts]
    naive = [pool.alone(i) for i in range(len(LENGTHS))]
    for i, found in enumerate(pool.run(0)):
        wanted = exact.alone(i)
        assert (found - wanted).abs().max() <= 2 * (naive[i] - wanted).abs().max() + 1e-3


@torch.no_grad()
def test_no_other_page_is_written_to():
    pool = Pool()
    before = pool.pages.clone()
    heads = [t[:3] for t in pool.texts[3]]
    none = torch.zeros(0, dtype=torch.int64)
    steps = Steps(none, torch.tensor([4]), torch.tensor([0, 3]), torch.tensor([False]), [3], [0])
    positions = torch.arange(3)
    rope = pool.turns(heads[0], positions)
    read_batch(pool.attention, pool.state, heads, rope, positions, steps)
    others = [i for i in range(len(before)) if i != 4]
    assert torch.equal(pool.pages[others], before[others])
    assert torch.equal(pool.pages[4, pool.layout.nbytes :], before[4, pool.layout.nbytes :])
    assert int(pool.views["position"][4]) == 3


def test_pages_are_not_written_to_where_gradients_are_recorded():
    pool = Pool()
    before = pool.pages.clone()
    x, q, k, v = (t[None, :1] for t in pool.texts[3])
    rope = tuple(t[None] for t in pool.turns(x[0], torch.arange(1)))
    state = PagedState(pool.state, torch.tensor([2]))
    with pytest.raises(ValueError, match="state: got pages, .* gradients are recorded"):
        pool.attention(x.requires_grad_(), q, k, v, rope, state, True)
    assert torch.equal(pool.pages, before)


def test_the_plugin_names_every_family():
    assert {load_family(family).__name__ for family in FAMILIES} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["__init__", "names", "pages"])
def test_these_import_no_engine(name):
    """What vLLM reads of a plugin before it forks, and what is tested without it."""
    tree = ast.parse((Path(lizard_vllm.__file__).parent / f"{name}.py").read_text())
    imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in imported if module.split(".")[0] == "vllm"]


def test_pages_that_do_not_fit_are_refused():
    layout = Pool().layout
    size = -(-layout.nbytes // 16) * 16
    with pytest.raises(ValueError, match=f"{layout.nbytes} or more"):
        layout.views(torch.zeros(2, layout.nbytes - 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="wanted uint8"):
        layout.views(torch.zeros(2, size, dtype=torch.int8))
    with pytest.raises(ValueError, match="wanted a multiple of 16"):
        layout.views(torch.zeros(2, size + 8, dtype=torch.uint8))
