"""What one call of the fused kernels is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lizard_ops.hybrid_attn.arguments import HybridOptions
from lizard_ops.hybrid_attn.triton.config import FusedShape, fused_shape
from lizard_ops.tiles.places import Stream
from lizard_ops.tiles.plans import Plan

Pair = tuple[Tensor, Tensor]


class FusedInputs(NamedTuple):
    """The tensors, as ``hybrid_forward`` describes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    fq: Tensor
    fk: Tensor
    g: Tensor | None
    weight: Tensor | None
    sink: Tensor | None
    anchor_k: Tensor | None
    anchor_v: Tensor | None
    s: Tensor | None
    z: Tensor | None
    position: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Tensor | None
    log_scale: Tensor | None = None

    @property
    def kept_anchors(self) -> Pair | None:
        """Anchors that are tensors of their own; None: the first rows of k and v."""
        return pair(self.anchor_k, self.anchor_v)

    @property
    def start(self) -> Pair | None:
        """The sums before the first row."""
        return pair(self.s, self.z)


class FusedOptions(NamedTuple):
    """The numbers and choices."""

    window: int
    anchors: int
    outside: bool
    mix: str  # "sum", "absolute" or "relative"
    normalize: bool
    feature_map: str
    scale: float
    feature_scale: float
    softcap: float | None


def chosen(options: HybridOptions) -> FusedOptions:
    """What the kernels are told of the choices of a call."""
    mix = options.merge_mass if options.mix == "merge" else options.mix
    return FusedOptions(
        options.window, options.anchors, options.outside, mix, options.normalize, options.feature_map, options.scale,
        options.feature_scale, options.softcap,
    )  # fmt: skip


def describe(x: FusedInputs, options: FusedOptions) -> tuple[FusedShape, Stream]:
    """What the kernels are compiled for, and where the sequences stand."""
    query_heads, key_heads = x.q.shape[2], x.k.shape[2]
    heads = query_heads if x.g is not None and x.g.shape[2] == query_heads else key_heads
    shape = fused_shape(
        device=x.q.device, dtype=x.q.dtype, query_heads=query_heads, key_heads=key_heads, state_heads=heads,
        dim=x.q.shape[3], value=x.v.shape[3], pre=x.fk.shape[3], feature_map=options.feature_map,
        window=options.window, anchors=options.anchors, outside=options.outside, merge=options.mix != "sum",
        relative=options.mix == "relative", normalize=options.normalize,
    )  # fmt: skip
    prefix = 0 if x.position is None else options.window
    stream = Stream(
        cu_seqlens=x.cu_seqlens, lengths=x.lengths, position=x.position,
        ends=x.q.shape[0] + 1 if x.cu_seqlens is None else x.cu_seqlens.shape[0], length=x.q.shape[1], prefix=prefix,
        shift=options.window - prefix if options.outside else 0, start=0 if options.outside else prefix,
    )  # fmt: skip
    return shape, stream


class Known:
    """A kind of call without a state that has been accepted: tensors of the same shapes, strides, dtypes and devices,
    and the same choices."""

    __slots__ = ("_described", "_gradients", "fused", "options", "plan", "recorded")

    def __init__(self, options: HybridOptions) -> None:
        self.options, self.fused = options, chosen(options)
        self.plan, self.recorded = Plan(), Plan()  # of the forward's launches, without gradients and with
        self._gradients: dict[Any, Plan] = {}  # of the backward's, by how the gradient comes in and what is asked for
        self._described: tuple[FusedShape, Stream] | None = None

    def described(self, x: FusedInputs) -> tuple[FusedShape, Stream]:
        """``describe`` of these calls."""
        if self._described is None:
            self._described = describe(x, self.fused)
        return self._described

    def plan_of_gradients(self, row: Sequence[Tensor | None], needed: tuple[bool, ...]) -> Plan:
        """The launches of a backward of these calls. row: what was saved, to which hooks of saved tensors may give
        other strides, and the gradient that comes in."""
        kind: list[Any] = [needed]
        for x in row:  # a loop: this is asked in every backward
            if x is not None:
                kind += (x.stride(), x.dtype)
        found = tuple(kind)
        if (plan := self._gradients.get(found)) is None:
            plan = self._gradients[found] = Plan()
        return plan


def pair(a: Tensor | None, b: Tensor | None) -> Pair | None:
    return None if a is None or b is None else (a, b)
