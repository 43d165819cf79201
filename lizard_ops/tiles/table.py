"""The table of which known launches pick their arguments, each with one call of C: addresses and constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.tiles.calls import Call
from lizard_ops.tiles.plans import Bound

Behind = tuple[Any, ...]  # what stands behind an address in an argument


class Launch(NamedTuple):
    """A launch."""

    run: Any
    first: Any  # of the table, what ``run`` is given before the kernel's own arguments, where it takes these as one
    args: Any  # of the table, all that it is given, or the kernel's arguments
    compiled: Any  # lets go of the function when it is let go of


class Operator(NamedTuple):
    """A function of PyTorch."""

    function: Any
    values: list[Any]
    fills: list[tuple[int, int]]  # an argument, which tensor it is
    named: dict[str, Any]
    groups: list[tuple[int, int, Behind]]  # arguments with an address that it returns: place in the table, the address


class Table:
    """What the launches of an op are given: addresses, the stream, addresses of what operators return, constants, and
    addresses with what stands behind them, in this order.

    addresses: the places of tensors' addresses, by their ids. stream: its place. results: how many tensors operators
    return.
    """

    def __init__(self, addresses: Mapping[int, int | None], stream: int, results: int) -> None:
        self.addresses, self.stream, self.results = addresses, stream, results
        self.constants: list[Any] = [None] * results  # behind the stream
        self.groups: dict[tuple[int, str], Behind] = {}  # at the end, once all constants are there
        self.late: dict[tuple[int, str], tuple[int, Behind]] = {}  # of what operators return, among the constants

    @property
    def early(self) -> list[tuple[int, Behind]]:
        """Addresses and what stands behind them, known before any operator is called."""
        return [(which, behind) for (which, _), behind in self.groups.items()]

    def constant(self, value: Any) -> int:
        """Its place."""
        self.constants.append(value)
        return self.stream + len(self.constants)

    def places_of(self, bound: Bound, tensors: Sequence[Tensor | None]) -> list[Any] | None:
        """Of a launch's arguments with these tensors; the keys of ``groups`` in place of theirs. None where a tensor
        has no address here."""
        prepared, programs, _, values, _, _ = bound
        places: list[Any] = [*map(self.constant, (programs, 1, 1)), self.stream, *map(self.constant, prepared.fixed)]
        ahead = len(places)
        places += map(self.constant, values)
        for (i, behind), x in zip(bound.places, (x for x in tensors if x is not None), strict=True):
            if x.numel() == 0:
                places[ahead + i] = self.constant(0 if behind is None else (0, *behind))
                continue
            which = self.addresses.get(id(x))
            if which is None:
                return None
            places[ahead + i] = which if behind is None else self.group(which, behind)
        return places

    def group(self, which: int, behind: Behind) -> Any:
        """Where an address with what stands behind it is, or its key."""
        key = which, repr(behind)
        if which < self.stream:
            self.groups[key] = behind
            return key
        if key not in self.late:
            self.late[key] = self.constant(None), behind
        return self.late[key][0]

    def launch(self, bound: Bound, places: Sequence[Any]) -> Launch:
        """Of the places of its arguments; no constant may come after."""
        numbers = {key: self.stream + 1 + len(self.constants) + n for n, key in enumerate(self.groups)}
        prepared, ahead = bound.prepared, 4 + len(bound.prepared.fixed)
        whole = [numbers.get(place, place) if type(place) is tuple else place for place in places]
        if not prepared.grouped:
            return Launch(prepared.run, None, itemgetter(*whole), prepared.compiled)
        kernels: Any = (
            itemgetter(*whole[ahead:]) if len(whole) > ahead + 1 else itemgetter(slice(whole[-1], whole[-1] + 1))
        )
        return Launch(prepared.run, itemgetter(*whole[:ahead]), kernels, prepared.compiled)

    def operator(self, call: Call, tensors: Mapping[int, int]) -> Operator | None:
        """tensors: the places of tensors, by their ids. None where one has none."""
        fills = [(i, tensors.get(id(x))) for i, x in enumerate(call.args) if isinstance(x, Tensor)]
        others: list[Any] = [None if isinstance(x, Tensor) else x for x in call.args]
        inside = [y for x in others if isinstance(x, (tuple, list)) for y in x] + list(call.named.values())
        if any(which is None for _, which in fills) or any(isinstance(x, Tensor) for x in inside):
            return None
        own = {self.addresses[id(x)] for x in call.results}
        groups = [(place, which, behind) for (which, _), (place, behind) in self.late.items() if which in own]
        return Operator(call.function, others, fills, call.named, groups)  # type: ignore[arg-type]


def without_memory(x: Tensor) -> Tensor | None:
    """A tensor of which ``empty_like`` makes one like x; None where it makes another."""
    with torch.inference_mode(False):
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        like.untyped_storage().resize_(0)
        return like if torch.empty_like(like).stride() == x.stride() else None
