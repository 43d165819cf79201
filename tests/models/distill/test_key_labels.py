"""Labels of keys against the dense formula, and what they mean: the error that dropping a key leaves."""

import math

import pytest
import torch

from lizard_models.distill.key_labels import TeacherAttention, key_labels

HEADS, KEY_HEADS, DIM, VALUES, HIDDEN = 4, 2, 6, 5, 9
BIASED = dict(output_bias=torch.linspace(-2, 3, HIDDEN))


def attention(length: int, batch: int = 2, **changes) -> TeacherAttention:
    draw = torch.Generator().manual_seed(length)
    shapes = ((batch, length, HEADS, DIM), (batch, length, KEY_HEADS, DIM), (batch, length, KEY_HEADS, VALUES))
    tensors = [torch.randn(shape, generator=draw) for shape in (*shapes, (HIDDEN, HEADS * VALUES))]
    return TeacherAttention(*tensors, **dict(scale=0.7) | changes)


def dense(given: TeacherAttention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention [B, Hq, T, T], W_o^h v_j [B, Hq, T, hidden] and outputs [B, T, hidden] in float64, all at once."""
    group = HEADS // KEY_HEADS
    q, k, v = (t.double().transpose(1, 2) for t in given[:3])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * given.scale
    if given.softcap is not None:
        scores = given.softcap * (scores / given.softcap).tanh()
    places = torch.arange(q.shape[2])
    behind = places[:, None] - places
    seen = (behind >= 0) & (behind < (given.sliding_window or q.shape[2]))
    a = torch.where(seen, scores, -torch.inf).softmax(-1)
    weight = given.output_weight.double().view(HIDDEN, HEADS, VALUES)
    moved = torch.einsum("ohd,bhjd->bhjo", weight, v)
    o = (a @ moved).sum(1)
    return a, moved, o if given.output_bias is None else o + given.output_bias.double()


def wanted(given: TeacherAttention, window: int, kind: str, queries: int = 1) -> torch.Tensor:
    a, moved, o = dense(given)
    length = a.shape[-1]
    later = torch.arange(length)[:, None] >= torch.arange(length) + window
    a = a * later
    if kind == "attention":
        lost = a.amax(2).unflatten(1, (KEY_HEADS, -1)).amax(2).clamp(min=1e-12).log()
    else:
        terms = (a * moved.norm(dim=-1)[:, :, None] / o.norm(dim=-1)[:, None, :, None]).square()
        lost = (terms.sum(2) / later.sum(0)).unflatten(1, (KEY_HEADS, -1)).sum(2).clamp(min=1e-24).log() / 2
    labels = lost.transpose(1, 2)
    labels[:, later.sum(0) < queries] = math.nan
    return labels


@pytest.mark.parametrize("kind", ["output", "attention"])
@pytest.mark.parametrize("changes", [{}, dict(softcap=1.5), dict(sliding_window=11), dict(scale=6.0), BIASED])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_dense_formula(kind, changes, block):
    for length, window in ((23, 5), (23, 22), (6, 1)):
        given = attention(length, **changes)
        labels = key_labels(given, window, kind, block)
        assert labels.dtype == torch.float32
        torch.testing.assert_close(labels.double(), wanted(given, window, kind), atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["output", "attention"])
def test_keys_that_no_later_query_sees_have_no_label(kind):
    for length, window in ((9, 9), (9, 20), (1, 1)):
        assert key_labels(attention(length), window, kind).isnan().all()
    labels = key_labels(attention(9), 7, kind)
    assert labels[:, :2].isfinite().all() and labels[:, 2:].isnan().all()
    blind = key_labels(attention(9, sliding_window=4), 4, kind)  # no key is seen once it has left
    torch.testing.assert_close(blind[:, :5], torch.full_like(blind[:, :5], math.log(1e-12)))


@pytest.mark.parametrize("kind", ["output", "attention"])
def test_keys_with_few_later_queries_have_no_label(kind):
    given = attention(23)
    for queries in (1, 2, 18, 19):
        labels = key_labels(given, 5, kind, 7, queries)
        assert labels.isfinite().any(-1).sum(1).tolist() == [19 - queries] * 2
        expected = wanted(given, 5, kind, queries)
        torch.testing.assert_close(labels.double(), expected, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_keys_of_equal_use_have_one_label_wherever_they_stand():
    """Attention that is the same from every query to every key it sees but for the softmax's share."""
    given = attention(60, batch=1)
    given = given._replace(q=torch.zeros_like(given.q), v=torch.ones_like(given.v))
    labels = key_labels(given, 5)[0, :50, 0]
    shares = [sum((1 / (i + 1)) ** 2 for i in range(j + 5, 60)) / (55 - j) for j in range(50)]
    torch.testing.assert_close(labels - labels[0], torch.tensor(shares).log() / 2 - math.log(shares[0]) / 2)


def test_a_label_is_the_error_that_a_dropped_key_leaves():
    """One later query, one query head of the key head: exp(label) is |o - o without the key's term| / |o|."""
    given = attention(8)
    a, moved, o = dense(given)
    draw = key_labels(given, 7, "output")[:, 0].double()  # key 0, query 7
    for head in range(KEY_HEADS):
        both = [a[:, h, 7, 0, None] * moved[:, h, 0] for h in (2 * head, 2 * head + 1)]
        error = sum(term.square().sum(-1) for term in both).sqrt() / o[:, 7].norm(dim=-1)
        torch.testing.assert_close(draw[:, head].exp(), error, atol=1e-6, rtol=1e-4)


def test_half_precision_is_read_in_float32_without_gradients():
    given = attention(12)
    half = given._replace(**{name: getattr(given, name).bfloat16() for name in ("q", "k", "v", "output_weight")})
    full = half._replace(**{name: getattr(half, name).float() for name in ("q", "k", "v", "output_weight")})
    half.q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        labels = key_labels(half, 3)
    assert not labels.requires_grad
    torch.testing.assert_close(labels, key_labels(full, 3), equal_nan=True)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, dict(window=0), "window must be at least 1, got 0"),
        ({}, dict(block=0), "block must be at least 1, got 0"),
        ({}, dict(queries=0), "queries must be at least 1, got 0"),
        ({}, dict(kind="l3"), "kind must be 'output' or 'attention', got 'l3'"),
        (dict(k=torch.zeros(2, 9, 3, DIM)), {}, r"k has shape \(2, 9, 3, 6\), wanted \(2, 9, a divisor of 4, 6\)"),
        (dict(v=torch.zeros(2, 8, KEY_HEADS, VALUES)), {}, r"v has shape \(2, 8, 2, 5\), wanted \(2, 9, 2\)"),
        (dict(output_weight=torch.zeros(9, 7)), {}, r"output_weight has shape \(9, 7\), wanted \(hidden, 20\)"),
    ],
)
def test_what_is_refused(fields, options, message):
    with pytest.raises(ValueError, match=message):
        key_labels(attention(9)._replace(**fields), **dict(window=3) | options)
