"""Modules that others look into."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as of_all

IDLE = "transformers.utils.output_capturing"  # whose hooks read, and only where outputs are asked for


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, stand around what this module computes."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return "forward" in module.__dict__
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in module.__dict__ or any(getattr(hook, "__module__", None) != IDLE for hook in hooks)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of this module is its class's forward and nothing else, so that it may be computed without."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooks or "forward" in own or own.get("_compiled_call_impl") is not None:
        return False
    return not (
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )


def linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)``; of a bare Linear without the way through a module, which takes as long as a small product."""
    own = module._parameters
    if type(module) is not nn.Linear or own.get("weight") is None or not is_bare(module):
        return module(x)
    return F.linear(x, own["weight"], own["bias"])
