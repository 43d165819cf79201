"""States in a pool: the packed layout of a page, and the rows of a batch among the pages.

A *pool* is a state whose fields are [P, ...], one row a page, of which a batch of N sequences uses those that
``state_indices`` [N] names; -1 stands for nobody, as in rows that a CUDA graph is padded with.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.checks import may_read, want
from lizard_ops.common.state import EMPTY_VALUES, AttentionState

ALIGNMENT = 16  # bytes at whose multiples fields begin


class Field(NamedTuple):
    """A tensor of a state inside a page."""

    start: int  # byte
    shape: tuple[int, ...]  # of one sequence
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class PageLayout:
    """Where the tensors of a state lie in one page of bytes: one after another, each at a multiple of 16.

    blank: the state of one sequence before its first token, its tensors [1, ...] by name. ``nbytes`` is what a page
    must have at least, a multiple of 16; ``fields`` has start, shape and dtype of each.
    """

    def __init__(self, blank: Mapping[str, Tensor]) -> None:
        self.blank = dict(blank)
        self.fields: dict[str, Field] = {}
        self.nbytes = 0
        for name, t in self.blank.items():
            self.fields[name] = Field(self.nbytes, tuple(t.shape[1:]), t.dtype)
            self.nbytes += -(-self.fields[name].nbytes // ALIGNMENT) * ALIGNMENT

    def pages(self, count: int, device: torch.device | str | None = None) -> Tensor:
        """[count, nbytes] uint8: pages of sequences before their first token."""
        pages = torch.zeros(count, self.nbytes, dtype=torch.uint8, device=device)
        for name, field in self.views(pages).items():
            if self.blank[name].numel():
                field.copy_(self.blank[name])
        return pages

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """pages [P, bytes] uint8 -> each field [P, ...] where it lies, strided.

        Raises ValueError for pages that are too small, or begin at odd bytes.
        """
        if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.shape[1] < self.nbytes or pages.stride(1) != 1:
            raise ValueError(
                f"pages: got {pages.dtype} {tuple(pages.shape)} with strides {pages.stride()}, wanted uint8 "
                f"[P, {self.nbytes} or more] whose bytes lie together"
            )
        if pages.stride(0) % ALIGNMENT or pages.data_ptr() % ALIGNMENT:
            raise ValueError(f"pages: begin every {pages.stride(0)} bytes, wanted a multiple of {ALIGNMENT}")
        return {
            name: pages[:, f.start : f.start + f.nbytes].view(f.dtype).view(pages.shape[0], *f.shape)
            for name, f in self.fields.items()
        }


class PoolRows(NamedTuple):
    """The rows of a batch among the pages of a pool. A row of nobody works on a copy of another's state."""

    page: Tensor  # [N] int64, >= 0
    row: Tensor | None  # [N] int64, the row whose page that is; None: each its own, nobody is missing
    real: Tensor | None  # [N] bool, whether a row is somebody's; None as well
    has_state: Tensor | None  # [N] bool, False where a sequence begins; None: none does

    @classmethod
    def of(cls, state_indices: Tensor, has_state: Tensor | None = None) -> PoolRows:
        """state_indices [N] int32 or int64, -1 for nobody. No value is read back from a GPU."""
        page = state_indices.long()
        if page.numel() == 0 or (may_read(page) and int(page.min()) >= 0):
            return cls(page, None, None, has_state)
        real = page >= 0
        row = torch.where(real, torch.arange(len(page), device=page.device), real.byte().argmax())
        has = None if has_state is None else has_state.index_select(0, row)
        return cls(page.index_select(0, row).clamp(min=0), row, real, has)

    def take(self, name: str, field: Tensor) -> Tensor:
        """The rows' own of a field [P, ...], copied; that of an empty state where a sequence begins."""
        taken = field.index_select(0, self.page)
        if self.has_state is None:
            return taken
        return torch.where(self.spread(self.has_state, taken), taken, EMPTY_VALUES.get(name.split(".")[-1], 0))

    def put(self, field: Tensor, new: Tensor) -> None:
        """Write what the rows made of it, [N, ...], back into the pages of a field."""
        new = new.to(field.dtype)
        if self.row is not None and self.real is not None and self.page.numel():  # nobody writes what somebody does
            new = torch.where(self.real.any(), new.index_select(0, self.row), field.index_select(0, self.page))
        field.index_copy_(0, self.page, new)

    def blanked(self, o: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """o [B, T, ...] with zeros in the rows of nobody; cu_seqlens where it is packed."""
        if self.real is None:
            return o
        if cu_seqlens is None:
            return torch.where(self.spread(self.real, o), o, 0)
        tokens = torch.arange(o.shape[1], device=o.device)
        owner = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
        return torch.where(self.spread(self.real.index_select(0, owner), o[0]), o[0], 0).unsqueeze(0)

    @staticmethod
    def spread(mask: Tensor, like: Tensor) -> Tensor:
        return mask.view(-1, *[1] * (like.ndim - 1))


def check_pool(state: AttentionState | None, state_indices: Tensor, has_state: Tensor | None, n: int) -> None:
    """Raises ValueError for what is no pool, or indices [n] of it that name no page or one twice."""
    want(
        isinstance(state, AttentionState), "initial_state", type(state).__name__, "a pool of states with state_indices"
    )
    assert state is not None
    fits = isinstance(state_indices, Tensor) and state_indices.dtype in (torch.int32, torch.int64)
    fits = fits and tuple(state_indices.shape) == (n,) and state_indices.device == state.position.device
    wanted = "an int32 or int64 tensor [{}] on {}"
    want(fits, "state_indices", state_indices, wanted, n, state.position.device)
    if has_state is not None:
        fits = isinstance(has_state, Tensor) and has_state.dtype == torch.bool and tuple(has_state.shape) == (n,)
        fits = fits and has_state.device == state_indices.device
        want(fits, "has_state", has_state, "a bool tensor [{}] on {}", n, state_indices.device)
    page_bytes(state)
    check_pool_values(state, state_indices, has_state)


def check_pool_values(state: AttentionState, state_indices: Tensor, has_state: Tensor | None) -> None:
    """Each index is -1 or a page of its own, of a sequence that has seen 0 tokens or more, where values may be read."""
    if not may_read(state_indices):
        return
    pages, count = state_indices.tolist(), len(state.position)
    used = [page for page in pages if page != -1]
    fits = 0 <= min(used, default=0) and max(used, default=-1) < count
    want(fits, "state_indices", pages, "-1 or pages of the {} there are", count)
    want(len(set(used)) == len(used), "state_indices", pages, "no page twice")
    goes_on = [True] * len(pages) if has_state is None else has_state.tolist()
    known = [page for page, goes in zip(pages, goes_on, strict=True) if page != -1 and goes]
    first = min(state.position[known].tolist(), default=0)
    want(first >= 0, "initial_state.position", first, "tokens seen, >= 0 (this is the smallest)")


def page_bytes(state: AttentionState) -> int:
    """From page to page where all fields of a pool lie in pages, 0 where each is contiguous.

    Raises ValueError for other strides: kernels are told one number.
    """
    fields = {name: x for name, x in state._asdict().items() if x is not None}
    if all(x.is_contiguous() for x in fields.values()):
        return 0
    for name, x in fields.items():
        together = x[:1].is_contiguous() and not x.stride(0) * x.element_size() % ALIGNMENT
        wanted = f"rows that lie together, every multiple of {ALIGNMENT} bytes"
        want(together, f"initial_state.{name}", f"strides {x.stride()}", wanted)
    steps = {name: x.stride(0) * x.element_size() for name, x in fields.items()}
    want(len(set(steps.values())) == 1, "initial_state", f"rows every {steps} bytes", "fields of one pool of pages")
    return steps["position"]
