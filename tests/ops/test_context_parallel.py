"""A sequence over several ranks is the sequence on one: outputs, the state at its end, and every gradient.

Ranks are threads here (``rank_threads.py``), so that parts of any lengths can be drawn; ``test_context_ranks.py`` has
processes.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from op_cases import GATES, call, cases, state_in
from op_checks import examples, judge, one_of, with_gradients
from target_cases import drawn, joined, there
from test_kept_state import in_order, scored_cases, small_chunks  # noqa: F401  a fixture of every test here
from test_places_in_states import in_order as by_place
from test_places_in_states import uneven_cases
from test_regressions import NoReadBack

import lizard_ops
from lizard_ops.context_parallel import sums
from tests.rank_threads import on_ranks, threads_as_ranks

OPS = pytest.mark.parametrize("op", ["gated", "window", "hybrid"])
CUTS = st.just([2, 9, 16]) | st.lists(st.integers(1, 28), max_size=3, unique=True)


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    threads_as_ranks(monkeypatch)
    monkeypatch.setattr(sums, "NUMBERS", 64)  # so that parts have several blocks


def over_parts(case, cuts, mask=None, **more):
    """The case on a rank for each piece between the cuts, as one call of the whole."""
    ends = [0, *sorted(c for c in cuts if c < case.length), case.length]
    pieces = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def run(rank, group):
        part = {} if mask is None else {"padding_mask": mask[:, pieces[rank]]}
        return call(case.part(slice(None), pieces[rank]), "chunk", context_group=group, **part, **more)

    parts = on_ranks(len(pieces), run)
    return one_scale(joined(parts, parts[-1]))


def one_scale(outputs):
    """Sums as they are, for a log scale may be any."""
    outputs = dict(outputs)
    log_scale = outputs.pop("state.log_scale", None)
    for name, axes in (("state.s", 2), ("state.z", 1)):
        if log_scale is not None and name in outputs:
            outputs[name] = outputs[name] * log_scale.exp().view(*log_scale.shape, *[1] * axes)
    return outputs


def alone(case, **more):
    return one_scale(call(case, "naive", **more))


def test_parts_are_the_whole(op, target):
    """On a GPU through the kernels."""
    lengths = {} if target.form else {"lengths": (23, 17, 16, 13, 9, 8, 7, 5, 3, 2, 1)}

    @examples(target.count(10), drawn(op, target, **lengths), CUTS)
    def check(case, cuts):
        run = partial(over_parts, cuts=cuts, impl=target.impl)
        judge(with_gradients(run, there(case, target)), case, target.dtype, alone)


@pytest.mark.parametrize(
    ("coverage", "gate"), [*(("outside", gate) for gate in GATES), ("left", "key"), ("left", "query"), ("all", "key")]
)
def test_kept_keys_are_those_of_the_whole(coverage, gate):
    """Scores with ties and infinities, known late or not."""

    @examples(2, scored_cases(coverage=coverage, gate=gate, lengths=(29, 17, 9, 5, 1)), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        found = with_gradients(lambda c: in_order(over_parts(c, cuts, **more)), case)
        judge(found, case, torch.float64, lambda c: in_order(alone(c, **more)))


def test_heads_have_places_of_their_own():
    @examples(2, uneven_cases(coverage="outside", lengths=(29, 17, 9)), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        found = with_gradients(lambda c: by_place(over_parts(c, cuts, **more), more["kept_keys"]), case)
        judge(found, case, torch.float64, lambda c: by_place(alone(c, **more), more["kept_keys"]))


@OPS
def test_padding_is_not_there(op):
    """Anywhere, and of parts that are nothing else."""

    @examples(3, cases(op, B=2, lengths=(23, 17, 9)), CUTS, st.integers(0, 9))
    def check(case, cuts, seed):
        mask = torch.rand(2, case.length, generator=torch.Generator().manual_seed(seed)) > 0.4
        mask[:, 2:5] = False

        def padded(c):
            c = c.map(lambda _, x: x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - 2)), torch.nan))
            return over_parts(c, cuts, mask)

        judge(with_gradients(padded, case), case, torch.float64, lambda c: alone(c, padding_mask=mask))


@pytest.mark.parametrize("kept", [False, True])
def test_resets_and_strong_decays(kept):
    """Gates of -inf and of e^-300 a step: nothing is lost that one rank has, and nothing comes back."""
    fixed = {"coverage": "outside", "lengths": (29, 17), "decay": 0.5}

    @examples(5, st.sampled_from(("key", "query", "channel")).flatmap(lambda g: scored_cases(**fixed, gate=g)), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        if not kept:
            case.tokens.pop("scores")
            more = {}
        generator = torch.Generator().manual_seed(case.length)
        chance = torch.rand(case.tokens["g"].shape, generator=generator)
        g = torch.where(chance < 0.1, -300.0, case.tokens["g"])
        case.tokens["g"] = torch.where(chance > 0.9, -torch.inf, g)
        order = in_order if kept else dict
        found = order(over_parts(case, cuts, **more))
        judge(found, case, torch.float64, lambda c: order(alone(c, **more)))


def test_later_ranks_change_nothing():
    """Not even with NaN in all that they hold, nor do earlier outputs' gradients reach them."""
    case, more = one_of(scored_cases(coverage="outside", gate="key", lengths=(29,)))
    bad = case.map(lambda name, x: torch.cat([x[:, :16], x[:, 16:] * (1 if name in ("scores", "g") else torch.nan)], 1))
    whole, spoiled = (over_parts(c, [2, 9, 16], **more)["o"] for c in (case, bad))
    assert torch.equal(whole[:, :16], spoiled[:, :16]) and spoiled[:, 16:].isnan().all()


