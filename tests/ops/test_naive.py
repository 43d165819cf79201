"""The references against their formulas over all pairs of positions at once, and on packed and padded rows."""

from __future__ import annotations

import pytest
import torch
from op_cases import call, cases
from op_checks import examples

from lizard_ops.common.features import expand_features


def whole_linear(case, fq, fk, offset, scale, normalize):
    """(o, log mass) of the linear branch from the matrix of all its weights."""
    v, g, (_, t, heads, _) = case.tokens["v"], case.tokens["g"], fq.shape
    fk, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (fk, v))
    g = (
        fq.new_zeros(1, t, 1, 1)
        if g is None
        else g.unsqueeze(-1)
        if g.ndim == 3
        else g
        if g.ndim == 4
        else g[..., None, None]
    )
    g = g.repeat_interleave(heads // g.shape[2], 2)
    decay = torch.zeros(len(g), t, t, *g.shape[2:], dtype=fq.dtype)
    for i in range(t):
        for j in range(i):
            decay[:, i, j] = g[:, j + 1 : i + 1].sum(1)
    i, j = torch.arange(t)[:, None], torch.arange(t)
    some = (j >= case.options["anchors"]) & (j <= i - offset)
    a = scale * torch.einsum("bihc,bjhc,bijhc->bijh", fq, fk, decay.exp().expand(len(fq), t, t, heads, fq.shape[3]))
    a = a * some[..., None]
    mass = a.sum(2)
    o = torch.einsum("bijh,bjhv->bihv", a, v)
    return (o / torch.where(mass == 0, 1, mass)[..., None] if normalize else o), mass.log()


def whole_window(case):
    """(o, log mass, row maximum) of the window branch from the matrix of all its scores."""
    q, k, v = (case.tokens[x] for x in "qkv")
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    i, j = torch.arange(case.length)[:, None], torch.arange(case.length)
    seen = (j <= i) & ((j > i - case.options["window"]) | (j < case.options["anchors"]))
    s = torch.einsum("bihd,bjhd->bijh", q, k) * (case.options["scale"] or q.shape[3] ** -0.5)
    e = s.exp() * seen[..., None]
    sinks = case.weights["sinks"].exp().sum(-1) if "sinks" in case.weights else 0.0
    mass = e.sum(2) + sinks
    return (
        torch.einsum("bijh,bjhv->bihv", e, v) / mass[..., None],
        mass.log(),
        s.where(seen[..., None], -torch.inf).amax(2),
    )


def test_gated_is_its_formula():
    @examples(40, cases("gated", lengths=(1, 5, 9)))
    def check(case):
        options, dim = case.options, case.tokens["q"].shape[3]
        scale = options["scale"] or (1.0 if options["normalize"] else dim**-0.5)
        o, log_mass = whole_linear(
            case, case.tokens["q"], case.tokens["k"], options["window_offset"], scale, options["normalize"]
        )
        found = call(case, "naive")
        torch.testing.assert_close(found["o"], o)
        if options["normalize"]:
            torch.testing.assert_close(found["log"], log_mass)


def test_window_is_its_formula():
    @examples(30, cases("window", lengths=(1, 5, 9)))
    def check(case):
        found, (o, lse, _) = call(case, "naive"), whole_window(case)
        torch.testing.assert_close(found["o"], o)
        torch.testing.assert_close(found["log"], lse)


def test_hybrid_is_its_formula():
    @examples(60, cases("hybrid", lengths=(1, 5, 9)))
    def check(case):
        options, found = case.options, call(case, "naive")["o"]
        fq, fk = (wide(case.tokens[x], options["feature_map"]) for x in ("fq", "fk"))
        offset = options["window"] if options["coverage"] == "outside" else 0
        scale = 1.0 if options["normalize"] else fq.shape[3] ** -0.5
        o_lin, log_mass = whole_linear(case, fq, fk, offset, scale, options["normalize"])
        o_win, lse, row_max = whole_window(case)
        named = case.tokens | case.weights
        if options["mix"] == "sum":
            torch.testing.assert_close(found, o_lin + named.get("alpha", torch.ones(())).unsqueeze(-1) * o_win)
        else:
            log_window = lse - row_max if options["merge_mass"] == "relative" else lse
            share = torch.sigmoid(log_mass - log_window + named.get("merge_bias", torch.zeros(())))
            torch.testing.assert_close(found, share[..., None] * o_lin + (1 - share)[..., None] * o_win)


def wide(x, feature_map):
    """Features with nothing kept in log space."""
    phi, log_offset = expand_features(x, feature_map)
    return phi if log_offset is None else phi * log_offset.exp()[..., None]


@pytest.mark.parametrize("op", ["gated", "window", "hybrid"])
def test_packed_and_padded_rows_are_separate_sequences(op):
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()

    @examples(10, cases(op, B=2, T=9))
    def check(case):
        padded = call(case, "naive", padding_mask=mask)
        assert not padded["o"][~mask].any()
        for row in range(2):
            alone = call(case.part(slice(row, row + 1), mask[row]), "naive")
            for name, x in alone.items():
                whole = padded[name][row : row + 1]
                torch.testing.assert_close(whole if "state" in name else whole[:, mask[row]], x)
        one = case.part(slice(0, 1), slice(None))
        packed = call(one, "naive", cu_seqlens=torch.tensor([0, 4, 4, 9]))
        for n, piece in enumerate((slice(0, 4), slice(4, 4), slice(4, 9))):
            for name, x in call(one.part(slice(None), piece), "naive").items():
                torch.testing.assert_close(packed[name][n : n + 1] if "state" in name else packed[name][:, piece], x)
