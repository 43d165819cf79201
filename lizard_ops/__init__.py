"""Gated linear attention, window attention with sinks and anchors, and both in one pass."""

from lizard_ops.common.checks import checked
from lizard_ops.common.state import AttentionState
from lizard_ops.feature_projection.api import project_heads
from lizard_ops.gated_attn.api import chunk_gated_attn, recurrent_gated_attn
from lizard_ops.gated_attn.naive import naive_gated_attn
from lizard_ops.hybrid_attn.api import chunk_hybrid_attn, recurrent_hybrid_attn
from lizard_ops.hybrid_attn.naive import naive_hybrid_attn
from lizard_ops.rotary.api import turn_heads
from lizard_ops.tuning import tune, use_tuned
from lizard_ops.window_attn.api import window_attn
from lizard_ops.window_attn.naive import naive_window_attn

__all__ = [
    "AttentionState",
    "checked",
    "chunk_gated_attn",
    "chunk_hybrid_attn",
    "naive_gated_attn",
    "naive_hybrid_attn",
    "naive_window_attn",
    "project_heads",
    "recurrent_gated_attn",
    "recurrent_hybrid_attn",
    "tune",
    "turn_heads",
    "use_tuned",
    "window_attn",
]
