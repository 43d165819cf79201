"""Hybrid attention whose keys expire: exact before, in the sums after. The references against dense code of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib

import pytest
import torch
from hypothesis import strategies as st
from op_cases import GATES, HYBRID, call, cases
from op_checks import examples, judge, one_of, with_gradients
from target_cases import rows_of
from torch._subclasses.fake_tensor import FakeTensorMode

from lizard_ops import NEVER, chunk_hybrid_attn, key_expiry, naive_hybrid_attn, naive_key_expiry
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments
from lizard_ops.hybrid_attn.formula import hybrid_formula


def expiry_of(case, places=3, seed=0, **rows):
    """Of scores with ties among them."""
    shape = case.tokens["k"].shape[:3]
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round()
    return naive_key_expiry(scores, case.options["window"], case.options["anchors"], places, **rows).expiry


def arbitrary_expiry(case, seed=0):
    """Expiries that no key_expiry gives: many at once, and any time after the window."""
    shape, generator = case.tokens["k"].shape[:3], torch.Generator().manual_seed(seed)
    end = torch.arange(shape[1]).view(1, -1, 1) + case.options["window"]
    late = end + torch.randint(6, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.2, NEVER, late)


SMALL = (
    ("gated_attn.chunk_torch", "HEAD_GATE_CHUNK", 8),
    ("gated_attn.chunk_torch", "CHANNEL_GATE_CHUNK", 4),
    ("gated_attn.chunk_torch_tiles", "SCAN", 2),
    ("window_attn.chunk_torch", "BLOCK", 2),
)


@pytest.fixture
def small_chunks(monkeypatch):
    """So that short sequences meet every boundary, and most kept keys stand before what a block reaches."""
    for module, name, size in SMALL:
        monkeypatch.setattr(importlib.import_module(f"lizard_ops.{module}"), name, size)


def triples(first: int) -> list[tuple[str, str, str | None]]:
    """Mix, coverage and gate: every pair of two, and with both values of ``first`` all three."""
    coverages = [*HYBRID["coverage"], "left"]
    return [(HYBRID["mix"][(first + i + j) % 2], c, g) for i, c in enumerate(coverages) for j, g in enumerate(GATES)]


@pytest.mark.parametrize("mix, coverage, gate", triples(0))
def test_chunked_is_the_reference(mix, coverage, gate, small_chunks):
    """Outputs and gradients, of rows of every kind."""
    rows, places = st.sampled_from(["plain", "padded", "packed"]), st.sampled_from([3, 1, 0, 7, 20])
    drawn = cases("hybrid", lengths=(29, 17, 5, 1, 0), mix=mix, coverage=coverage, gate=gate)

    @examples(5, drawn, rows, places, st.integers(0, 9))
    def check(case, kind, places, seed):
        case, more = rows_of(case, kind)
        more["expiry"] = expiry_of(case, places, seed, **more)

        def reference(c):
            return call(c, "naive", final=False, **more)

        run = with_gradients(lambda c: call(c, "chunk", final=False, kept_keys=places, **more), case)
        judge(run, case, torch.float64, reference)


def test_extreme_gates_are_the_reference(small_chunks):
    """Resets and what is nearly one. A gate per channel is merged: features of a key that e^-700 and less separate are
    no numbers beside each other, which an average of keys that have all but decayed would show."""
    extremes = torch.tensor([0, -1e-8, -0.3, -1e4, -torch.inf], dtype=torch.float64)
    fixed = st.sampled_from(({"gate": "key"}, {"gate": "query"}, {"gate": "channel", "mix": "merge"}))

    @examples(12, fixed.flatmap(lambda more: cases("hybrid", lengths=(29, 17), coverage="outside", **more)))
    def check(case):
        case = case.map(lambda name, x: extremes[(x * 1e3).long() % 5] if name == "g" else x)
        expiry = expiry_of(case)
        found = call(case, "chunk", final=False, expiry=expiry, kept_keys=3)
        judge(found, case, torch.float64, lambda c: call(c, "naive", final=False, expiry=expiry))


def test_chunks_of_their_own_size_are_the_reference():
    fixed = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "gate": "key", "window": 9}
    case = one_of(cases("hybrid", T=400, B=1, Hk=2, G=2, **fixed)).cast(torch.float32)
    expiry = expiry_of(case, 70)
    found = call(case, "chunk", final=False, expiry=expiry, kept_keys=70)
    judge(found, case, torch.float32, lambda c: call(c, "naive", final=False, expiry=expiry))


def test_compiles_to_one_graph(small_chunks):
    fixed = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "weight": "head", "gate": "key"}
    case = one_of(cases("hybrid", B=2, T=9, window=3, **fixed)).cast(torch.float32)
    mask = torch.tensor([[True], [False]]) | (torch.arange(9) < 7)

    @torch.no_grad()
    def run(tokens, expiry):
        case.tokens.update(tokens)
        return call(case, "chunk", final=False, expiry=expiry, kept_keys=2, padding_mask=mask)["o"]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    tokens, expiry = dict(case.tokens), expiry_of(case, 2, padding_mask=mask)
    torch.testing.assert_close(compiled(tokens, expiry), run(tokens, expiry))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_values(kind):
    def run(device):
        x, mask = torch.rand(2, 9, 2, 4, device=device), torch.ones(2, 9, dtype=torch.bool, device=device)
        expiry = key_expiry(x[..., 0], 3, 1, 2).expiry
        options = {"mix": "merge", "coverage": "outside", "padding_mask": mask}
        return chunk_hybrid_attn(x, x, x, x, x, -x[..., 0], 3, expiry=expiry, kept_keys=2, **options)[0]

    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        found = run("meta" if kind == "meta" else "cpu")
    assert found.shape == (2, 9, 2, 4) and found.dtype == torch.float32


def dense(q, k, v, fq, fk, g, window, expiry, merge_bias, scale, left):
    """One row and head of everything [T, ...], merged by relative mass, softmax features: loops over pairs alone."""
    rows = []
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (fq, fk))
    for i in range(len(q)):
        exact = {j: scale * (q[i] @ k[j]) for j in range(i + 1) if i < expiry[j]}
        inside = [j for j in range(i + 1) if i >= (j + window if left else expiry[j])]
        linear = {j: (phi_q[i] @ phi_k[j]) * g[j + 1 : i + 1].sum().exp() for j in inside}
        mass = sum(s.exp() for s in exact.values())
        o_win = sum(s.exp() * v[j] for j, s in exact.items()) / mass
        if not linear:
            rows.append(o_win)
            continue
        reference = max(s for j, s in exact.items() if j > i - window)
        total = sum(linear.values())
        o_lin = sum(a * v[j] for j, a in linear.items()) / total
        share = torch.sigmoid(total.log() - (mass.log() - reference) + merge_bias)
        rows.append(share * o_lin + (1 - share) * o_win)
    return torch.stack(rows)


@pytest.mark.parametrize("coverage", ["outside", "left"])
def test_two_key_heads_of_two_query_heads_by_hand(coverage):
    fixed = {"mix": "merge", "merge_mass": "relative", "coverage": coverage, "feature_map": "softmax", "gate": "key"}
    sizes = {"T": 13, "B": 2, "Hk": 2, "G": 2, "window": 3, "anchors": 0, "seed": 4}
    case = one_of(cases("hybrid", **sizes, **fixed, sinks=False, weight="head", scale=0.7))
    expiry = expiry_of(case)
    o = call(case, "naive", final=False, expiry=expiry)["o"]
    x = case.tokens
    for b in range(2):
        for h in range(4):
            heads = [x[name][b, :, h] for name in ("q",)] + [x[name][b, :, h // 2] for name in ("k", "v")]
            heads += [x["fq"][b, :, h], x["fk"][b, :, h // 2], x["g"][b, :, h // 2]]
            wanted = dense(
                *heads, 3, expiry[b, :, h // 2].tolist(), case.weights["merge_bias"][h], 0.7, coverage == "left"
            )
            torch.testing.assert_close(o[b, :, h], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mix, coverage, gate", triples(1))
def test_hybrid_is_its_formula(mix, coverage, gate):
    kinds = st.sampled_from((expiry_of, arbitrary_expiry))

    @examples(6, cases("hybrid", lengths=(13, 5, 1), mix=mix, coverage=coverage, gate=gate), kinds, st.integers(0, 9))
    def check(case, kind, seed):
        expiry = kind(case, seed=seed)
        inputs, options = HybridInputs(**case.tokens, **case.weights, expiry=expiry), HybridOptions(**case.options)
        found = call(case, "naive", final=False, expiry=expiry)["o"]
        torch.testing.assert_close(found, hybrid_formula(*hybrid_arguments(inputs, options)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_window_and_anchors_are_special_cases(dtype):
    """Outputs bit for bit, whatever an anchor's expiry says, and gradients but for the order of their sums."""

    @examples(10, cases("hybrid", lengths=(13, 5)), st.sampled_from((NEVER, 0)))
    def check(case, of_anchors):
        case = case.cast(dtype)
        at = torch.arange(case.length).view(1, -1, 1).expand(case.tokens["k"].shape[:3])
        expiry = torch.where(at < case.options["anchors"], of_anchors, at + case.options["window"])
        plain = with_gradients(functools.partial(call, form="naive", final=False), case)
        found = with_gradients(functools.partial(call, form="naive", final=False, expiry=expiry), case)
        assert torch.equal(found["o"], plain["o"])
        for name, x in plain.items() if dtype == torch.float64 else ():
            torch.testing.assert_close(found[name], x)


