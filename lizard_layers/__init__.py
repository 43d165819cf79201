"""Modules of hybrid attention: feature maps, gates, meta memory and the layer they make. No transformers."""

from lizard_layers.anchor_block import AnchorBlock, turn_by
from lizard_layers.config import LOOK_AHEAD, AttentionChoices, AttentionConfig
from lizard_layers.earlier_ranks import EarlierRanks
from lizard_layers.feature_map import FeatureMaps, HedgehogFeatureMap
from lizard_layers.gate import ChannelGate, Mamba2Gate, PoolingGate, SigmoidGate, build_gate
from lizard_layers.hybrid_attention import HybridAttention, PagedState
from lizard_layers.key_score import KeyScore, ReceivingState, ScoreState
from lizard_layers.meta_memory import MetaMemory
from lizard_layers.mix import MergeMix, SumMix
from lizard_layers.one_text import text_step_of
from lizard_layers.packed_blocks import PackedBlock
from lizard_layers.parameters import Float32Module
from lizard_layers.received import InWindow, WindowForm
from lizard_layers.split import config_of_rank, part_of_rank, sizes_of_rank
from lizard_layers.state import (
    LayerState,
    State,
    clear_state,
    copy_together,
    empty_state,
    map_state,
    moved_state,
    overwrite_layer_state,
    page_layout,
    select_sequences,
    state_bytes,
    state_of,
    tensors_of,
)
from lizard_ops import AttentionState

__all__ = [
    "LOOK_AHEAD",
    "AnchorBlock",
    "AttentionChoices",
    "AttentionConfig",
    "AttentionState",
    "ChannelGate",
    "EarlierRanks",
    "FeatureMaps",
    "Float32Module",
    "HedgehogFeatureMap",
    "HybridAttention",
    "InWindow",
    "Mamba2Gate",
    "KeyScore",
    "LayerState",
    "MergeMix",
    "MetaMemory",
    "PackedBlock",
    "PagedState",
    "PoolingGate",
    "ReceivingState",
    "ScoreState",
    "SigmoidGate",
    "SumMix",
    "State",
    "WindowForm",
    "build_gate",
    "clear_state",
    "config_of_rank",
    "empty_state",
    "map_state",
    "moved_state",
    "copy_together",
    "overwrite_layer_state",
    "page_layout",
    "part_of_rank",
    "select_sequences",
    "sizes_of_rank",
    "state_bytes",
    "state_of",
    "tensors_of",
    "text_step_of",
    "turn_by",
]
