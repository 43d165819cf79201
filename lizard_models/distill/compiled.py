"""torch.compile for the parts of a model that do not train: small kernels between the products become one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch import nn

COMPILED = ("MLP", "RMSNorm")  # ends of the names of classes that fuse well, in every family


def parts_to_compile(objective: nn.Module) -> list[nn.Module]:
    """MLPs and norms without a parameter that trains, outermost first."""
    parts = (m for m in objective.modules() if type(m).__name__.endswith(COMPILED))
    return [m for m in parts if not any(p.requires_grad for p in m.parameters())]


@contextlib.contextmanager
def compiled(objective: nn.Module, enabled: bool = True) -> Iterator[nn.Module]:
    """Within: frozen MLPs and norms of ``objective`` run compiled, each class once for all its layers.

    Raises ValueError if there are none.
    """
    if not enabled:
        yield objective
        return
    parts = parts_to_compile(objective)
    if not parts:
        raise ValueError("compile: the model has no frozen MLP or norm to compile")
    # The class's own function, not the module: dynamo keeps what it compiled by code, and every module's is the same.
    forwards: dict[type, Callable] = {
        kind: torch.compile(kind.forward, dynamic=False, fullgraph=True) for kind in {type(part) for part in parts}
    }
    for part in parts:
        part.forward = MethodType(forwards[type(part)], part)  # type: ignore[method-assign]
    try:
        yield objective
    finally:
        for part in parts:
            del part.forward
