"""Kept keys whose heads have different numbers of places: each head by itself, and pieces of any size as one pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import strategies as st
from op_cases import GATES, HYBRID, call, cases, state_in
from op_checks import examples, judge, one_of, with_gradients
from target_cases import in_segments, rows_of
from test_kept_state import CUTS, scored, small_chunks  # noqa: F401  a fixture of every test here
from test_regressions import NoReadBack

import lizard_ops
from lizard_ops import chunk_hybrid_attn, naive_hybrid_attn, recurrent_hybrid_attn

PLACES = ((3, 0, 1), (0, 7, 2), (1, 40, 3), (0, 0, 2))
KEPT = ("kept_k", "kept_v", "kept_fk", "kept_g", "kept_scores", "kept_positions")


@st.composite
def uneven_cases(draw, lengths=(29, 17, 9, 1, 0), **fixed):
    """(case of three key heads, kept_keys and score_delay)."""
    case = draw(cases("hybrid", lengths=lengths, **({"decay": 0.5, "Hk": 3} | fixed)))
    delay = min(draw(st.sampled_from((0, 2, 1))), case.options["window"] - 1)
    case = scored(case, draw(st.integers(0, 9)))
    return case, {"kept_keys": list(draw(st.sampled_from(PLACES))), "score_delay": delay}


def in_order(outputs, places):
    """The keys of each head in the order of their positions, empty places last."""
    held = outputs["state.kept_positions"].split(list(places), 1)
    orders = [torch.where(x < 0, 2**62, x).argsort(dim=1, stable=True) for x in held]
    for name in [f"state.{name}" for name in KEPT if f"state.{name}" in outputs]:
        parts = outputs[name].split(list(places), 1)
        rows = torch.arange(len(held[0]), device=held[0].device).unsqueeze(1)
        outputs[name] = torch.cat([x[rows, order] for x, order in zip(parts, orders, strict=True)], 1)
    return outputs


def run(case, form, state=None, **more):
    return in_order(call(case, form, state, **more), more["kept_keys"])


def of_head(case, h):
    """The case with key head h and its query heads alone."""
    (hq, hk), g = (case.tokens[name].shape[2] for name in "qk"), case.tokens["g"]
    own = {hq: slice(h * hq // hk, (h + 1) * hq // hk), hk: slice(h, h + 1)}

    def part(name, x):
        if name == "g" and (g.ndim == 2 or g.shape[2] == 1):
            return x
        return x[:, :, own[hq] if name in ("q", "fq", "alpha", "merge_bias") or x.shape[2] == hq else own[hk]]

    weights = {n: x if x.ndim == 1 and n == "sinks" else x[own[hq]] for n, x in case.weights.items()}
    return dataclasses.replace(case.map(part), weights=weights)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("coverage", HYBRID["coverage"])
def test_every_head_is_a_call_of_its_own(coverage, gate):
    """A head without places is one of the op without kept keys, but for how far its sums are decayed."""

    @examples(3, uneven_cases(coverage=coverage, gate=gate, lengths=(17, 9)))
    def check(drawn):
        case, more = drawn
        places = more["kept_keys"]
        found = call(case, "naive", **more)
        first, group = 0, case.tokens["q"].shape[2] // 3
        for h, count in enumerate(places):
            alone, own = of_head(case, h), slice(first, first := first + count)
            if not count:
                alone.tokens.pop("scores")
                wanted = call(alone, "naive")
                torch.testing.assert_close(found["o"][:, :, h * group : (h + 1) * group], wanted["o"])
                continue
            wanted = call(alone, "naive", kept_keys=count, score_delay=more["score_delay"])
            torch.testing.assert_close(found["o"][:, :, h * group : (h + 1) * group], wanted["o"])
            for name in (name for name in wanted if name.removeprefix("state.") in KEPT):
                kept = found[name][:, own]
                torch.testing.assert_close(kept.reshape(wanted[name].shape), wanted[name])
            for name in (name for name in ("s", "z", "log_scale") if f"state.{name}" in wanted):
                x, of = found[f"state.{name}"], wanted[f"state.{name}"]
                torch.testing.assert_close(x[:, h * of.shape[1] : (h + 1) * of.shape[1]], of)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("coverage", HYBRID["coverage"])
@pytest.mark.parametrize("form", ["naive", "chunk", "recurrent"])
def test_pieces_are_the_whole(form, coverage, gate):
    """Outputs, and every field of the state."""
    lengths = (17, 9, 0) if form == "recurrent" else (29, 17, 9, 1, 0)

    @examples(3 if coverage == "outside" else 1, uneven_cases(coverage=coverage, gate=gate, lengths=lengths), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        pieces = in_order(
            in_segments(case, cuts, lambda part, state: call(part, form, state, **more)), more["kept_keys"]
        )
        judge(pieces, case, torch.float64, lambda c: call(c, "naive", **more))


@pytest.mark.parametrize("gate", ["key", "channel", "query"])
def test_forms_take_each_others_states(gate):
    forms = st.lists(st.sampled_from(("chunk", "recurrent", "naive")), min_size=8, max_size=8)
    kinds = uneven_cases(coverage="outside", gate=gate, lengths=(17, 9), mix="merge" if gate == "channel" else "sum")

    @examples(4, kinds, forms, CUTS)
    def check(drawn, forms, cuts):
        case, more = drawn
        case, left = case.cast(torch.float32), iter(forms)
        found = in_segments(case, cuts, lambda part, state: call(part, next(left), state, **more))
        judge(in_order(found, more["kept_keys"]), case, torch.float32, lambda c: call(c, "naive", **more))


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gradients_come_back_through_states(form):
    kinds = uneven_cases(lengths=(17, 9), sink_form="exp")

    @examples(6 if form == "chunk" else 2, kinds, CUTS)
    def check(drawn, cuts):
        case, more = drawn
        scores = case.tokens.pop("scores")

        def pieces(c):
            c = dataclasses.replace(c, tokens=c.tokens | {"scores": scores})
            return in_order(
                in_segments(c, cuts, lambda part, state: call(part, form, state, **more)), more["kept_keys"]
            )

        def whole(c):
            return call(dataclasses.replace(c, tokens=c.tokens | {"scores": scores}), "naive", **more)

        judge(with_gradients(pieces, case), case, torch.float64, whole)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_rows_are_the_texts_alone(kind):
    @examples(4, uneven_cases(lengths=(17, 9), B=2))
    def check(drawn):
        case, more = drawn
        rows, given = rows_of(case, kind)
        if kind == "packed":
            ends = given["cu_seqlens"].tolist()
            texts = [(slice(0, 1), slice(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        else:
            texts = [(slice(b, b + 1), given["padding_mask"][b]) for b in range(2)]
        alone = [call(case.part(*at), "naive", **more) for at in texts]
        for form in ("naive", "chunk", "recurrent"):
            found = run(rows, form, **more, **given)
            for n, (at, wanted) in enumerate(zip(texts, alone, strict=True)):
                torch.testing.assert_close(found["o"][at].reshape(wanted["o"].shape), wanted["o"])
                for name in [name for name in wanted if "state." in name]:
                    torch.testing.assert_close(found[name][n : n + 1], wanted[name], msg=lambda m, name=name: name + m)


@torch.no_grad()
@pytest.mark.parametrize("form", ["naive", "chunk", "recurrent"])
def test_rows_that_have_seen_more_and_fewer_tokens_go_on_together(form):
    case = scored(one_of(cases("hybrid", T=17, B=2, Hk=3, window=3, anchors=1, gate="key")))
    more = {"kept_keys": (3, 0, 1), "score_delay": 1}
    seen = (4, 12)  # what one row keeps is in the window of the other
    states = [state_in(call(case.part(slice(n, n + 1), slice(0, t)), "chunk", **more)) for n, t in enumerate(seen)]
    state = type(states[0])(*(None if of[0] is None else torch.cat(of) for of in zip(*states, strict=True)))
    step = case.map(lambda name, x: torch.cat([x[n : n + 1, t : t + 1] for n, t in enumerate(seen)]))
    whole = call(case, "naive", **more)["o"]
    wanted = torch.stack([whole[n, t : t + 1] for n, t in enumerate(seen)])
    torch.testing.assert_close(call(step, form, state, **more)["o"], wanted)


@torch.no_grad()
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("gate", ["key", "query", "channel"])
def test_steps_in_place_keep_the_addresses_and_read_nothing_back(places, gate, monkeypatch):
    monkeypatch.setattr("lizard_ops.common.checks.may_read", lambda x: False)
    fixed = {"coverage": "outside", "feature_map": "softmax", "mix": "merge", "sink_form": "exp"}
    case = scored(one_of(cases("hybrid", T=17, B=2, Hk=3, window=3, anchors=1, gate=gate, **fixed)))
    more = {"kept_keys": places, "score_delay": 1}
    wanted = run(case, "naive", **more)
    state = state_in(call(case.part(slice(None), slice(0, 4)), "chunk", **more))
    state = state._replace(**{n: x.contiguous() for n, x in state._asdict().items() if x is not None})
    addresses = [None if x is None else x.data_ptr() for x in state]
    with NoReadBack():
        steps = [
            call(case.part(slice(None), slice(t, t + 1)), "recurrent", state, inplace=True, **more)["o"]
            for t in range(4, 17)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), wanted["o"][:, 4:])
    assert [None if x is None else x.data_ptr() for x in state] == addresses
    left = in_order({f"state.{n}": x for n, x in state._asdict().items() if x is not None}, places)
    for name, x in left.items():
        torch.testing.assert_close(x, wanted[name])


def test_as_many_places_for_each_are_the_number():
    """The same state, and the same bits."""
    case = scored(one_of(cases("hybrid", T=17, B=2, Hk=3, gate="query", coverage="outside", sink_form="exp")))
    for form in ("naive", "chunk", "recurrent"):
        wanted, found = (call(case, form, kept_keys=n) for n in (3, [3, 3, 3]))
        assert wanted.keys() == found.keys() and all(torch.equal(x, found[name]) for name, x in wanted.items())


def test_places_take_memory_where_they_are():
    x = torch.randn(1, 9, 3, 4)

    def places_bytes(kept_keys):
        given = (x, x, x, x, x, -x[..., 0].abs(), 3)
        options = {"mix": "merge", "coverage": "outside", "output_final_state": True, "feature_map": "softmax"}
        state = chunk_hybrid_attn(*given, scores=x[..., 0], kept_keys=kept_keys, **options)[1]
        return sum(getattr(state, name).nbytes for name in KEPT)

    one = places_bytes(1) // 3
    assert places_bytes([512, 0, 0]) == 512 * one
    assert places_bytes([2, 5, 0]) == 7 * one


def test_what_an_expiry_keeps_alive_is_counted_by_head():
    x = torch.randn(1, 9, 2, 4, dtype=torch.float64)  # raw features, whose sum of weights may come near zero
    expiry = torch.arange(9).view(1, -1, 1).expand(1, 9, 2) + 2
    expiry = torch.stack([expiry[..., 0], expiry[..., 1] + 2], -1)  # head 1 keeps two more
    given = (x, x, x, x, x, None, 2)
    wanted = naive_hybrid_attn(*given, expiry=expiry, kept_keys=2)[0]
    torch.testing.assert_close(chunk_hybrid_attn(*given, expiry=expiry, kept_keys=[0, 2])[0], wanted)
    with pytest.raises(ValueError, match=r"kept_keys: got \(2, 0\), wanted at least \[0, 2\]"):
        chunk_hybrid_attn(*given, expiry=expiry, kept_keys=[2, 0])


@pytest.mark.parametrize("places, message", [((0, 0, 0), "some"), ((1, 2), "other"), ((1, 2, "3"), "none")])
@pytest.mark.parametrize("form", ["naive", "chunk", "recurrent"])
def test_places_that_do_not_fit_are_refused(form, places, message):
    x = torch.randn(1, 9, 3, 4)
    with pytest.raises(ValueError, match=r"kept_keys: got .*, wanted an integer >= 1, or 3 >= 0, one of them >= 1"):
        getattr(lizard_ops, f"{form}_hybrid_attn")(x, x, x, x, x, None, 3, scores=x[..., 0], kept_keys=places)


def test_a_state_of_other_places_is_refused():
    x = torch.randn(1, 9, 3, 4)
    given = (x, x, x, x, x, None, 3)
    state = chunk_hybrid_attn(*given, scores=x[..., 0], kept_keys=[2, 0, 1], output_final_state=True)[1]
    for places in ([2, 0, 2], 1):
        with pytest.raises(ValueError, match=r"initial_state.kept_k: got shape \(1, 3, 4\)"):
            recurrent_hybrid_attn(*given, scores=x[..., 0], kept_keys=places, initial_state=state)
