"""The operands of Triton's interpreter as they come: shapes are spread by numpy, and what fits is not asked about.

Part of ``quick_interpreter.install``: the same numbers, in the same order in memory, which sums and products depend on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

FLOATS = ("float32", "float64")
HALVES = ("float16",)  # divided in float32
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def install(interpreter: ModuleType, replace: Callable[[Any, str, Any], None]) -> None:
    core, builder = interpreter.tl.core, type(interpreter.interpreter_builder)
    semantic = type(interpreter.interpreter_semantic)
    types = {id(getattr(core, name)): np.dtype(name) for name in FLOATS + HALVES + INTEGERS}
    types[id(core.int1)] = np.dtype(bool)
    leave_constants(core, replace)
    write_handles(interpreter.TensorHandle, builder, types, replace)
    spread_by_numpy(core, semantic, replace)
    cast_at_once(core, semantic, interpreter.TensorHandle, types, replace)
    replace(builder, "create_expand_dims", one_more_dimension(interpreter.TensorHandle))
    if hasattr(interpreter.tl.standard, "_xor_combine"):
        replace(interpreter.ReduceOps, "apply_impl", exclusive_or(interpreter.tl, interpreter.ReduceOps.apply_impl))


def leave_constants(core: ModuleType, replace: Callable) -> None:
    unwrap = core._unwrap_if_constexpr
    bare = frozenset({core.tensor, int, float, bool, type(None)})

    def quick_unwrap(o):
        return o if type(o) in bare else unwrap(o)

    replace(core, "_unwrap_if_constexpr", quick_unwrap)


def write_handles(handle: type, builder: type, types: dict[int, np.dtype], replace: Callable) -> None:
    """Values are no wider than their type where it is known, as they are seen to be otherwise."""
    sizes = {known: dtype.itemsize for known, dtype in types.items()}
    binary = builder.binary_op

    def init(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if data.itemsize > sizes.get(id(dtype), 0):
            self.__post_init__()

    def quick_binary(self, lhs, rhs, op):
        size = sizes.get(id(lhs.dtype), 0)
        if not size or lhs.data.dtype == np.bool_:
            return binary(self, lhs, rhs, op)
        output = op(lhs.data, rhs.data)
        return handle(output, lhs.dtype) if output.itemsize <= size else binary(self, lhs, rhs, op)

    replace(handle, "__init__", init)
    replace(builder, "binary_op", quick_binary)


def spread_by_numpy(core: ModuleType, semantic: type, replace: Callable) -> None:
    """Operands of one type keep their shapes, and the first has the type of the result: numpy spreads them."""
    check, tensor, block = semantic.binary_op_type_checking_impl, core.tensor, core.block_type
    alike = frozenset(id(getattr(core, name)) for name in (*FLOATS, *INTEGERS, "int1"))
    halves = frozenset(id(getattr(core, name)) for name in HALVES)
    offsets = frozenset(id(getattr(core, name)) for name in INTEGERS)
    joined: dict[tuple[int, int], Any] = {}  # addresses of two shapes, which quick_interpreter holds: that of both
    numbers: dict[tuple, Any] = {}

    def number(self, value, dtype, division):
        """The tensor of a number beside one of this type; None where they promote to another."""
        key = type(value), value or str(value), id(dtype), division  # there are two zeros
        if key not in numbers:
            promoted = self.computation_type_impl(dtype, False, self.to_tensor_type(value), True, division)
            numbers[key] = self._cast_to_computation_type(value, dtype) if promoted is dtype else None
        return numbers[key]

    def quick_check(self, lhs, rhs, lhs_ptr=False, rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        a, b = lhs, rhs
        if type(a) is not tensor:
            if type(b) is not tensor:
                return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)
            dtype = b.dtype
        else:
            dtype = a.dtype
        if id(dtype) in alike or (id(dtype) in halves and not div_or_mod):
            if type(a) is not tensor:
                a = number(self, a, dtype, div_or_mod) if arithmetic_check and type(a) in (int, float) else None
            elif type(b) is not tensor:
                b = number(self, b, dtype, div_or_mod) if arithmetic_check and type(b) in (int, float) else None
            fit = a is not None and b is not None and a.dtype is b.dtype
        else:
            fit = lhs_ptr and type(a) is type(b) and dtype.is_ptr() and id(b.dtype) in offsets
        if not fit:
            return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)
        x, y = a.type, b.type
        if type(x) is block and type(y) is block:
            if x.shape is y.shape:
                return a, b
            shape = joint(x.shape, y.shape)
            if shape is not None:
                return (a if shape is x.shape else tensor(a.handle, block(a.dtype, shape))), b
        # A number spread by numpy takes the order of the other in memory, which is that of a full block as a rule.
        elif type(x) is block:
            if a.handle.data.flags.c_contiguous:
                return a, b
        elif type(y) is not block:
            return a, b
        elif b.handle.data.flags.c_contiguous:
            return tensor(a.handle, y if a.dtype is b.dtype else block(a.dtype, y.shape)), b
        return self.broadcast_impl_value(a, b)

    def joint(a, b):
        key = id(a), id(b)
        if key not in joined:
            sizes = list(zip(a, b, strict=True)) if len(a) == len(b) else [(0, 2)]
            fit = all(m == n or 1 in (m, n) for m, n in sizes)
            joined[key] = block(core.float32, [n if m == 1 else m for m, n in sizes]).shape if fit else None
        return joined[key]

    replace(semantic, "binary_op_type_checking_impl", quick_check)


def cast_at_once(core: ModuleType, semantic: type, handle: type, types: dict[int, np.dtype], replace: Callable) -> None:
    """Casts that numpy makes as the interpreter does, without the way to them."""
    cast, block, tensor = semantic.cast, core.block_type, core.tensor
    half, single, truth = id(core.float16), id(core.float32), id(core.int1)

    def quick_cast(self, input, dst_ty, fp_downcast_rounding=None):
        source, wanted = id(input.dtype), id(dst_ty.scalar)
        if source == wanted:
            return input
        straight = source in types and wanted in types and wanted != truth and (source != half or wanted == single)
        if not straight or fp_downcast_rounding is not None:
            return cast(self, input, dst_ty, fp_downcast_rounding)
        to, kind = dst_ty.scalar, input.type
        data = input.handle.data.astype(types[wanted])
        return tensor(handle(data, to), block(to, kind.shape) if type(kind) is block else to)

    replace(semantic, "cast", quick_cast)


def one_more_dimension(handle: type) -> Callable:
    def expand_dims(self, arg, axis):
        shape = arg.data.shape
        return handle(arg.data.reshape(*shape[:axis], 1, *shape[axis:]), arg.dtype.scalar)

    return expand_dims


def exclusive_or(tl: ModuleType, reduce: Callable) -> Callable:
    """That of integers, which sorting asks for, is one call of numpy, not one of Triton's function for every entry."""

    def quick_reduce(self, input):
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None or len(input) != 1:
            return reduce(self, input)
        found = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, input[0].dtype)

    return quick_reduce
