"""What every form of the gated op checks and normalises first."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.state import AttentionState


def gated_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    normalize: bool,
    window_offset: int,
    anchors: int,
    initial_state: AttentionState | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor | None, float]:
    """Raise ValueError for what does not fit; return the gate as [B,T,Hg] or [B,T,Hk,K] and the scale as a float."""
    checks.check_qkv(q, k, v)
    checks.check_flag("normalize", normalize)
    checks.check_count("window_offset", window_offset, 0)
    checks.check_count("anchors", anchors, 0)
    sequences = checks.check_sequences(q, cu_seqlens, padding_mask)
    g = checks.check_gate(g, q, k.shape[2], k.shape[3], padding_mask)
    shapes = checks.linear_state_shapes(sequences, q, k.shape[3], v, g, window_offset, k.shape[3], "identity")
    checks.check_state(initial_state, q, shapes)
    return g, checks.check_scale("scale", scale, 1.0 if normalize else k.shape[3] ** -0.5)
