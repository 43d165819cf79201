"""What every form of the window op checks and normalises first."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.state import AttentionState


def window_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    anchors: int,
    sinks: Tensor | None,
    sink_form: str,
    scale: float | None,
    initial_state: AttentionState | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor | None, float]:
    """Raise ValueError for what does not fit; return the sinks as [Hq, M] or None and the scale as a float."""
    checks.check_qkv(q, k, v)
    checks.check_count("window", window, 1)
    checks.check_count("anchors", anchors, 0)
    sequences = checks.check_sequences(q, cu_seqlens, padding_mask)
    checks.check_state(initial_state, q, checks.window_state_shapes(sequences, k, v, window, anchors))
    return checks.check_sinks(sinks, q, sink_form), checks.check_scale("scale", scale, q.shape[3] ** -0.5)
