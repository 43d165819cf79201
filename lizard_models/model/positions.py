"""Positions past the teacher's context: exact angles at any of them, and anchors that stay in the range it knows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lizard_layers import AnchorBlock, PackedBlock, turn_by
from lizard_models.model.layer_configs import lizard_config

MovedAnchors = dict[str | None, list[AnchorBlock]] | dict[str | None, list[PackedBlock]]
"""How far the anchors have moved on at the new positions, by layer type."""


class PositionRange(NamedTuple):
    """Positions from 0 to ``limit``; past it, i stands for i - shift(i), which runs through the last ``step`` of them.

    shift(i) = 0 for i < limit, step * (floor((i - limit) / step) + 1) from there on.
    """

    limit: int
    step: int

    def shift(self, positions: Tensor) -> Tensor:
        """shift(i) of positions of any shape, int64."""
        beyond = torch.div(positions - self.limit, self.step, rounding_mode="floor") + 1
        return beyond.clamp(min=0) * self.step

    def cuts(self, start: int, end: int) -> list[int]:
        """Where the shift rises among the positions from ``start`` to ``end``: those in between, in order."""
        first = self.limit if start < self.limit else start + self.step - (start - self.limit) % self.step
        return list(range(first, end, self.step))


def position_range(config: PreTrainedConfig) -> PositionRange:
    """``position_limit`` and ``position_step`` of a Lizard model with their defaults filled in.

    A teacher whose context is shorter than window and anchors together has seen no position that the window could
    do without: they are the limit then.
    """
    chosen = lizard_config(config)
    choices, window = chosen.attention, chosen.wide_window if chosen.wide_layers else chosen.attention.window
    limit = choices.position_limit or max(config.max_position_embeddings, window + choices.anchors)
    return PositionRange(limit, choices.position_step or max(1, limit // 2))


def moves_anchors(config: PreTrainedConfig) -> bool:
    """Whether the layers turn their anchors and kept keys on past the limit."""
    choices = lizard_config(config).attention
    return choices.positions == "clamped" and (choices.anchors > 0 or choices.keeps_keys) and choices.window_rope


class FarRotary:
    """Mixed into a family's rotary embedding by ``with_far_positions``.

    float32 angles lose their last bits with the position (3e-2 radians at a million, neighbours coincide from
    16,777,216 on), and kinds that rescale with the length would turn later keys by other frequencies than the keys
    already stored. So past the limit the family gives the angles of i - shift(i), and R(shift(i)), from float64, turns
    them on: cos and sin of the same total angle. Up to the limit they are the family's, bit for bit.
    """

    range: PositionRange | None  # None leaves everything to the family

    def reach(self, limits: PositionRange | None) -> None:
        """Be exact past these limits; None leaves everything to the family.

        A dynamic kind keeps the frequencies that it rescaled for the last long text, also for a text of exactly its
        context: what it did for a teacher is taken back here.
        """
        if limits == self.range:
            return
        self.range, module = limits, cast(Any, self)
        for kind in self.kinds() if limits is not None else []:
            if "dynamic" in self.type_of(kind):
                prefix = "" if kind is None else f"{kind}_"
                frequencies, original = (getattr(self, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
                setattr(self, f"{prefix}inv_freq", original.to(frequencies.device, copy=True))
                setattr(self, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    def rescales_past(self) -> int | None:
        """The length past which the family's frequencies depend on the length; None if they never do."""
        module: Any = self
        return module.original_max_seq_len if any("dynamic" in self.type_of(kind) for kind in self.kinds()) else None

    def type_of(self, kind: str | None) -> str:
        """The kind of RoPE of a layer type."""
        types: Any = getattr(self, "rope_type", "default")
        return types if isinstance(types, str) else types[kind]

    def choose(self, positions: Tensor) -> None:
        """Let kinds that choose their frequencies by the last position do so, before ``turn`` reads them.

        positions: those of the next forward, of any shape.
        """
        for kind in self.kinds():
            if self.type_of(kind) == "longrope":
                self.forward(positions.new_empty(0, dtype=torch.float32), positions, *([] if kind is None else [kind]))

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """x: for its device and dtype. position_ids [B or 1, T] -> cos, sin [B or 1, T, D] in x's dtype."""
        family: Any = super().forward  # type: ignore[misc]
        if self.range is None:
            return family(x, position_ids, *args, **kwargs)
        shift = self.range.shift(position_ids)
        exact = x.new_empty(0, dtype=torch.float32)
        kind = args[0] if args else kwargs.get("layer_type")
        module: Any = self
        if "dynamic" in self.type_of(kind) and self.range.limit <= module.original_max_seq_len:
            # No position reaches those that rescale the frequencies; the family would read the positions to see that.
            family = functools.partial(module.without_rescaling, self)
        cos, sin = family(exact, position_ids - shift, *args, **kwargs)
        far_cos, far_sin = self.turn(shift, kind)
        turned = cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin
        return turned[0].to(x.dtype), turned[1].to(x.dtype)

    def turn(self, positions: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor]:
        """cos, sin [..., D] float32 of R(positions) without the family's scaling, from float64 angles.

        kind: the layer type, in families that have frequencies for each.
        """
        return turn_by(positions, self.frequencies(kind))

    def frequencies(self, kind: str | None = None) -> Tensor:
        """[D / 2] radians a position; kind as for ``turn``."""
        return getattr(self, "inv_freq" if kind is None else f"{kind}_inv_freq")

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the class is made at run time, so a copy is made from the family's."""
        return _blank, (type(self).__mro__[2],), self.__dict__

    def kinds(self) -> list[str | None]:
        """The layer types with frequencies of their own; [None] where all layers share them."""
        module: Any = self
        names = [name for name, _ in module.named_buffers() if name.endswith("inv_freq") and "original" not in name]
        return [name.removesuffix("inv_freq").removesuffix("_") or None for name in names]


