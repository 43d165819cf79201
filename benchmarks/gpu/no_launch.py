"""The host's part of the Triton path on a machine without a GPU: every launch is counted and left out."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from typing import Any

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import lizard_ops
from lizard_ops.common import checks, dispatch


class Launches:
    """How many kernels would have run, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}

    def count(self) -> int:
        return sum(self.by_name.values())


@contextlib.contextmanager
def without_kernels() -> Iterator[Launches]:
    """Within: CPU tensors take the Triton path as CUDA tensors do, and its kernels do nothing.

    What they would have written is whatever the memory held. Values of arguments are not looked at, as on a GPU.
    """
    launches, choose, may_read = Launches(), dispatch.choose_impl, checks.may_read
    launch = {kind: kind.__getitem__ for kind in (JITFunction, InterpretedFunction)}
    launchers = _launchers()

    def chosen(impl: str, q: Any, beyond: str | None) -> str:
        return "triton" if impl == "auto" and beyond is None else choose(impl, q, beyond)

    def counted(kernel: Any, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            launches.by_name[kernel.__name__] = launches.by_name.get(kernel.__name__, 0) + 1

        return run

    def prepared(kernel: Any, programs: int, args: Any, options: Any) -> Any:
        run = counted(kernel, (programs,))
        run()
        return launchers[0].Prepared(None, run, 0, None, lambda device: 0, ())

    changed = []
    for module in _modules():
        for name, old, new in (("choose_impl", choose, chosen), ("may_read", may_read, lambda x: False)):
            if getattr(module, name, None) is old:
                setattr(module, name, new)
                changed.append((module, name, old))
    for module, name in _switches():
        changed.append((module, name, getattr(module, name)))
        setattr(module, name, lambda x: True)
    for kind in launch:
        kind.__getitem__ = counted
    for module in launchers[:1]:
        changed.append((module, "prepare", module.prepare))
        module.prepare = prepared
    for module in launchers[1:]:
        module.forget()
    try:
        yield launches
    finally:
        for module in launchers[1:]:
            module.forget()
        for kind, own in launch.items():
            kind.__getitem__ = own
        for module, name, old in changed:
            setattr(module, name, old)


def _modules() -> list[Any]:
    return [importlib.import_module(m.name) for m in pkgutil.walk_packages(lizard_ops.__path__, "lizard_ops.")]


def _launchers() -> list[Any]:
    """Where launches are remembered; commits to compare with may not do so."""
    names = ("lizard_ops.tiles.launcher", "lizard_ops.tiles.plans")
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def _switches() -> list[tuple[Any, str]]:
    """Where models and layers ask whether they are on a GPU; commits to compare with may have fewer places."""
    places = [("lizard_models.model.norms", "on_gpu"), ("lizard_models.model.joined", "wants_joined")]
    places += [("lizard_layers.read_input", "on_gpu")]
    there = [(importlib.import_module(module), name) for module, name in places if importlib.util.find_spec(module)]
    return [(module, name) for module, name in there if hasattr(module, name)]
