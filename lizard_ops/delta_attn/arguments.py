"""What every form of the delta op checks and normalises first."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.state import AttentionState


def delta_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    window_offset: int,
    anchors: int,
    initial_state: AttentionState | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor, float]:
    """Raise ValueError for what does not fit; return the gate as [B, T, 1 or Hk], beta, and the scale as a float."""
    checks.check_qkv(q, k, v)
    checks.check_count("window_offset", window_offset, 0)
    checks.check_count("anchors", anchors, 0)
    sequences = checks.check_sequences(q, cu_seqlens, padding_mask)
    g = checks.check_gate(g, q, k.shape[2], k.shape[3], padding_mask)
    checks.check_delta_gate(g, v)
    strengths = checks.check_beta(beta, q, k.shape[2], padding_mask)
    if strengths is None:
        checks.refuse("beta", beta, f"a float32 or float64 tensor of shape {(*q.shape[:2], k.shape[2])}")
    checks.check_state(initial_state, q, delta_state_shapes(sequences, q, k.shape[3], v, g, window_offset, "identity"))
    return g, strengths, checks.check_scale("scale", scale, 1.0)


def delta_state_shapes(
    n: int, q: Tensor, k_dim: int, v: Tensor, g: Tensor | None, offset: int, feature_map: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of the state fields of a delta memory, as ``check_state`` wants them; k_dim: features as given."""
    features = 2 * k_dim if feature_map == "softmax" else k_dim
    gate = g if g is None or g.shape[2] in (1, v.shape[2]) else None
    shapes = checks.linear_state_shapes(n, q[:, :, : v.shape[2]], k_dim, v, gate, offset, features, feature_map)
    if offset:
        shapes["ring_beta"] = (n, offset, v.shape[2])
    return shapes
