"""Gates per channel where the channel that decays slowest holds nothing: the mass is in others, however small it is."""

from __future__ import annotations

import pytest
import torch

import lizard_ops
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.formula import hybrid_formula

B, T, HQ, HK, V = 2, 37, 4, 2, 5


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def by_logs(fq, fk, v, g, offset):
    """o of features exp and all keys but the newest ``offset``, as a softmax over keys and channels at once."""
    log_q, log_k, v, g = (
        x.repeat_interleave(HQ // x.shape[2], 2) for x in (torch.cat([fq, -fq], 3), torch.cat([fk, -fk], 3), v, g)
    )
    i, j = torch.arange(T)[:, None], torch.arange(T)
    decay = g.unsqueeze(2).where((i > j)[..., None, None], 0.0).cumsum(1)  # [B, i, j, H, F]
    log = (log_q.unsqueeze(2) + log_k.unsqueeze(1) + decay)[:, offset:]
    log = log.masked_fill((j > i - offset)[offset:, :, None, None], -torch.inf)
    weights = log.movedim(2, 4).flatten(3).softmax(-1).unflatten(3, (-1, T)).sum(3)  # [B, i, H, j]
    return torch.einsum("bihj,bjhv->bihv", weights, v)


def with_gradients(op, *leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = op(*leaves)
    return [o.detach(), *torch.autograd.grad((o.double() * normal(*o.shape)).sum(), leaves)]


@pytest.mark.parametrize("coverage", ["all", "outside"])
def test_exp_features_keep_the_mass_of_fast_channels(coverage):
    """The first key outweighs all others by far, in channels that decay to exp(-140) of it; others do not decay."""
    offset = 3 if coverage == "outside" else 0
    fq, fk = normal(B, T, HQ, 3) + 150, normal(B, T, HK, 3) + 150 + 400 * (torch.arange(T) == 0).view(-1, 1, 1)
    v, g = normal(B, T, HK, V), -4 * normal(B, T, HK, 6).abs()
    g[..., 3:] = 0.0  # of exp(-x), where nothing is

    def op(fq, fk, v, g):
        q, k = torch.zeros_like(fq), torch.zeros_like(fk)
        more = {"alpha": 0.0, "feature_map": "exp", "coverage": coverage, "impl": "torch"}
        return lizard_ops.chunk_hybrid_attn(q, k, v, fq, fk, g, 3, **more)[0][:, offset:]

    exact = with_gradients(lambda *x: by_logs(*x, offset), fq, fk, v, g)
    found = with_gradients(op, *(x.float() for x in (fq, fk, v, g)))
    for name, a, b in zip(("o", "d fq", "d fk", "d v", "d g"), found, exact, strict=True):
        size = 2e-5 * max(1.0, exact[3].abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=size, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("feature_map", ["identity", "softmax"])
def test_expired_keys_keep_the_mass_of_fast_channels(feature_map):
    """Keys that expire have decayed by exp(-100) in all channels but one, in which they have no features."""
    window = 25
    fq, fk = normal(B, T, HQ, 3), normal(B, T, HK, 3)
    if feature_map == "identity":
        fq, fk = fq.abs(), fk.abs()
        fk[..., 0] = 0.0
    else:
        fk[..., 0] -= 200.0
    v, g = normal(B, T, HK, V), -5 * normal(B, T, HK, 3 if feature_map == "identity" else 6).abs()
    g[..., 0] = 0.0
    if feature_map == "softmax":
        g[..., 3:] -= 4.0
    ends = lizard_ops.key_expiry(normal(B, T, HK), window, 0, 2).expiry
    more = {"feature_map": feature_map, "coverage": "outside", "expiry": ends, "kept_keys": 2, "alpha": 0.0}

    def op(fq, fk, v, g):
        q, k = torch.zeros_like(fq), torch.zeros_like(fk)
        return lizard_ops.chunk_hybrid_attn(q, k, v, fq, fk, g, window, impl="torch", **more)[0]

    def formula(fq, fk, v, g):
        q, k = torch.zeros_like(fq), torch.zeros_like(fk)
        alpha = fq.new_zeros(HQ)
        options = HybridOptions(window, coverage="outside", feature_map=feature_map, scale=1.0, feature_scale=1.0)
        return hybrid_formula(HybridInputs(q, k, v, fq, fk, g, alpha=alpha, expiry=ends), options)

    exact = with_gradients(formula, fq, fk, v, g)
    found = with_gradients(op, *(x.float() for x in (fq, fk, v, g)))
    for name, a, b in zip(("o", "d fq", "d fk", "d v", "d g"), found, exact, strict=True):
        if feature_map == "identity" and name != "d v":  # of a feature of zero it is as large as one over the mass
            a, b = a[..., 1:], b[..., 1:]
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("feature_map, expires", [("exp", False), ("exp", True), ("softmax", True), ("identity", True)])
def test_second_derivatives_are_those_of_finite_differences(feature_map, expires, monkeypatch):
    monkeypatch.setattr("lizard_ops.gated_attn.chunk_torch.CHANNEL_GATE_CHUNK", 3)
    features = 2 if feature_map == "identity" else 4
    inputs = [normal(1, 7, 2, 2), normal(1, 7, 1, 2), normal(1, 7, 1, 3), -normal(1, 7, 1, features).abs()]
    more = {"feature_map": feature_map, "coverage": "outside", "alpha": 0.0, "impl": "torch"}
    if expires:
        more |= {"kept_keys": 2, "expiry": lizard_ops.key_expiry(normal(1, 7, 1), 2, 0, 2).expiry}

    def op(fq, fk, v, g):
        q, k = torch.zeros_like(fq), torch.zeros_like(fk)
        fq, fk = (x.abs() + 0.1 if feature_map == "identity" else x for x in (fq, fk))
        return lizard_ops.chunk_hybrid_attn(q, k, v, fq, fk, g, 2, **more)[0]

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)