def test_sums_take_what_their_log_scale_loses():
    """A float32 of about 1000 is known to 3e-5, which would be the error of all that is carried."""
    log_scale = torch.tensor([[1000.00003, -torch.inf, -3.0e4 + 1e-3]], dtype=torch.float64)
    sums_, exact = torch.tensor([[[[2.0]], [[0.0]], [[5.0]]]]), torch.tensor([[[[2.0]], [[0.0]], [[5.0]]]]).double()
    s, rounded = sums.PartSums(sums_, log_scale).rounded()
    assert s.dtype == rounded.dtype == torch.float32 and rounded[0, 1] == -torch.inf
    lost = (rounded.double() - log_scale).nan_to_num(0.0)
    torch.testing.assert_close(s.double() * lost.exp()[..., None, None], exact, rtol=2e-7, atol=0)


def test_nothing_is_read_back(monkeypatch):
    """Nor where the parts lie: no rank waits for its device."""
    monkeypatch.setattr("lizard_ops.common.checks.may_read", lambda x: False)
    case, more = one_of(scored_cases(coverage="outside", gate="key", lengths=(29,)))
    mask = torch.rand(2, 29, generator=torch.Generator().manual_seed(0)) > 0.3
    case = case.map(lambda name, x: x if name == "scores" else x.requires_grad_())

    def run(rank, group):
        here = (slice(0, 9), slice(9, 29))[rank]
        with NoReadBack():
            return call(case.part(slice(None), here), "chunk", context_group=group, padding_mask=mask[:, here], **more)

    outputs = on_ranks(2, run)
    with NoReadBack():
        sum(x["o"].sum() for x in outputs).backward()


@OPS
def test_one_rank_is_a_call_without_a_group(op):
    case = one_of(cases(op))
    whole, found = one_scale(call(case, "chunk")), over_parts(case, [])
    assert whole.keys() == found.keys()
    for name, x in whole.items():
        torch.testing.assert_close(found[name], x)


@OPS
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"state": True}, "initial_state: got 'AttentionState', wanted None with context_group"),
        ({"cu_seqlens": torch.tensor([0, 23])}, "cu_seqlens: got .*, wanted None with context_group"),
        ({"context_group": "cp"}, "context_group: got 'cp', wanted a torch.distributed ProcessGroup"),
    ],
)
def test_what_a_group_leaves_out_is_refused(op, more, message, monkeypatch):
    monkeypatch.undo()
    if "context_group" not in more:
        threads_as_ranks(monkeypatch)
    case = one_of(cases(op, B=1))
    more = dict(more)
    state = state_in(call(case, "naive")) if more.pop("state", False) else None
    with pytest.raises(ValueError, match=message):
        on_ranks(1, lambda rank, group: call(case, "chunk", state, **({"context_group": group} | more)))


def test_an_empty_part_and_expiries_are_refused():
    case = one_of(cases("hybrid"))
    empty = case.part(slice(None), slice(0, 0))
    with pytest.raises(ValueError, match="v: got shape .*, wanted at least one position on every rank"):
        on_ranks(1, lambda rank, group: call(empty, "chunk", context_group=group))
    expiry = torch.full(case.tokens["k"].shape[:3], 2**62)
    with pytest.raises(ValueError, match="expiry: got .*, wanted None with context_group"):
        on_ranks(
            1, lambda rank, group: call(case, "chunk", final=None, context_group=group, expiry=expiry, kept_keys=9)
        )


def test_rows_and_sums_of_earlier_ranks():
    """Of real tokens, by position: rings, the first of all, totals."""
    x = torch.arange(1, 21).view(2, 10, 1).double()
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    pieces = (slice(0, 1), slice(1, 6), slice(6, 10))

    def run(rank, group):
        here = pieces[rank]
        total = x[:, here].masked_fill(~mask[:, here, None], 0).sum(1)
        own = {"last": [(x[:, here], 3)], "first": [(x[:, here], 2)], "sums": [total], "padding_mask": mask[:, here]}
        return lizard_ops.earlier_tokens(context_group=group, **own)

    first, second, third = on_ranks(3, run)
    assert [x.position.tolist() for x in (first, second, third)] == [[0, 0], [0, 1], [4, 6]]
    for found in (*first.last, *first.first, *first.sums):
        assert not found.any()
    assert second.last[0].squeeze(-1).tolist() == [[0, 0, 0], [0, 0, 11]]
    assert second.there(3).tolist() == [[False] * 3, [False, False, True]]
    assert third.last[0].squeeze(-1).tolist() == [[3, 4, 5], [14, 15, 16]]
    assert third.first[0].squeeze(-1).tolist() == [[2, 3], [11, 12]]
    assert third.sums[0].tolist() == [[14], [81]]
    assert third.ring(third.last[0]).squeeze(-1).tolist() == [[5, 3, 4], [14, 15, 16]]  # by position modulo 3
    with pytest.raises(ValueError, match="at least one position on every rank"):
        on_ranks(1, lambda rank, group: lizard_ops.earlier_tokens(context_group=group, last=[(x[:, :0], 3)]))
