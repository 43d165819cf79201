"""A layer's attention weights as a matrix, and how far they are from those of softmax attention."""

import pytest
import torch
from layer_checks import SHAPE, inputs, layer

from benchmarks.quality.diagnosis.attention_weights import attention_divergence, attention_weights, check_readable
from lizard_layers import AttentionConfig, HybridAttention, apply_rope

EXP = dict(feature_activation="exp", anchors=2, feature_scale=0.5, merge_bias="head")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
READABLE = ["recommended", "lolcats", "sinks_per_head", "narrow", "window_only"]
OTHERS = {
    "exp": EXP,
    "pooling": dict(gate="pooling", anchors=1),
    "tied": dict(tie_features=True, gate="mamba2"),
    "one_sided": dict(feature_activation="one_sided_softmax", feature_dim=12, gate="scalar", window_rope=False),
    "softcap": dict(softcap=2.0, scale=0.7, anchors=2),
}


def made(form: str, **changes) -> HybridAttention:
    return layer(form, **OTHERS.get(form, {}) | changes)


def expanded(v: torch.Tensor) -> torch.Tensor:
    return v.repeat_interleave(SHAPE["num_heads"] // SHAPE["num_key_heads"], 2)


@pytest.mark.parametrize("form", [*READABLE, *OTHERS])
def test_the_output_is_the_weighted_sum_of_the_values(form):
    attention, (x, q, k, v, rope) = made(form), inputs(19)
    weights = attention_weights(attention, x, q, k, rope).exp()
    o = torch.einsum("bhrt,bthd->brhd", weights, expanded(v))
    torch.testing.assert_close(o, attention(x, q, k, v, rope)[0], rtol=1e-6, atol=1e-7)
    total = weights.sum(-1)
    assert (total < 1 + 1e-6).all() and (attention.sinks is not None or (total > 1 - 1e-6).all())


@pytest.mark.parametrize("form", ["recommended", "sinks_per_head", "pooling"])
def test_padding_gets_no_weight(form):
    attention, (x, q, k, v, rope) = made(form), inputs(19)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :4], mask[1, [3, 11, 17, 18]] = False, False
    weights = attention_weights(attention, x, q, k, rope, padding_mask=mask).exp()
    o = torch.einsum("bhrt,bthd->brhd", weights, expanded(v)) * mask[:, :, None, None]
    torch.testing.assert_close(o, attention(x, q, k, v, rope, padding_mask=mask)[0], rtol=1e-6, atol=1e-7)
    assert (weights * ~mask[:, None, None, :]).abs().max() == 0


def test_rows_are_those_asked_for():
    attention, (x, q, k, _, rope) = made("recommended"), inputs(19)
    at = torch.tensor([2, 18, 7])
    few = attention_weights(attention, x, q, k, rope, at)
    torch.testing.assert_close(few, attention_weights(attention, x, q, k, rope)[:, :, at])


@pytest.mark.parametrize(
    ("form", "rows", "sliding"),
    [
        *((form, 100, None) for form in [*READABLE[:4], *OTHERS]),
        ("recommended", 1, None),
        ("recommended", 4, 9),
        ("recommended", 100, 9),
    ],
)
def test_the_divergence_is_that_of_its_definition(form, rows, sliding):
    attention, (x, q, k, _, rope) = made(form), inputs(19)
    config = attention.config
    first, scale = 5 + config.anchors, config.scale or 8**-0.5
    chosen = [first + n * (19 - first) // min(rows, 19 - first) - 1 for n in range(1, min(rows, 19 - first) + 1)]
    assert chosen[-1] == 18 and (rows < 100 or chosen == list(range(first, 19)))
    log_w = attention_weights(attention, x, q, k, rope)
    turned_q, turned_k = apply_rope(q, *rope), apply_rope(k, *rope)
    wanted = torch.zeros(4, dtype=torch.float64)
    for batch in range(2):
        for h in range(4):
            for i in chosen:
                seen = [j for j in range(i + 1) if sliding is None or j > i - sliding]
                scores = scale * torch.stack([turned_q[batch, i, h] @ turned_k[batch, j, h // 2] for j in seen])
                p = (scores if config.softcap is None else config.softcap * (scores / config.softcap).tanh()).softmax(0)
                wanted[h] += (p * (p.log() - log_w[batch, h, i, seen])).sum()
    found = attention_divergence(attention, x, q, k, rope, rows=rows, sliding_window=sliding)
    torch.testing.assert_close(found, wanted / (2 * len(chosen)), rtol=1e-6, atol=1e-9)


def test_padded_sequences_diverge_as_they_do_alone():
    attention, (x, q, k, _, rope) = made("recommended"), inputs(24)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 19:] = False
    both = attention_divergence(attention, x, q, k, rope, rows=100, padding_mask=mask)
    alone = [
        attention_divergence(
            attention, x[b : b + 1, :end], q[b : b + 1, :end], k[b : b + 1, :end], tuple(t[:, :end] for t in rope)
        )
        for b, end in ((0, 24), (1, 19))
    ]
    torch.testing.assert_close(both, (16 * alone[0] + 11 * alone[1]) / 27)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_tell_keys_apart(dtype):
    """Of a fresh layer too, whose first rows have no key outside and whose maps are flat."""
    torch.manual_seed(0)
    attention = HybridAttention(AttentionConfig(**SHAPE, window=5, anchors=2, merge_bias="head_and_token"))
    x, q, k, _, rope = inputs(40, dtype=dtype)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.05)
    values = []
    for _ in range(30):
        loss = attention_divergence(attention, x, 4 * q, k, rope).mean()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in attention.parameters())
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert loss.dtype == torch.float32 and values[-1] < 0.6 * values[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["recommended", "lolcats", "exp", "softcap"])
def test_float32_gradients_are_those_of_float64(form, device):
    def gradients(dtype, device):
        attention = made(form).to(dtype).to(device)
        x, q, k, _, rope = inputs(150)
        x, q, k = (t.to(dtype).to(device).requires_grad_() for t in (x, q, k))
        rope = tuple(t.to(dtype).to(device) for t in rope)
        leaves = {"x": x, "q": q, "k": k} | dict(attention.named_parameters())
        loss = attention_divergence(attention, x, q, k, rope).mean()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {n: g.double().cpu() for n, g in zip(leaves, found, strict=True) if g is not None}

    wanted, found = gradients(torch.float64, "cpu"), gradients(torch.float32, device)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_short_rows_and_windows_alone_do_not_diverge():
    attention, (x, q, k, _, rope) = made("recommended"), inputs(8)
    assert torch.equal(attention_divergence(attention, x, q, k, rope), torch.zeros(4, dtype=torch.float64))
    x, q, k, _, rope = inputs(19)
    assert attention_divergence(made("window_only"), x, q, k, rope).abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mix="sum"), "need mix merge, got 'sum'"),
        (dict(coverage="all"), "need coverage outside, got 'all'"),
        (dict(gate="channel"), "need gate one of none, scalar.*got 'channel'"),
    ],
)
def test_forms_without_a_matrix_are_refused(changes, message):
    attention, (x, q, k, _, rope) = made("plain", **changes), inputs(19)
    for read in (attention_weights, attention_divergence):
        with pytest.raises(ValueError, match=message):
            read(attention, x, q, k, rope)
    check_readable(made("plain").config)
