"""What of vLLM's options a Lizard takes: the others are refused by name before a model is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

BLOCK = 512  # tokens between two states that prefix caching keeps, unless --block-size says otherwise


NO_LAYER = "lizard"


@contextlib.contextmanager
def true_types(config: Any) -> Iterator[Any]:
    """The configuration as the model was saved with it, while a model is made of it."""
    types = getattr(config, "layer_types", None)
    if types:
        config.layer_types = [kind for kind in types if kind != NO_LAYER]
    try:
        yield config
    finally:
        if types:
            config.layer_types = types


class LizardVllmConfig(VerifyAndUpdateConfig):
    """vLLM's hooks for the configuration of an architecture."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Keeps vLLM from taking a model for one of softmax layers alone.

        It does where all that ``layer_types`` names are full attention, as a teacher's are: one more name, of no layer,
        says that there is something else.
        """
        config = model_config.hf_config
        types = getattr(config, "layer_types", None)
        if types and len(types) == config.num_hidden_layers:
            config.layer_types = [*types, NO_LAYER]

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuses what is not there, and gives the two sizes of a block of prefix caching one value.

        Raises ValueError that names the option.
        """
        refuse(vllm_config)
        cache = vllm_config.cache_config
        if not cache.enable_prefix_caching:
            return
        if not cache.user_specified_block_size:
            # vLLM chooses a size later, after it has copied this one: on a CPU they then differ, and a text that is
            # found again reads another's state.
            cache.block_size, cache.user_specified_block_size = cache.mamba_block_size or BLOCK, True
        if cache.mamba_block_size is None:
            cache.mamba_block_size = cache.block_size
        check_blocks(vllm_config)


def check_blocks(vllm_config: Any) -> None:
    """Raises ValueError where states are kept for blocks of another size than those that texts are found by."""
    cache = vllm_config.cache_config
    if cache.enable_prefix_caching and cache.block_size != cache.mamba_block_size:
        raise ValueError(
            f"--block-size is {cache.block_size} and --mamba-block-size {cache.mamba_block_size}: prefix caching of a "
            "state of constant size wants both equal, or it hands out other texts' states; give one of them"
        )


def refuse(vllm_config: Any) -> None:
    """Raises ValueError for options that a Lizard has not."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    size, heads = parallel.tensor_parallel_size, vllm_config.model_config.hf_config.num_key_value_heads
    contexts = max(getattr(parallel, f"{part}_context_parallel_size", None) or 1 for part in ("decode", "prefill"))
    refused = {
        "--speculative-config": (vllm_config.speculative_config is not None, "a state cannot give drafts back"),
        "--tensor-parallel-size": (heads % size != 0, f"its {heads} key heads are split, wanted a divisor of them"),
        "--decode-context-parallel-size": (contexts > 1, "a state is not split by positions"),
        "--pipeline-parallel-size": (parallel.pipeline_parallel_size > 1, "layers are not split"),
        "--enable-lora": (vllm_config.lora_config is not None, "merge the adapter into the model"),
        "--kv-transfer-config": (vllm_config.kv_transfer_config is not None, "states are not sent"),
        "--kv-cache-dtype": (cache.cache_dtype != "auto", "states keep their dtypes"),
        "--mamba-cache-mode": (cache.mamba_cache_mode not in ("none", "align"), "wanted align"),
    }
    for option, (given, why) in refused.items():
        if given:
            raise ValueError(f"{option}: not with a Lizard model, {why}")
