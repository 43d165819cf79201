"""A hybrid attention layer as its formulas read, one query at a time in float64, and what tests of it share."""

import math

import torch

from lizard_layers import AttentionConfig, HybridAttention, State, tensors_of
from lizard_ops import apply_rotary

ZERO = torch.zeros((), dtype=torch.float64)
SHAPE = dict(hidden_size=24, num_heads=4, num_key_heads=2, head_dim=8)

FORMS = {
    "recommended": dict(anchors=3, merge_bias="head_and_token"),
    "paper": dict(
        num_sinks=4, coverage="all", window_rope=False, mix="sum", alpha="learned", gate="scalar", key_map="query_head"
    ),
    "printed": dict(
        num_sinks=3, sink_form="linear", sink_init=1.0, sink_spread=0.1, coverage="all", window_rope=False, mix="sum",
        feature_projection="shared", gate="scalar", gate_init=None,
    ),
    "lolcats": dict(gate="none", linear_rope=True, key_map="query_head", merge_bias="head", merge_bias_init=2.3),
    "liger": dict(
        coverage="all", normalize=False, feature_activation="one_sided_softmax", feature_projection="none",
        feature_scale=0.5, gate="pooling", gate_init=None, gate_temperature=16.0, mix="sum", alpha_init=0.5,
    ),
    "sinks_per_head": dict(num_sinks=2, sinks_per_head=True, anchors=1),
    "channel": dict(gate="channel", gate_rank=3, gate_temperature=16.0, tie_features=True, merge_bias="head_and_token"),
    "mamba2": dict(gate="mamba2", feature_activation="exp", mix="sum", alpha="per_head", key_map="query_head"),
    "no_denominator": dict(normalize=False, mix="sum", feature_projection="shared"),
    "narrow": dict(feature_dim=6, feature_dim_counts="features"),
    "absorbed": dict(gate_form="absorbed", feature_activation="exp", gate="scalar"),
    "one_sided": dict(feature_activation="one_sided_softmax", key_map="query_head", gate="none"),
    "linear_rope": dict(linear_rope=True, gate="pooling", anchors=1),
    "tied": dict(tie_features=True),
    "window_only": dict(linear_branch=False, anchors=2, num_sinks=2),
    "kept": dict(kept_keys=3, anchors=2, merge_bias="head_and_token", score_dim=6),
    "kept_by_head": dict(kept_keys=(4, 0), anchors=2, merge_bias="head_and_token", score_dim=6),
    "kept_by_head_beside_all": dict(
        kept_keys=[1, 3], coverage="all", mix="sum", gate="channel", gate_rank=3, key_map="query_head", score_dim=6,
        score_received=True,
    ),
    "kept_and_left": dict(kept_keys=2, coverage="left", anchors=1, score_dim=6),
    "kept_beside_all": dict(kept_keys=2, coverage="all", mix="sum", gate="scalar", key_map="query_head", score_dim=6),
    "received": dict(
        kept_keys=3, anchors=2, merge_bias="head_and_token", score_dim=6, score_received=True, score_stride=2,
    ),
    "received_by_each": dict(
        kept_keys=2, coverage="all", mix="sum", gate="scalar", key_map="query_head", score_dim=6, anchors=1,
        linear_rope=True, score_received=True, score_stride=1,
    ),
}  # fmt: skip


def layer(
    form: str, dtype: torch.dtype = torch.float64, window: int = 5, disturbed: bool = True, **changes
) -> HybridAttention:
    """A layer of a form, or of none with the defaults, with ``changes``; ``disturbed`` moves every parameter off its
    start, so that none is without effect."""
    torch.manual_seed(0)
    made = HybridAttention(AttentionConfig(**SHAPE, window=window, **FORMS.get(form, {}) | changes)).to(dtype)
    if disturbed:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
            if made.config.score_received:
                disturb_facts(made)
    return made


def disturb_facts(made: HybridAttention) -> None:
    """Move mean and deviation far off their start, and let what keys receive say much."""
    term = made.key_score.received
    term.mean.copy_(torch.randn_like(term.mean) - 1)
    term.deviation.copy_(0.5 + torch.rand_like(term.deviation))
    term.outer_weight.mul_(4)


