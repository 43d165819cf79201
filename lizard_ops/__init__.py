"""Gated linear attention, sliding-window attention and both in one pass."""

from lizard_ops.common.state import AttentionState
from lizard_ops.gated_attn.naive import naive_gated_attn
from lizard_ops.hybrid_attn.naive import naive_hybrid_attn
from lizard_ops.window_attn.naive import naive_window_attn

__all__ = ["AttentionState", "naive_gated_attn", "naive_hybrid_attn", "naive_window_attn"]
