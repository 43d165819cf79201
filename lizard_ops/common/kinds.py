"""Kinds of calls whose arguments were accepted once: a small op takes less time than the checks of its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lizard_ops.common.direct import PLAIN

MOST = 256  # kinds that one op remembers
Kind = tuple[Any, ...]


class Kinds:
    """What an op remembers of the calls that it has accepted."""

    def __init__(self) -> None:
        self.known: dict[Kind, dict[Any, Any]] = {}

    def check(
        self, tensors: tuple[Any, ...], others: tuple[Any, ...], check: Callable[[], None], traced: bool | None = None
    ) -> dict[Any, Any] | None:
        """Where to keep what else is known of such calls; None where none is remembered.

        Calls ``check``, which raises for what does not fit, unless it has accepted tensors of these shapes, dtypes
        and devices with these other arguments.

        While torch.compile traces it always does: a trace that looked at what is known would be one for that. traced:
        whether it does, where that is known.
        """
        kind = None if traced or (traced is None and torch.compiler.is_compiling()) else kind_of(tensors, others)
        if kind is None:
            check()
            return None
        if (known := self.known.get(kind)) is None:
            check()
            if len(self.known) >= MOST:
                self.known.clear()
            known = self.known[kind] = {}
        return known


def kind_of(tensors: tuple[Any, ...], others: tuple[Any, ...]) -> Kind | None:
    """All that checks of shapes read; None where there is an argument of another type."""
    facts: list[Any] = []
    for x in tensors:
        if type(x) in PLAIN:
            facts += (x.shape, x.dtype, x.device)
        elif x is None:
            facts.append(None)
        else:
            return None
    for x in others:
        if type(x) not in (float, bool, int, str):
            return None
        facts += (x, type(x))  # True is no 1
    return tuple(facts)
