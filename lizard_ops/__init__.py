"""Gated linear attention, window attention with sinks and anchors, both in one pass, and what stands around them."""

from lizard_ops.common.autocast import without_autocast
from lizard_ops.common.checks import checked
from lizard_ops.common.direct import nobody_looks
from lizard_ops.common.features import expand_features
from lizard_ops.common.padding import Compaction, compact, compaction, packed_cumsum, restore
from lizard_ops.common.pages import PageLayout, PoolRows
from lizard_ops.common.state import EMPTY_VALUES, AttentionState, overwrite_state
from lizard_ops.context_parallel.earlier import EarlierTokens, earlier_tokens
from lizard_ops.feature_projection.api import project_both, project_heads
from lizard_ops.few_tokens.api import TokenHeads, token_heads
from lizard_ops.gate.api import gate_and_bias
from lizard_ops.gated_attn.api import chunk_gated_attn, recurrent_gated_attn
from lizard_ops.gated_attn.naive import naive_gated_attn
from lizard_ops.hybrid_attn.api import chunk_hybrid_attn, recurrent_hybrid_attn
from lizard_ops.hybrid_attn.heads import hybrid_heads
from lizard_ops.hybrid_attn.kept_text import ScoreOf
from lizard_ops.hybrid_attn.naive import naive_hybrid_attn
from lizard_ops.hybrid_attn.ranks import context_state
from lizard_ops.hybrid_attn.text_step import KeptTextStep, TextStep, text_step, turn_matrix
from lizard_ops.key_expiry.api import key_expiry
from lizard_ops.key_expiry.arguments import NEVER, Expiries, ExpiryState
from lizard_ops.key_expiry.naive import naive_key_expiry
from lizard_ops.key_score.api import key_score_step
from lizard_ops.key_score.arguments import KeyScoreState, KeyScoreWeights, ReceivedInputs, ReceivedWeights
from lizard_ops.lm_loss.api import row_losses
from lizard_ops.mlp.api import silu_product
from lizard_ops.norm.api import add_rms_norm, rms_norm
from lizard_ops.norm.row import rms_norm_row
from lizard_ops.rotary.api import apply_rotary, apply_rotary_by, rotary_both
from lizard_ops.tuning import tune, use_tuned
from lizard_ops.window_attn.api import window_attn
from lizard_ops.window_attn.naive import naive_window_attn

__all__ = [
    "EMPTY_VALUES",
    "NEVER",
    "AttentionState",
    "Compaction",
    "EarlierTokens",
    "Expiries",
    "ExpiryState",
    "KeyScoreState",
    "KeyScoreWeights",
    "KeptTextStep",
    "PageLayout",
    "PoolRows",
    "ReceivedInputs",
    "ReceivedWeights",
    "ScoreOf",
    "TextStep",
    "TokenHeads",
    "add_rms_norm",
    "apply_rotary",
    "apply_rotary_by",
    "checked",
    "chunk_gated_attn",
    "chunk_hybrid_attn",
    "compact",
    "compaction",
    "context_state",
    "earlier_tokens",
    "expand_features",
    "gate_and_bias",
    "hybrid_heads",
    "key_expiry",
    "key_score_step",
    "naive_gated_attn",
    "naive_hybrid_attn",
    "naive_key_expiry",
    "naive_window_attn",
    "nobody_looks",
    "overwrite_state",
    "packed_cumsum",
    "project_both",
    "project_heads",
    "recurrent_gated_attn",
    "recurrent_hybrid_attn",
    "restore",
    "rms_norm",
    "rms_norm_row",
    "rotary_both",
    "row_losses",
    "silu_product",
    "text_step",
    "token_heads",
    "tune",
    "turn_matrix",
    "use_tuned",
    "window_attn",
    "without_autocast",
]
