"""Modules that others look into."""

from __future__ import annotations

from torch import nn

IDLE = "transformers.utils.output_capturing"  # whose hooks read, and only where outputs are asked for


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, stand around what this module computes."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return "forward" in module.__dict__
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in module.__dict__ or any(getattr(hook, "__module__", None) != IDLE for hook in hooks)
