"""What every form of the hybrid op checks and normalises first."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.features import FEATURE_MAPS, feature_dim
from lizard_ops.common.state import AttentionState


class HybridArguments(NamedTuple):
    """The arguments that checking brings into one form."""

    g: Tensor | None  # [B, T, Hg] or [B, T, Hk, F]
    sinks: Tensor | None  # [Hq, M]
    alpha: Tensor | None  # [Hq] or [B, T, Hq]
    merge_bias: Tensor | None  # [Hq] or [B, T, Hq]
    scale: float
    feature_scale: float


def hybrid_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    window: int,
    anchors: int,
    sinks: Tensor | None,
    sink_form: str,
    mix: str,
    alpha: float | Tensor | None,
    merge_bias: Tensor | None,
    merge_mass: str,
    coverage: str,
    feature_map: str,
    normalize: bool,
    scale: float | None,
    feature_scale: float | None,
    initial_state: AttentionState | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
) -> HybridArguments:
    """Raise ValueError for what does not fit; return what has several spellings in one."""
    checks.check_qkv(q, k, v)
    checks.check_choice("feature_map", feature_map, FEATURE_MAPS)
    checks.check_choice("mix", mix, ("sum", "merge"))
    checks.check_choice("merge_mass", merge_mass, ("relative", "absolute"))
    checks.check_choice("coverage", coverage, ("all", "outside"))
    checks.check_flag("normalize", normalize)
    checks.check_count("window", window, 1)
    checks.check_count("anchors", anchors, 0)
    checks.want(mix == "sum" or normalize, "normalize", normalize, 'True with mix="merge": it weighs two averages')
    checks.want(mix == "sum" or alpha is None, "alpha", alpha, 'None with mix="merge"; its weight is merge_bias')
    checks.want(mix == "merge" or merge_bias is None, "merge_bias", merge_bias, 'None with mix="sum"; use alpha')
    for name, x, heads in (("fq", fq, q.shape[2]), ("fk", fk, k.shape[2])):
        wanted = f"a floating tensor [B, T, {heads}, Fp]"
        checks.want(isinstance(x, Tensor) and x.ndim == 4 and x.shape[3] > 0, name, x, wanted)
        checks.check_tensor(name, x, (*q.shape[:2], heads, fq.shape[3]), q, checks.FLOATS)
    checks.want(fk.dtype == fq.dtype, "fk", fk, f"the dtype of fq, {fq.dtype}")
    features = feature_dim(fk.shape[3], feature_map)
    sequences = checks.check_sequences(q, cu_seqlens, padding_mask)
    g = checks.check_gate(g, q, k.shape[2], features, padding_mask)
    shapes = checks.window_state_shapes(sequences, k, v, window, anchors)
    offset = window if coverage == "outside" else 0
    shapes |= checks.linear_state_shapes(sequences, q, fk.shape[3], v, g, offset, features, feature_map)
    checks.check_state(initial_state, q, shapes)
    return HybridArguments(
        g,
        checks.check_sinks(sinks, q, sink_form),
        checks.check_head_weight("alpha", alpha, q, scalar=True),
        checks.check_head_weight("merge_bias", merge_bias, q, scalar=False),
        checks.check_scale("scale", scale, q.shape[3] ** -0.5),
        checks.check_scale("feature_scale", feature_scale, 1.0 if normalize else features**-0.5),
    )
