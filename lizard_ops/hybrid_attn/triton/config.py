"""Static facts of a call, and the launch configuration that each kernel gets for them."""

from __future__ import annotations

import dataclasses
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton.language as tl

from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.widths import power_of_two
from lizard_ops.tuning import tunable

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclasses.dataclass(frozen=True)
class FusedShape:
    """Everything that a kernel is compiled for. What follows from it is worked out once: see ``fused_shape``."""

    device: torch.device
    dtype: torch.dtype
    query_heads: int
    key_heads: int
    state_heads: int
    dim: int
    value: int
    pre: int
    feature_map: str
    window: int
    anchors: int
    outside: bool
    merge: bool
    relative: bool
    normalize: bool

    @cached_property
    def chunk(self) -> int:
        """Linear rows between two stored states."""
        return 64 if self.dtype == torch.float32 else 128

    @cached_property
    def features(self) -> int:
        return self.halves * self.pre

    @cached_property
    def halves(self) -> int:
        return 1 if self.feature_map == "identity" else 2

    @cached_property
    def keyed(self) -> bool:
        """Whether keys have running gates of their own (see ``units.py``)."""
        return self.feature_map == "exp"

    @cached_property
    def split(self) -> bool:
        """Whether running gates keep more digits than one float32."""
        return self.dtype == torch.float32 or self.keyed

    @cached_property
    def group(self) -> int:
        return self.query_heads // self.key_heads

    @cached_property
    def dim_block(self) -> int:
        return power_of_two(self.dim, self.value)

    @cached_property
    def value_block(self) -> int:
        return power_of_two(self.value, self.dim, self.pre)

    @cached_property
    def pre_block(self) -> int:
        return power_of_two(self.pre, self.value)

    @cached_property
    def state_dtype(self) -> torch.dtype:
        """bfloat16 keeps the range of the sums; float16 would not."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @cached_property
    def compute_dtype(self) -> tl.dtype:
        return TRITON_DTYPES[self.dtype]

    @cached_property
    def linear_dtype(self) -> tl.dtype:
        """Operands of the linear branch, whose range float16 lacks."""
        return TRITON_DTYPES[self.state_dtype]

    @cached_property
    def precision(self) -> str:
        """Of products of float32 tiles, which float16 has in its linear branch: three of bfloat16 keep its digits."""
        return "ieee" if self.dtype == torch.float32 or self.device.type != "cuda" else "bf16x3"

    @cached_property
    def exact(self) -> bool:
        """Whether do . o_window is summed up key by key: a sum needs it, and float32 has digits that o lacks."""
        return not self.merge or self.dtype == torch.float32

    @cached_property
    def exact_gates(self) -> bool:
        """Whether gate gradients count what queries send pair by pair, so that its roundings are those of what keys
        receive; the sum of a row is known without counting, to fewer digits."""
        return self.dtype == torch.float32

    def stack(self, rows: int) -> tuple[int, int]:
        """(queries of one head, heads) that make up the rows of a tile; heads that share keys and state share tiles."""
        heads = min(4, self.group & -self.group) if self.state_heads == self.key_heads else 1
        return rows // heads, heads

    @tunable("hybrid")
    def config(self, kernel: str) -> Launch:
        """Launch configuration of a kernel, named without "_kernel", picked on an H200.

        Rows and columns of a score tile, or of the scan the elements that a program takes.
        """
        if kernel == "scan":
            return Launch(512, 1, 4, 10)
        if self.dtype == torch.float32:  # no tensor cores
            return Launch(32, 32, 4, 1)
        wide = max(self.dim_block, self.value_block, self.pre_block) > 128
        linear = not kernel.startswith("window")
        if wide or (linear and self.dtype == torch.float16):  # 8 warps on 64 rows go wrong: docs/kernels.md
            return Launch(64, 32, 4, 1)
        return {
            "state": Launch(64, 64, 4, 1, 168),
            "output": Launch(64, 32, 4, 2, 168),
            "linear_query": Launch(64, 32, 4, 1, 168),
            "query_state": Launch(64, 64, 4, 2, 168),
            "linear_key": Launch(64, 32, 4, 1),
            "window_query": Launch(64, 32, 4, 2, 168),
        }[kernel]


@lru_cache(maxsize=256)
def _known_shape(**facts: Any) -> FusedShape:
    return FusedShape(**facts)


def fused_shape(**facts: Any) -> FusedShape:
    """The shape of these facts, the same object for the same facts."""
    try:
        return _known_shape(**facts)
    except TypeError:  # sizes that torch.compile leaves open have no hash
        return FusedShape(**facts)
