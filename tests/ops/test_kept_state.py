"""Kept keys and the state that holds them: pieces of any size agree with one pass of the reference."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools

import pytest
import torch
from hypothesis import strategies as st
from op_cases import GATES, HYBRID, call, cases, state_in
from op_checks import examples, judge, one_of, with_gradients
from target_cases import in_segments, rows_of
from test_regressions import NoReadBack
from torch._subclasses.fake_tensor import FakeTensorMode

from lizard_ops import chunk_hybrid_attn, recurrent_hybrid_attn

SMALL = (
    ("gated_attn.chunk_torch", "HEAD_GATE_CHUNK", 8),
    ("gated_attn.chunk_torch", "CHANNEL_GATE_CHUNK", 4),
    ("gated_attn.chunk_torch_tiles", "SCAN", 2),
    ("window_attn.chunk_torch", "BLOCK", 2),
    ("key_expiry.chunk_torch", "TILE", 4),
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that short sequences meet every boundary."""
    for module, name, size in SMALL:
        monkeypatch.setattr(importlib.import_module(f"lizard_ops.{module}"), name, size)


def scored(case, seed=0):
    """The case with scores, ties among them, and infinities."""
    x = torch.randn(case.tokens["k"].shape[:3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.where(x > 1.5, torch.inf, torch.where(x < -1.5, -torch.inf, x.round()))
    case.tokens["scores"] = x
    return case


@st.composite
def scored_cases(draw, lengths=(29, 17, 9, 5, 1, 0), **fixed):
    """(case, kept_keys and score_delay)."""
    case = scored(draw(cases("hybrid", lengths=lengths, **({"decay": 0.5} | fixed))), draw(st.integers(0, 9)))
    delay = min(draw(st.sampled_from((0, 2, 1))), case.options["window"] - 1)
    return case, {"kept_keys": draw(st.sampled_from((3, 1, 7, 40))), "score_delay": delay}


def in_order(outputs):
    """Kept keys in the order of their positions, empty places last."""
    held = outputs["state.kept_positions"]
    order = torch.where(held < 0, 2**62, held).argsort(dim=1, stable=True)
    for name in [name for name in outputs if name.startswith("state.kept_")]:
        x = outputs[name]
        index = order.repeat_interleave(x.shape[2] // order.shape[2], 2)
        outputs[name] = x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 3)).expand_as(x))
    return outputs


CUTS = st.lists(st.integers(0, 29), min_size=1, max_size=3)


def run(case, form, state=None, **more):
    return in_order(call(case, form, state, **more))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("coverage", [*HYBRID["coverage"], "left"])
