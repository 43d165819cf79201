"""The architectures that configurations of saved Lizards name."""

ARCHITECTURES = (
    "LizardLlamaForCausalLM",
    "LizardMistralForCausalLM",
    "LizardQwen2ForCausalLM",
    "LizardQwen3ForCausalLM",
    "LizardSmolLM3ForCausalLM",
    "LizardGemma2ForCausalLM",
    "LizardGemma3ForCausalLM",
)

OP = "lizard_attention"
"""The name of the operator at which vLLM cuts its graphs."""

TURN_OP = "lizard_turns"
"""The name of the operator that turns queries and keys of kept softmax layers, which no compiler looks into."""
