"""vLLM's side of a batch: which page holds the state of which sequence, and where its tokens are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder

from lizard_models.model.positions import moves_anchors, position_range
from lizard_vllm.pages import Steps

NOBODY = 0  # vLLM's page of padding
STEPS = "steps"  # their key in what one layer makes for those after it


@dataclass
class LizardMetadata(BaseMambaAttentionMetadata):
    """vLLM's metadata of layers with a state, and what anchors that move on want to know."""

    prefill_lengths: list[int] = field(default_factory=list)
    prefill_begins: list[int] = field(default_factory=list)
    far: bool = False
    made: dict[Any, Any] = field(default_factory=dict)  # what one layer makes for those after it

    def steps(self, made: dict[Any, Any]) -> Steps:
        """The batch as ``read_batch`` takes it, once in ``made``."""
        if STEPS not in made:
            made[STEPS] = self._steps()
        return made[STEPS]

    def _steps(self) -> Steps:
        device = self.seq_lens.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        decodes, prefills = self.state_indices_tensor_d, self.state_indices_tensor_p
        starts, has = self.query_start_loc_p, self.has_initial_states_p
        return Steps(
            decode_slots=none if decodes is None else somebody(decodes[:, 0]),
            prefill_slots=none if not self.num_prefills or prefills is None else somebody(prefills),
            prefill_starts=none.new_zeros(1) if starts is None else starts,
            has_state=none.bool() if has is None else has,
            prefill_lengths=self.prefill_lengths,
            prefill_begins=self.prefill_begins,
            far=self.far,
        )


def somebody(pages: Tensor) -> Tensor:
    """Pages with -1 for vLLM's padding."""
    return torch.where(pages == NOBODY, -1, pages)


class LizardMetadataBuilder(BaseMambaAttentionMetadataBuilder[LizardMetadata]):
    """Adds to vLLM's own builder what it knows on the host."""

    metadata_cls = LizardMetadata
    needs_causal_conv1d_metadata = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = vllm_config.model_config.hf_config
        self.limit = position_range(config).limit if moves_anchors(config) else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any
    ) -> LizardMetadata:
        common = common_attn_metadata
        made = super().build(common_prefix_len, common, fast_build, **kwargs)
        ends, lengths, begins = common.seq_lens_cpu_upper_bound, [], []
        if made.num_prefills:
            starts = common.query_start_loc_cpu[-made.num_prefills - 1 :]
            lengths = starts.diff().tolist()
            begins = (ends[made.num_reqs - made.num_prefills : made.num_reqs] - starts.diff()).tolist()
        far = self.limit is not None and bool((ends > self.limit).any())
        return replace(made, prefill_lengths=lengths, prefill_begins=begins, far=far, made={})

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> LizardMetadata:
        """One graph of a step must do before and past the limit."""
        return replace(super().build_for_cudagraph_capture(common_attn_metadata), far=self.limit is not None, made={})

    def update_block_table(self, metadata: LizardMetadata, *args: Any, **kwargs: Any) -> LizardMetadata:
        return replace(super().update_block_table(metadata, *args, **kwargs), made={})


class LizardBackend(AttentionBackend):
    """Layers of constant-size state, one page a sequence."""

    @staticmethod
    def get_name() -> str:
        return "LIZARD"

    @staticmethod
    def get_builder_cls() -> type[LizardMetadataBuilder]:
        return LizardMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