def test_scores_that_rise_make_a_wider_window(small_chunks):
    """Not of the relative mass, whose largest score stays that of the narrow one."""

    @examples(10, cases("hybrid", lengths=(29, 17), merge_mass="absolute"), st.sampled_from((5, 1, 9)))
    def check(case, places):
        rising = torch.arange(case.length, dtype=torch.float32).view(1, -1, 1).expand(case.tokens["k"].shape[:3])
        window, anchors = case.options["window"], case.options["anchors"]
        expiry = key_expiry(rising, window, anchors, places).expiry
        found = call(case, "chunk", final=False, expiry=expiry, kept_keys=places)["o"]
        wider = dataclasses.replace(case, options=case.options | {"window": window + places})
        torch.testing.assert_close(found, call(wider, "chunk", final=False)["o"])


def test_keys_that_never_expire_are_full_attention():
    @examples(10, cases("hybrid", lengths=(13, 5), coverage="outside", mix="merge", sinks=False))
    def check(case):
        expiry = torch.full(case.tokens["k"].shape[:3], NEVER)
        found = call(case, "naive", final=False, expiry=expiry)["o"]
        q, k, v = (case.tokens[name].transpose(1, 2) for name in ("q", "k", "v"))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=case.options["scale"], enable_gqa=True
        )
        torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_packed_and_padded_rows_are_separate_sequences():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    ends = torch.tensor([0, 7, 7, 12])

    @examples(6, cases("hybrid", B=2, T=12, window=2))
    def check(case):
        expiry = expiry_of(case, padding_mask=mask).masked_fill(~mask.unsqueeze(-1), -7)
        padded = call(case, "naive", final=False, expiry=expiry, padding_mask=mask)["o"]
        assert not padded[~mask].any()
        for row in range(2):
            alone, at = case.part(slice(row, row + 1), mask[row]), (slice(row, row + 1), mask[row])
            torch.testing.assert_close(padded[at], call(alone, "naive", final=False, expiry=expiry[at])["o"])
        one = case.part(slice(0, 1), slice(None))
        expiry = expiry_of(one, cu_seqlens=ends)
        packed = call(one, "naive", final=False, expiry=expiry, cu_seqlens=ends)["o"]
        for piece in (slice(0, 7), slice(7, 12)):
            alone = call(one.part(slice(None), piece), "naive", final=False, expiry=expiry[:, piece])["o"]
            torch.testing.assert_close(packed[:, piece], alone)


