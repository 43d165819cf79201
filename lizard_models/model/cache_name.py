"""What transformers calls the cache of a forward: ``past_key_values`` up to 5.23, ``cache`` since. Ours take either."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

OURS = "past_key_values"
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else OURS


def either_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with an argument ``past_key_values`` that takes it under transformers' name, too, for which
    ``generate`` looks in its signature."""
    if CACHE == OURS:
        return forward

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs and isinstance(
            kwargs[CACHE], Cache | None
        ):  # pages of continuous batching are none, and stay where they are
            cache = kwargs.pop(CACHE)
            if kwargs.get(OURS) not in (None, cache):
                raise ValueError(f"{CACHE} and {OURS} are both given; wanted one of them")
            kwargs[OURS] = cache
        return forward(self, *args, **kwargs)

    written = inspect.signature(forward)
    *named, rest = written.parameters.values()  # the last takes any others
    added = inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None)
    renamed.__signature__ = written.replace(parameters=[*named, added, rest])  # type: ignore[attr-defined]
    return renamed


def transformers_names(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward under the names that transformers' own forwards have for them."""
    return {CACHE if name == OURS else name: value for name, value in inputs.items()}
