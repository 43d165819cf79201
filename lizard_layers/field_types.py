"""Values of a dataclass checked against the annotations of its fields."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_fields(instance: Any) -> None:
    """Raise ValueError for a field of a dataclass whose value its annotation does not allow.

    Understands Literal, None, bool, int, float (an int will do), str, tuples of one of these, and dataclasses.
    """
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        value = getattr(instance, name)
        if not allows(hint, value):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{type(instance).__name__}.{name} must be {wanted}, got {value!r}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)  # a millisecond, for what never changes


def allows(hint: Any, value: Any) -> bool:
    """Whether an annotation that ``check_fields`` understands allows a value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        members = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(members) and all(map(allows, members, value))
    if args:  # a union
        return any(allows(arg, value) for arg in args)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