@pytest.mark.parametrize("form", ["naive", "chunk", "recurrent"])
def test_pieces_are_the_whole(form, coverage, gate):
    """Outputs, and every field of the state."""
    lengths = (17, 9, 5, 0) if form == "recurrent" else (29, 17, 9, 5, 1, 0)
    count = 2 if coverage == "all" or form == "recurrent" else 5

    @examples(count, scored_cases(coverage=coverage, gate=gate, lengths=lengths), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        pieces = in_order(in_segments(case, cuts, lambda part, state: call(part, form, state, **more)))
        for found in (pieces, *([run(case, "chunk", **more)] if form == "naive" else [])):
            judge(found, case, torch.float64, lambda c: call(c, "naive", **more))


@pytest.mark.parametrize("gate", ["key", "channel", "query"])
def test_forms_take_each_others_states(gate):
    """One after the other, chosen by chance, in float32: with gates that decay keys beyond what float32 holds too."""
    forms = st.lists(st.sampled_from(("chunk", "recurrent", "naive")), min_size=8, max_size=8)
    kinds = scored_cases(coverage="outside", gate=gate, lengths=(17, 9), mix="merge" if gate == "channel" else "sum")

    @examples(6, kinds, forms, CUTS, st.sampled_from((1.0, 40.0)))
    def check(drawn, forms, cuts, stronger):
        case, more = drawn
        case = case.map(lambda name, x: x * stronger if name == "g" else x).cast(torch.float32)
        left = iter(forms)
        found = in_segments(case, cuts, lambda part, state: call(part, next(left), state, **more))
        judge(in_order(found), case, torch.float32, lambda c: call(c, "naive", **more))


def test_resets_and_strong_decays_in_pieces():
    """To 1e-9 of one: a scale of -1e-8 beside resets is known no better."""
    extremes = torch.tensor([0, -1e-8, -0.3, -1e4, -torch.inf], dtype=torch.float64)
    fixed = st.sampled_from(({"gate": "key"}, {"gate": "query"}, {"gate": "channel", "mix": "merge"}))

    @examples(12, fixed.flatmap(lambda more: scored_cases(coverage="outside", lengths=(17, 9), **more)), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        case = case.map(lambda name, x: extremes[(x * 1e3).long() % 5] if name == "g" else x)
        wanted = call(case, "naive", **more)
        for form in ("chunk", "recurrent", "naive"):
            found = in_order(in_segments(case, cuts, lambda part, state, form=form: call(part, form, state, **more)))
            assert found.keys() == wanted.keys()
            for name, x in found.items():
                torch.testing.assert_close(x, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("gate", ["key", "query", "channel"])
def test_a_key_of_before_a_reset_leaves_the_sums_of_after_it(gate):
    """Key 0 stays until key 5 leaves the window at 7, when the sums hold keys that no reset came after."""
    fixed = {"window": 2, "anchors": 0, "coverage": "outside", "mix": "sum", "normalize": True, "gate": gate}
    case = scored(one_of(cases("hybrid", T=9, B=1, Hk=2, **fixed)))
    case.tokens["g"][:, 2] = -torch.inf
    case.tokens["scores"] = torch.tensor([5.0, 0, 0, 0, 0, 9, 0, 0, 0]).view(1, 9, 1).expand(1, 9, 2)
    wanted = call(case, "naive", kept_keys=1)
    for form, cut in itertools.product(("chunk", "recurrent", "naive"), (5, 6, 7, 8)):
        found = in_segments(case, [cut], lambda part, state, form=form: call(part, form, state, kept_keys=1))
        for name, x in found.items():
            torch.testing.assert_close(x, wanted[name])


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gradients_come_back_through_states(form):
    """Of the outputs of all pieces and of every field that the last one leaves."""
    kinds = scored_cases(lengths=(17, 9), sink_form="exp")

    @examples(14 if form == "chunk" else 4, kinds, CUTS)
    def check(drawn, cuts):
        case, more = drawn

        def pieces(c):
            return in_order(in_segments(c, cuts, lambda part, state: call(part, form, state, **more)))

        scores = case.tokens.pop("scores")  # no gradient goes through them

        def with_scores(step):
            return lambda c: step(dataclasses.replace(c, tokens=c.tokens | {"scores": scores}))

        found = with_gradients(with_scores(pieces), case)
        judge(found, case, torch.float64, with_scores(lambda c: call(c, "naive", **more)))


def best_left(scores, i, window, anchors, places):
    """The best keys that have left the window of query i: larger score first, then the earlier position."""
    return sorted(range(anchors, i - window + 1), key=lambda j: (-scores[j], j))[:places]


def test_the_best_that_left_the_window_are_exact_by_hand():
    """Each query by itself, without a stream: softmax over window, anchors and the best, sums over the rest."""
    fixed = {"mix": "merge", "merge_mass": "relative", "coverage": "outside", "feature_map": "softmax", "gate": "key"}
    sizes = {"T": 13, "B": 1, "Hk": 2, "G": 1, "window": 3, "anchors": 1, "sinks": False, "weight": None, "scale": 0.7}
    case = scored(one_of(cases("hybrid", **sizes, **fixed)), 3)
    x, delay, places = {name: t[0] for name, t in case.tokens.items() if t is not None}, 2, 2
    found = in_segments(case, [4, 5, 9], lambda part, state: call(part, "chunk", state, kept_keys=2, score_delay=delay))
    phi_q, phi_k = (torch.cat([x[n].softmax(-1), (-x[n]).softmax(-1)], -1) for n in ("fq", "fk"))
    for h in range(2):
        scores = x["scores"][delay:, h].tolist()
        for i in range(13):
            best = best_left(scores, i, 3, 1, places)
            near = {j for j in range(i + 1) if j > i - 3 or j < 1}
            s = {j: 0.7 * x["q"][i, h] @ x["k"][j, h] for j in near | set(best)}
            mass = sum(y.exp() for y in s.values())
            wanted = sum(y.exp() * x["v"][j, h] for j, y in s.items()) / mass
            rest = [j for j in range(i + 1) if j not in s]
            a = {j: phi_q[i, h] @ phi_k[j, h] * x["g"][j + 1 : i + 1, h].sum().exp() for j in rest}
            if rest:
                total = sum(a.values())
                share = torch.sigmoid(total.log() - mass.log() + max(s[j] for j in near))
                wanted = share * sum(y * x["v"][j, h] for j, y in a.items()) / total + (1 - share) * wanted
            torch.testing.assert_close(found["o"][0, i, h], wanted)
        assert found["state.kept_positions"][0, :, h].tolist() == sorted(best)


def test_places_enough_for_all_are_full_attention():
    @examples(4, scored_cases(coverage="outside", mix="merge", sinks=False, lengths=(17, 9)), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        more["kept_keys"] = 20
        q, k, v = (case.tokens[name].transpose(1, 2) for name in ("q", "k", "v"))
        scale = {"is_causal": True, "scale": case.options["scale"], "enable_gqa": True}
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, **scale)
        for form in ("chunk", "recurrent"):
            found = in_segments(case, cuts, lambda part, state, form=form: call(part, form, state, **more))
            torch.testing.assert_close(found["o"], wanted.transpose(1, 2))


def test_scores_that_rise_make_a_wider_window():
    """Not of the relative mass, whose largest score stays that of the narrow one."""

    @examples(6, scored_cases(merge_mass="absolute", lengths=(17, 9)), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        case.tokens["scores"] = torch.arange(case.length).view(1, -1, 1).expand_as(case.tokens["scores"]).double()

        def step(form):
            return lambda part, state: call(part, form, state, **more)

        wider = case.options | {"window": case.options["window"] + more["kept_keys"]}
        plain = dataclasses.replace(case, tokens=case.tokens | {"scores": None}, options=wider)
        wanted = call(plain, "chunk")
        for form in ("chunk", "recurrent"):
            torch.testing.assert_close(in_segments(case, cuts, step(form))["o"], wanted["o"])


def test_no_places_are_the_op_without():
    @examples(4, cases("hybrid", lengths=(9, 5)))
    def check(case):
        for form in ("naive", "chunk", "recurrent"):
            plain, found = call(case, form), call(case, form, kept_keys=0, score_delay=0)
            assert plain.keys() == found.keys() and not any("kept" in name for name in found)
            assert all(torch.equal(x, found[name]) for name, x in plain.items())


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_rows_with_states_of_their_own_are_the_texts_alone(kind):
    """Sequences that have seen nothing, some and all of another text, one after the other or with padding anywhere."""

    @examples(8, scored_cases(lengths=(17, 9), B=2))
    def check(drawn):
        case, more = drawn
        rows, given = rows_of(case, kind)
        if kind == "packed":
            ends = given["cu_seqlens"].tolist()
            texts = [(slice(0, 1), slice(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        else:
            texts = [(slice(b, b + 1), given["padding_mask"][b]) for b in range(2)]
        first = case.part(slice(0, 1), slice(None))
        seen = [(case.length, 0, 7)[n % 3] for n in range(len(texts))]
        past = [call(first.part(slice(None), slice(0, n)), "chunk", **more) for n in seen]
        state = state_in({name: torch.cat([x[name] for x in past]) for name in past[0] if "state." in name})
        alone = [
            call(case.part(*at), "naive", state_in(before), **more) for at, before in zip(texts, past, strict=True)
        ]
        for form in ("naive", "chunk", "recurrent"):
            found = run(rows, form, state, **more, **given)
            for n, (at, wanted) in enumerate(zip(texts, alone, strict=True)):
                torch.testing.assert_close(found["o"][at].reshape(wanted["o"].shape), wanted["o"])
                for name in [name for name in wanted if "state." in name]:
                    torch.testing.assert_close(found[name][n : n + 1], wanted[name], msg=lambda m, name=name: name + m)


def test_places_in_any_order_give_the_same_bits():
    case, more = scored(one_of(cases("hybrid", T=17, B=2, gate="query", coverage="outside"))), {"kept_keys": 5}
    state = state_in(call(case.part(slice(None), slice(0, 11)), "chunk", **more))
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = state._replace(**{n: x[:, order] for n, x in state._asdict().items() if n.startswith("kept_")})
    rest = case.part(slice(None), slice(11, 17))
    wanted = call(rest, "chunk", state, **more)
    for found in (call(rest, "chunk", moved, **more), call(rest, "chunk", state, **more)):
        assert all(torch.equal(x, found[name]) for name, x in wanted.items())


@pytest.mark.parametrize("gate, coverage", [("key", "outside"), ("channel", "outside"), ("key", "all")])
def test_gradients_of_a_state_are_those_of_differences(gate, coverage):
    fixed = {"mix": "merge", "coverage": coverage, "feature_map": "softmax", "gate": gate, "sinks": False}
    case = scored(one_of(cases("hybrid", T=9, B=1, Hk=1, G=2, window=2, anchors=1, weight=None, **fixed)))
    more = {"kept_keys": 2, "score_delay": 1}
    state = state_in(call(case.part(slice(None), slice(0, 6)), "chunk", **more))
    names = [n for n, x in state._asdict().items() if x is not None and x.is_floating_point() and "scor" not in n]
    names.remove("log_scale") if "log_scale" in names else None  # a scale without a gradient
    rest = case.part(slice(None), slice(6, 9))

    def step(form, *values):
        out = call(rest, form, state._replace(**dict(zip(names, values, strict=True))), **more)
        if coverage == "outside":  # sums are relative to a scale that has no gradient
            scale = out.pop("state.log_scale").exp()
            out |= {"state.s": out["state.s"] * scale[..., None, None], "state.z": out["state.z"] * scale[..., None]}
        return [x for n, x in in_order(out).items() if x.requires_grad]

    for form in ("chunk", "recurrent"):
        leaves = [getattr(state, n).clone().requires_grad_() for n in names]
        assert torch.autograd.gradcheck(lambda *xs, form=form: step(form, *xs), leaves, fast_mode=True)


def holds(state, wanted, **tolerance):
    """A state, on whatever device, is that among the outputs of a call."""
    for name, x in in_order({f"state.{n}": x.cpu() for n, x in state._asdict().items() if x is not None}).items():
        torch.testing.assert_close(x, wanted[name], **tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    "gate, places, fixed",
    [
        ("key", 3, {"coverage": "outside", "feature_map": "softmax", "mix": "merge"}),
        ("channel", 3, {"coverage": "outside", "feature_map": "exp"}),
        ("query", 20, {"coverage": "outside"}),  # some stay empty
        (None, 3, {"coverage": "all"}),
    ],
)
def test_steps_in_place_keep_the_addresses(gate, places, fixed):
    """One token per row, then several with padding among them, which another way of working overwrites."""
    case = scored(one_of(cases("hybrid", T=15, B=2, Hk=2, window=3, anchors=1, gate=gate, **fixed)))
    more = {"kept_keys": places, "score_delay": 1}
    wanted = run(case, "naive", **more)
    state = state_in(call(case.part(slice(None), slice(0, 4)), "chunk", **more))
    state = state._replace(**{n: x.contiguous() for n, x in state._asdict().items() if x is not None})
    addresses = [None if x is None else x.data_ptr() for x in state]
    for t in range(4, 12):
        out = call(case.part(slice(None), slice(t, t + 1)), "recurrent", state, inplace=True, **more)
        torch.testing.assert_close(out["o"], wanted["o"][:, t : t + 1])
    holds(state, run(case.part(slice(None), slice(0, 12)), "naive", **more))
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    rest = case.map(lambda _, x: torch.stack([x[0, [12, 12, 13, 14]], x[1, [12, 13, 14, 14]]]))
    out = call(rest, "recurrent", state, inplace=True, padding_mask=mask, **more)
    torch.testing.assert_close(out["o"][mask].flatten(), wanted["o"][:, 12:].flatten())
    assert [None if x is None else x.data_ptr() for x in state] == addresses
    holds(state, wanted)


def test_nothing_is_read_back(monkeypatch):
    """Checks of values apart, which a GPU tensor has in checked mode only: a step in place could not be captured."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.common.checks"), "may_read", lambda x: False)
    case = scored(one_of(cases("hybrid", T=17, B=2, gate="query", coverage="outside", sink_form="exp")))
    more, mask = {"kept_keys": 3, "score_delay": 1}, torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    leaves = {name: x.requires_grad_() for name, x in case.leaves().items() if name != "scores"}
    first, rest, last = (case.part(slice(None), slice(a, b)) for a, b in ((0, 7), (7, 16), (16, 17)))
    with NoReadBack():
        state = state_in(call(first, "chunk", **more))
        out = call(rest, "chunk", state, padding_mask=mask, **more)
        torch.autograd.grad(out["o"].sum() + out["state.s"].sum(), list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            state = state_in({name: x.detach().contiguous() for name, x in out.items()})
            call(last, "recurrent", state, inplace=True, **more)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("gate", ["key", "query", "channel"])
def test_a_captured_step_goes_on_by_itself(gate):
    fixed = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "anchors": 1, "sinks": False}
    case = scored(one_of(cases("hybrid", T=40, B=2, window=5, gate=gate, **fixed))).cast(torch.float32)
    more = {"kept_keys": 3, "score_delay": 1}
    wanted = run(case, "naive", **more)
    there = case.cast(torch.float32, "cuda")
    state = state_in(call(there.part(slice(None), slice(0, 20)), "chunk", **more))
    state = state._replace(**{n: x.contiguous() for n, x in state._asdict().items() if x is not None})
    token = there.part(slice(None), slice(20, 21)).map(lambda _, x: x.clone())
    before = [None if x is None else x.clone() for x in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # the step overwrites what is cloned above
    with torch.cuda.stream(side):
        call(token, "recurrent", state, inplace=True, **more)  # compiles and warms up
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(token, "recurrent", state, inplace=True, **more)["o"]
    for x, then in zip(state, before, strict=True):
        if x is not None:
            x.copy_(then)
    for t in range(20, 40):
        for name, x in token.tokens.items():
            None if x is None else x.copy_(there.tokens[name][:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(o.cpu(), wanted["o"][:, t : t + 1], rtol=1e-4, atol=1e-5)
    holds(state, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_compiles_to_one_graph(form):
    fixed = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "weight": "head", "gate": "key"}
    case = scored(one_of(cases("hybrid", B=2, T=14, window=3, **fixed))).cast(torch.float32)
    more = {"kept_keys": 2, "score_delay": 1}
    state = state_in(call(case.part(slice(None), slice(0, 9)), "chunk", **more))
    rest = case.part(slice(None), slice(9, 14 if form == "chunk" else 10))
    mask = torch.tensor([[True], [False]]) | (torch.arange(rest.length) < 3) if form == "chunk" else None

    def step(tokens, state):
        return call(dataclasses.replace(rest, tokens=tokens), form, state, padding_mask=mask, **more)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for wanted, found in zip(step(rest.tokens, state).values(), compiled(rest.tokens, state).values(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(device):
    with FakeTensorMode() if device == "fake" else contextlib.nullcontext():
        x = torch.rand(2, 9, 2, 4, device="meta" if device == "meta" else "cpu")
        options = {"mix": "merge", "coverage": "outside", "output_final_state": True, "kept_keys": 2}
        given = (x, x, x, x, x, -x[..., 0], 3)
        state = chunk_hybrid_attn(*given, scores=x[..., 0], **options)[1]
        for form in (chunk_hybrid_attn, recurrent_hybrid_attn):
            o, after = form(*given, scores=x[..., 0], initial_state=state, **options)
            assert o.shape == (2, 9, 2, 4)
            assert [None if y is None else y.shape for y in after] == [None if y is None else y.shape for y in state]