@functools.cache
def _far_class(family: Any) -> type:
    own = {"range": None, "without_rescaling": staticmethod(inspect.unwrap(family.forward))}
    return type(family.__name__, (FarRotary, family), own)


def _blank(family: Any) -> Any:
    far: Any = _far_class(family)
    return far.__new__(far)


def with_far_positions(rotary: Any) -> Any:
    """The same module, exact past the limit once its ``range`` is set. Its class keeps its name."""
    if isinstance(rotary, nn.Module) and not isinstance(rotary, FarRotary):
        family: Any = type(rotary)
        rotary.__class__ = _far_class(family)
    return rotary


def assert_anchors_stay(positions: Tensor, limits: PositionRange) -> None:
    """Makes a graph fail when it runs on positions past the limit, where the anchors of its layers would move."""
    torch._assert_async(
        (positions < limits.limit).all(),
        f"positions reach position_limit={limits.limit}, past which the anchors move on: an exported program ends "
        "there. Read longer texts with the model itself, or export one of another position_limit or without anchors",
    )


def anchor_blocks(
    rotary: Any, positions: Tensor, limits: PositionRange, whole: bool, filled: bool = False
) -> dict[str | None, list[AnchorBlock]]:
    """How far the anchors have moved on at each of the new positions, for every kind of layer.

    positions [B or 1, T] int64, T >= 1. whole: take the T positions as one block, for T = 1 or where the anchors are
    known not to move; else the positions are read, once, to find where they do. filled: every row is known to have all
    its anchors. rotary: of ``with_far_positions``.
    """
    shift = limits.shift(positions)
    cuts: list[int] = []
    if not whole:
        cuts = (shift.diff(dim=1) != 0).any(0).nonzero().flatten().add(1).tolist()
    starts, ends = [0, *cuts], [*cuts, positions.shape[1]]
    shifts = shift[:, :1] if whole else shift[:, starts]  # [B or 1, blocks]; a slice needs no index on the device
    moved = shifts > 0
    blocks: dict[str | None, list[AnchorBlock]] = {}
    rotary.choose(positions)
    for kind in rotary.kinds():
        cos, sin = rotary.turn(shifts, kind)
        blocks[kind] = [
            AnchorBlock(
                end - start,
                cos[:, n : n + 1],
                sin[:, n : n + 1],
                moved[:, n],
                shifts[:, n],
                rotary.frequencies(kind),
                filled,
            )
            for n, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
    return blocks


@torch.compiler.disable(reason="where packed sequences lie is known on the host")
def packed_anchor_blocks(
    rotary: Any, starts: Sequence[int], lengths: Sequence[int], limits: PositionRange, device: torch.device | str
) -> dict[str | None, list[PackedBlock]] | None:
    """``anchor_blocks`` of packed sequences, which go on at position ``starts[i]`` with ``lengths[i]`` tokens.

    None where no anchor moves. The number of blocks is that of the sequence with most.
    """
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    if max(ends, default=0) <= limits.limit:
        return None
    blocks: dict[str | None, list[PackedBlock]] = {kind: [] for kind in rotary.kinds()}
    rotary.choose(torch.tensor([max(ends) - 1], device=device))
    bounds = [[a, *limits.cuts(a, b), b] for a, b in zip(starts, ends, strict=True)]
    places = accumulate(lengths, initial=0)
    before = [place - start for start, place in zip(starts, places, strict=False)]  # from a position to its place
    for n in range(max(map(len, bounds)) - 1):
        having = [i for i, of in enumerate(bounds) if n + 1 < len(of)]
        parts = [(before[i], *bounds[i][n : n + 2]) for i in having]
        tokens = torch.cat([torch.arange(place + a, place + b) for place, a, b in parts])
        cu_seqlens = torch.tensor([0, *(b - a for _, a, b in parts)]).cumsum(0).int()
        at = [t.to(device) for t in (tokens, torch.tensor(having), cu_seqlens)]
        shifts = limits.shift(torch.tensor([[a] for _, a, _ in parts])).to(device)  # [n, 1]
        for kind, found in blocks.items():
            cos, sin = rotary.turn(shifts, kind)
            moved = AnchorBlock(len(tokens), cos, sin, shifts[:, 0] > 0, shifts[:, 0], rotary.frequencies(kind))
            found.append(PackedBlock(moved, *at))
    return blocks