@pytest.mark.parametrize("gate", ["key", "channel"])
def test_gradients_are_those_of_differences(gate):
    fixed = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "gate": gate, "sink_form": "exp"}
    case = one_of(cases("hybrid", T=7, B=1, Hk=2, G=1, window=2, anchors=1, sinks=True, **fixed))
    expiry, leaves = expiry_of(case, places=1), case.leaves()

    def run(*values):
        given = dict(zip(leaves, values, strict=True))
        return call(case.map(lambda name, _: given[name], weights=True), "naive", final=False, expiry=expiry)["o"]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in leaves.values()], fast_mode=True)


BAD = [
    ({"expiry": torch.zeros(2, 6, 2)}, "expiry: got shape"),
    ({"expiry": torch.zeros(2, 6, 4, dtype=torch.int64)}, "expiry: got shape"),
    ({"expiry": torch.arange(6).view(1, -1, 1).expand(2, 6, 2) + 2}, "expiry: got 20, wanted positions"),
    ({"output_final_state": True}, "output_final_state: got True, wanted False with expiry"),
    ({"initial_state": True}, "initial_state: got 'AttentionState', wanted None with expiry"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("form", ["naive", "chunk"])
def test_bad_expiries_are_refused_by_name(form, changes, message):
    x = {"q": torch.rand(2, 6, 4, 3), "k": torch.rand(2, 6, 2, 3), "v": torch.rand(2, 6, 2, 3), "g": None}
    x |= {"fq": x["q"], "fk": x["k"], "window": 3, "anchors": 1}
    given = x | {"expiry": torch.full((2, 6, 2), NEVER)} | changes
    if "initial_state" in changes:
        given["initial_state"] = naive_hybrid_attn(**x, output_final_state=True)[1]
    with pytest.raises(ValueError) as error:
        naive_hybrid_attn(**given) if form == "naive" else chunk_hybrid_attn(**given, kept_keys=6)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kept_keys": None}, "kept_keys: got None, wanted a number with expiry"),
        ({"expiry": None}, "kept_keys: got 5, wanted a number with expiry, None without"),
        ({"kept_keys": -1}, "kept_keys: got -1, wanted an integer >= 0"),
        ({"kept_keys": 1}, "kept_keys: got 1, wanted at least 2: as many keys of a head are alive"),
        (
            {"expiry": torch.full((2, 6, 2), 5).index_fill(1, torch.tensor([0, 3, 4, 5]), NEVER)},
            "expiry: got 2, wanted",
        ),
        ({"gate_form": "absorbed", "g": torch.zeros(2, 6)}, "gate_form: got 'absorbed', wanted \"stable\" with expiry"),
        (
            {"impl": "triton", "g": torch.zeros(2, 6, 2, 3)},
            'impl: got \'triton\', wanted "torch" or "auto" for a gate per channel with kept keys',
        ),
    ],
)
def test_what_does_not_fit_an_expiry_is_refused_by_name(changes, message):
    """No key but the anchor has expired at the last query, where two have left the window."""
    x = {"q": torch.rand(2, 6, 4, 3), "k": torch.rand(2, 6, 2, 3), "v": torch.rand(2, 6, 2, 3), "g": None}
    x |= {"fq": x["q"], "fk": x["k"], "window": 3, "anchors": 1, "kept_keys": 5}
    with pytest.raises(ValueError) as error:
        chunk_hybrid_attn(**(x | {"expiry": torch.full((2, 6, 2), NEVER)} | changes))
    assert str(error.value).startswith(message)


def test_short_texts_list_no_places_for_keys_that_are_not_there(monkeypatch):
    found, listed = [], importlib.import_module("lizard_ops.window_attn.chunk_torch")
    of = listed.living
    monkeypatch.setattr(listed, "BLOCK", 64)
    monkeypatch.setattr(listed, "living", lambda *a: found.append(a[1:]) or of(*a))
    scores = torch.randn(1, 512, 1)
    q, k, v, fq, fk = torch.randn(5, 1, 512, 1, 4).unbind()
    chunk_hybrid_attn(
        q, k, v, fq, fk, None, 128, feature_map="softmax", coverage="outside", scores=scores, kept_keys=256
    )
    assert found == [(2, 256, 1, 0, 0)]  # the last of two blocks reaches all keys
