"""Triton's interpreter without the work that it repeats or throws away: the same numbers in less than half the time.

``install`` changes what is named below. ops/test_quick_interpreter.py compares a kernel's results with those of the
interpreter as it comes. A release of Triton that lacks what is to be changed stays as it is. Triton is not
imported here, since its first import reads TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import quick_operands

ALREADY_PATCHED = SimpleNamespace(restore=lambda: None)
REPLACED: list[tuple[Any, str, Any]] = []  # owner, name and value as it came


def install(interpreter: ModuleType) -> None:
    """Change ``triton.runtime.interpreter`` for this process, once."""
    builder = getattr(interpreter, "interpreter_builder", None)
    executor = getattr(interpreter, "GridExecutor", None)
    options = getattr(builder, "options", None)
    if REPLACED or not (
        hasattr(interpreter, "tl")
        and hasattr(interpreter, "_patch_lang")
        and hasattr(interpreter, "_get_np_dtype")
        and hasattr(interpreter, "_patch_builtin")
        and hasattr(interpreter, "interpreter_semantic")
        and callable(executor)
        and hasattr(options, "debug")
        and hasattr(options, "sanitize_overflow")
    ):
        return
    # Sums and products of integers are made again in 64 bits for an assertion that is made only with options.debug.
    replace(builder, "options", dataclasses.replace(options, sanitize_overflow=options.debug))
    replace(interpreter, "_get_np_dtype", remembered(interpreter._get_np_dtype))
    patch_once, launch = once_a_launch(interpreter.tl, interpreter._patch_lang, executor.__call__)
    replace(interpreter, "_patch_lang", patch_once)
    replace(executor, "__call__", launch)
    replace(interpreter, "_patch_builtin", called_straight(interpreter.tl.core, interpreter.interpreter_semantic))
    make_types_once(interpreter.tl.core)
    keep_what_fits(interpreter.tl.core.dtype, type(interpreter.interpreter_semantic))
    remember_numbers(type(interpreter.interpreter_semantic))
    quick_operands.install(interpreter, replace)


def replace(owner: Any, name: str, value: Any) -> None:
    REPLACED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def remembered(numpy_type: Callable) -> Callable:
    """The types of numpy, whose table is made anew at every call."""
    known = functools.cache(numpy_type)

    def of(dtype):
        return numpy_type(dtype) if dtype.scalar.is_ptr() else known(dtype.scalar)

    return of


def once_a_launch(tl: ModuleType, patch_lang: Callable, launch: Callable) -> tuple[Callable, Callable]:
    """Patch triton.language once a launch for each of its modules, not at every call of a device function too."""
    patched: set[tuple[bool, bool]] = set()
    seen: dict[Any, tuple[bool, bool]] = {}  # which of the modules a function has

    def patch_once(fn):
        modules = seen.get(fn)
        if modules is None:
            names = fn.__globals__.values()
            modules = seen[fn] = any(x is tl for x in names), any(x is tl.core for x in names)
        if modules in patched:
            return ALREADY_PATCHED
        patched.add(modules)
        return patch_lang(fn)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    return patch_once, launch_afresh


def called_straight(core: ModuleType, semantic: Any) -> Callable:
    """Builtins get the interpreter's semantic without a copy of their options and a check that it is there.

    Those of a module or a class are looked for once, not at every launch.
    """
    checked = core.builtin(lambda: None).__code__
    known: dict[Any, list[tuple[str, Callable]]] = {}

    def straight(member):
        run = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return run(*args, **kwargs)

        return call

    def patch_builtin(owner, builder, scope):
        if owner not in known:
            members = inspect.getmembers(owner)
            known[owner] = [(name, straight(member)) for name, member in members if core.is_builtin(member)]
        for name, call in known[owner]:
            scope.set_attr(owner, name, call)

    return patch_builtin


def make_types_once(core: ModuleType) -> None:
    """A kernel has a dozen shapes: each is checked, written and wrapped once, not for every value of it."""
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[
        Any, tuple
    ] = {}  # sizes, or the address of a shape that is held here: (shape, numel, start of the name)
    tensors: dict[int, tuple] = {}  # the same addresses: (shape of the type, shape and numel of a tensor)

    def block(self, element_ty, shape):
        known = blocks.get(id(shape))
        if known is None:
            sizes = [getattr(n, "value", n) for n in shape]
            key = (*sizes, *map(type, sizes))
            known = blocks.get(key)
            if known is None:
                make_block(self, element_ty, shape)
                known = self.shape, self.numel, f"<{self.shape}, "
                blocks[key] = blocks[id(self.shape)] = known
        self.element_ty = element_ty
        self.shape, self.numel, start = known
        self.name = f"{start}{element_ty}>"

    def tensor(self, handle, type):
        shape = type.shape if type.is_block() else ()
        known = tensors.get(id(shape))
        if known is None:
            make_tensor(self, handle, type)
            tensors[id(shape)] = shape, self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = known

    replace(core.block_type, "__init__", block)
    replace(core.tensor, "__init__", tensor)


def keep_what_fits(dtype: type, semantic: type) -> None:
    """Operands of one type and shape are seen to be that before anything is asked of either."""
    equal, cast, broadcast = dtype.__eq__, semantic.cast, semantic.broadcast_impl_value

    def quick_equal(self, other):
        return self is other or equal(self, other)

    def quick_cast(self, input, dst_ty, *args, **kwargs):
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *args, **kwargs)

    def quick_broadcast(self, lhs, rhs):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if blocks == (False, False) or blocks == (True, True) and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    replace(dtype, "__eq__", quick_equal)
    replace(semantic, "cast", quick_cast)
    replace(semantic, "broadcast_impl_value", quick_broadcast)


def remember_numbers(semantic: type) -> None:
    """The numbers in a kernel's text are tensors of one entry, made once; so is the type that two types promote to."""
    promote, constant = semantic.computation_type_impl, semantic._cast_to_computation_type
    promoted: dict[tuple, Any] = {}
    constants: dict[tuple, Any] = {}

    def quick_promote(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod
        if key not in promoted:
            promoted[key] = promote(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return promoted[key]

    def quick_constant(self, value, dtype):
        kind = type(value)
        if kind is float and value or kind is int or kind is bool:  # not the two zeros, which are equal
            key = kind, value, dtype.name
            if key not in constants:
                constants[key] = constant(self, value, dtype)
            return constants[key]
        return constant(self, value, dtype)

    replace(semantic, "computation_type_impl", quick_promote)
    replace(semantic, "_cast_to_computation_type", quick_constant)
