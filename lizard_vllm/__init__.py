"""Lizard models in vLLM: a plugin that registers every family. vLLM calls ``register`` through its entry point.

Importing this imports neither vLLM nor torch's CUDA.
"""

from __future__ import annotations

BACKEND = "LIZARD"
"""The name of the attention backend among those of layers with a constant-size state."""


def register() -> None:
    """Tell vLLM of the families' architectures, of what their configurations must be, and of their backend.

    Called in every process of an engine, any number of times. Classes are named and not imported, so that nothing
    touches a device before vLLM has forked.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    import lizard_models  # noqa: F401  registers the configurations with transformers
    from lizard_vllm.checks import LizardVllmConfig
    from lizard_vllm.names import ARCHITECTURES

    if not hasattr(MambaAttentionBackendEnum, BACKEND):
        MambaAttentionBackendEnum.register(BACKEND, "lizard_vllm.backend.LizardBackend")
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"lizard_vllm.models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = LizardVllmConfig
