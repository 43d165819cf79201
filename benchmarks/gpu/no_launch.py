"""The host's part of the Triton path on a machine without a GPU: every launch is counted and left out."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
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


class NoDriver:
    """What Triton asks of a driver, for an H200 that is not there: kernels are compiled, and launches are counted."""

    def __init__(self, launches: Launches) -> None:
        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name = metadata.name

            def __call__(self, *args: Any) -> None:
                launches.by_name[self.name] = launches.by_name.get(self.name, 0) + 1

        self.launcher_cls, self.utils = Launcher, self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass


@contextlib.contextmanager
def without_kernels(prepared: bool = False) -> Iterator[Launches]:
    """Within: CPU tensors take the Triton path as CUDA tensors do, and its kernels do nothing.

    What they would have written is whatever the memory held. Values of arguments are not looked at, as on a GPU.
    prepared: Triton compiles the kernels for an H200 and prepares each launch, and the driver's call alone is left out.
    Without, and in its interpreter, launches are left out before.
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

    def counted_first(kernel: Any, programs: int, args: Any, options: Any) -> Any:
        run = counted(kernel, (programs,))
        run()
        known = {"compiled": None, "run": run, "stream_of": lambda device: 0, "rest": (), "grouped": False}
        fields = launchers[0].Prepared._fields  # commits to compare with may have others
        found = launchers[0].Prepared(**{name: known.get(name, ()) for name in fields})
        return found if "rest" in fields else (found, [])

    changed = []
    for module in _modules():
        for name, old, new in (("choose_impl", choose, chosen), ("may_read", may_read, lambda x: False)):
            if getattr(module, name, None) is old:
                setattr(module, name, new)
                changed.append((module, name, old))
    for module, name in _switches():
        changed.append((module, name, getattr(module, name)))
        setattr(module, name, lambda x: True)
    for kind in () if prepared else launch:
        kind.__getitem__ = counted
    for module in launchers[:1]:  # commits to compare with may have to be asked for launches that are found again
        for name, value in (("ASKED_FOR", True), ("TURNED_OFF", False)):
            if hasattr(module, name):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    for module in () if prepared else launchers[:1]:
        changed.append((module, "prepare", module.prepare))
        module.prepare = counted_first
    for module in launchers[1:]:
        module.forget()
    if prepared:
        driver.set_active(NoDriver(launches))
    try:
        yield launches
    finally:
        if prepared:
            driver.set_active(None)  # which looks for one when it is asked again
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