def inputs(length: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1):
    """x, q, k, v of ``layer`` and the angles of positions 0 to length - 1."""
    draw = torch.Generator().manual_seed(seed)
    heads = [(SHAPE["num_heads"], 8), (SHAPE["num_key_heads"], 8), (SHAPE["num_key_heads"], 8)]
    x, q, k, v = (
        torch.randn(batch, length, *shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in [(SHAPE["hidden_size"],), *heads]
    )
    return x, q, k, v, angles(torch.arange(length), dtype)


def angles(positions: torch.Tensor, dtype: torch.dtype = torch.float64):
    """cos and sin [1, T, D] of RoPE at these positions."""
    frequencies = 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turn = (positions[:, None] * frequencies).repeat(1, 2)[None]
    return turn.cos().to(dtype), turn.sin().to(dtype)


def as_formulas_read(made: HybridAttention, x, q, k, v, rope) -> torch.Tensor:
    """o [B, T, Hq, D] by the docstring of ``AttentionChoices``, nothing shared with the ops."""
    config, group = made.config, made.config.num_heads // made.config.num_key_heads
    turned_q, turned_k = apply_rotary(q, *rope), apply_rotary(k, *rope)
    wq, wk = (turned_q, turned_k) if config.window_rope else (q, k)
    lq, lk = (turned_q, turned_k) if config.linear_rope else (q, k)
    o = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(config.num_heads):
            for i in range(q.shape[1]):
                o[b, i, h] = _one_query(made, x, wq, wk, lq, lk, k, v, b, h, h // group, i)
    return o


def _one_query(made, x, wq, wk, lq, lk, k, v, b, h, hk, i):
    config = made.config
    near = [j for j in range(i + 1) if j > i - config.window or j < config.anchors]
    kept = kept_keys(made, x[b], k[b], v[b], wq[b], wk[b], hk, i)
    window_keys = near + kept
    scores = torch.stack([wq[b, i, h] @ wk[b, j, hk] for j in window_keys]) / math.sqrt(config.head_dim)
    sinks = ZERO[None][:0]
    if config.num_sinks:
        sinks = made.sinks.logits[h] if config.sinks_per_head else made.sinks.logits
    sink_mass = sinks.exp().sum() if config.sink_form == "exp" else sinks.sum()
    mass_window = scores.exp().sum() + sink_mass
    o_window = sum(s.exp() * v[b, j, hk] for s, j in zip(scores, window_keys, strict=True)) / mass_window
    if not config.linear_branch:
        return o_window
    last = i if config.coverage == "all" else i - config.window
    weights, values = [], []
    for j in range(config.anchors, last + 1):
        if j in kept and config.coverage == "outside":
            continue
        decay = sum((log_decay(made, x, k, b, l, h, hk) for l in range(j + 1, i + 1)), ZERO).exp()
        query, key = features(made, lq[b, i, h], h, hk, "query"), features(made, lk[b, j, hk], h, hk, "key")
        weights.append((query * key * decay).sum())
        values.append(v[b, j, hk])
    if not weights:
        o_linear, mass_linear = torch.zeros_like(o_window), ZERO
    else:
        weights = torch.stack(weights)
        mass_linear = weights.sum()
        o_linear = (weights[:, None] * torch.stack(values)).sum(0)
        scale = config.feature_scale
        if config.normalize:
            o_linear = o_linear / mass_linear
        else:
            o_linear = o_linear * (config.num_features**-0.5 if scale is None else scale)
    if config.mix == "sum":
        alpha = made.mix.alpha
        alpha = config.alpha_init if alpha is None else alpha if alpha.ndim == 0 else alpha[h]
        return o_linear + alpha * o_window
    mass_window = mass_window / scores[: len(near)].max().exp()
    bias = ZERO
    if made.mix.bias is not None:
        bias = bias + made.mix.bias[h]
    if made.mix.weight is not None:
        bias = bias + made.mix.weight[h] @ x[b, i]
    share = mass_linear * bias.exp() / (mass_linear * bias.exp() + mass_window)
    return share * o_linear + (1 - share) * o_window


def kept_keys(made, x, k, v, wq, wk, hk, i) -> list[int]:
    """The best of the keys that have left the window of query i, larger score first, then the earlier position.

    Of one row; wq, wk: queries and keys as the window branch sees them.
    """
    config = made.config
    gone = range(config.anchors, i - config.window + 1) if config.kept_keys else []

    def score(j: int) -> float:
        found = key_score(made.key_score, x, k[:, hk], v[:, hk], hk, j)
        return (found + received_term(made, k, v, wq, wk, hk, j)).float().item()

    places = config.kept_keys[hk] if isinstance(config.kept_keys, tuple) else config.kept_keys
    return sorted(gone, key=lambda j: (-score(j), j))[:places]


def key_facts(k, v, j):
    """Log norms of key j and its value, and its likeness to the mean key."""
    mean = sum(y / y.norm() for y in k[: j + 1])
    return torch.stack([k[j].norm().log(), v[j].norm().log(), k[j] @ mean / (k[j].norm() * mean.norm())])


def key_score(made, x, k, v, hk, j):
    """The score of key j of one row and key head, as the docstring of ``KeyScore`` has it."""
    around = [x[j + o] if j + o >= 0 else torch.zeros_like(x[0]) for o in (-1, 0, 1, 2)]
    inner = sum(w @ y for w, y in zip(made.inner_weight, around, strict=True)) + made.inner_bias
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return made.outer_weight[hk] @ inner + made.linear_weight[hk] @ key_facts(k, v, j) + made.bias[hk]


def received_facts(config, wq, wk, hk, j):
    """What key j of one row receives inside its window, by the formulas of ``lizard_layers.received``."""
    window, group = config.window, config.num_heads // config.num_key_heads
    total, late, largest = 0.0, 0.0, 0.0
    for i in range(j + 2, min(j + window, len(wq))):
        if i % config.score_stride != config.score_stride - 1:
            continue
        near = [l for l in range(i + 1) if l > i - window or l < config.anchors]
        for h in range(hk * group, (hk + 1) * group):
            logits = [(wq[i, h] @ wk[l, hk]).item() * (config.scale or config.head_dim**-0.5) for l in near]
            if config.softcap is not None:
                logits = [config.softcap * math.tanh(logit / config.softcap) for logit in logits]
            weight = math.exp(logits[near.index(j)]) / sum(map(math.exp, logits))
            total, largest = total + weight, max(largest, weight)
            late += weight if i >= j + 3 * window // 4 else 0.0
    return torch.tensor([math.log(max(t, 1e-7)) for t in (total, late, largest)], dtype=torch.float64)


def received_term(made, k, v, wq, wk, hk, j):
    """What is added to the score of key j of one row and key head where scores read what keys receive."""
    if not made.config.score_received:
        return ZERO
    term = made.key_score.received
    facts = torch.cat([key_facts(k[:, hk], v[:, hk], j), received_facts(made.config, wq, wk, hk, j)])
    inner = term.inner_weight[hk].T @ ((facts - term.mean[hk]) / term.deviation[hk]) + term.inner_bias[hk]
    return term.outer_weight[hk] @ (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)


def assert_same_state(found: State, wanted: State, **tolerance: float) -> None:
    """Field by field; kept keys in the order of their positions, which is not that of their places after a step."""
    found, wanted = (in_order_of_position(tensors_of(state)) for state in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, field in found.items():
        torch.testing.assert_close(field, wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def in_order_of_position(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "kept_positions" not in tensors:
        return tensors
    # [N, P, heads], empty places first; or [N, P] of all heads, of the same position in the order of the heads
    order = tensors["kept_positions"].sort(dim=1, stable=True)[1]

    def sorted_places(t: torch.Tensor) -> torch.Tensor:
        return t.gather(1, order.view(*order.shape, *[1] * (t.ndim - order.ndim)).expand_as(t))

    return {name: sorted_places(t) if name.startswith("kept_") else t for name, t in tensors.items()}


def features(made, vector, h, hk, side):
    config, maps = made.config, made.feature_maps
    if config.feature_projection != "none":
        used = maps.key_map if side == "key" or config.tie_features else maps.query_map
        count = used.weight.shape[0]
        index = 0 if count == 1 else h if count == config.num_heads else hk
        vector = vector @ used.weight[index]
    both = [vector, -vector]
    return {
        "softmax": lambda: torch.cat([t.softmax(-1) for t in both]),
        "exp": lambda: torch.cat([t.exp() for t in both]),
        "one_sided_softmax": lambda: vector.softmax(-1),
    }[config.feature_activation]()


def log_decay(made, x, k, b, j, h, hk):
    config, gate = made.config, made.gate
    token = x[b, j]
    sigmoid = torch.nn.functional.logsigmoid
    if config.gate == "none":
        return ZERO
    if config.gate == "pooling":
        return sigmoid(k[b, j, hk].mean() + gate.start) / config.gate_temperature
    if config.gate == "channel":
        logits = (gate.up @ (gate.down @ token) + gate.bias).view(-1, config.num_features)
        return sigmoid(logits[h if config.key_map == "query_head" else hk]) / config.gate_temperature
    row = {"scalar": 0, "key_head": hk, "mamba2": hk}[config.gate]
    logit = gate.weight[row] @ token + gate.bias[row]
    if config.gate == "mamba2":
        return -gate.log_rate[row].exp() * torch.nn.functional.softplus(logit)
    return sigmoid(logit) / config.gate_temperature
