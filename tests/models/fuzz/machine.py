"""The fuzz: random sequences of calls, each against the same texts read alone, in one piece, without a cache.

Rules of what is right, where a reader might expect otherwise:

- Padding counts as a column, not as a position; after a real token of the same piece it repeats that token's output.
- A step may leave its mask out where no kept softmax layer needs it; beside one, a padded past wants the mask.
- What a state has read it cannot unread: a mask of other counts is refused; a mask of other places only beside kept
  softmax layers, and only of a cache that has seen the places itself (a state file keeps the counts alone).
- Kept sliding-window layers refuse padding between real tokens.
- ``crop`` takes back what was read since recording began or the last crop, at most 128 tokens.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from drawn import LENGTHS, PADS, SEEDS, Piece, piece, runs
from held import Held, fingerprint, unchanged
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from subjects import OPTIONS, subject
from torch import Tensor

from lizard_models import load_state, save_state

CALLS: Counter[str] = Counter()  # calls compared, by kind
LIVE, CAPACITY = 4, 160
WHICH = st.integers(0, LIVE - 1)
CONTEXTS = {"none": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def close(found: Tensor, wanted: Tensor, tolerance: float, what: object = "") -> None:
    """Equal within the tolerance, relative and absolute; NaN is never right."""
    torch.testing.assert_close(
        found.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


class Calls(RuleBasedStateMachine):
    """Caches alive beside each other, of one model, and every way to go on from them."""

    names = tuple(OPTIONS)

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Held] = []
        self.of: Any = None
        self.made = 0  # models of the same weights so far
        self.hooked = False  # whether the model was asked for hidden states

    @initialize(name=st.sampled_from(tuple(OPTIONS)))
    def choose(self, name: str) -> None:
        self.of = subject(name)
        self.model = self.of.copy()

    # What every call is held against

    def at(self, which: int) -> Held:
        return self.live[which % len(self.live)]

    def keep(self, held: Held) -> None:
        held.check()
        self.live = [*self.live, held][-LIVE:]

    def judge(self, logits: Tensor, texts: list[tuple[int, ...]], new: Piece, keep: int = 0) -> None:
        """Logits [B, T or keep, V] of a piece whose rows' real tokens, past ones included, are ``texts``."""
        first = new.length - logits.shape[1]
        assert logits.shape[:2] == (len(texts), min(keep or new.length, new.length))
        for b, (text, real) in enumerate(zip(texts, new.real, strict=True)):
            wanted, at, last = self.of.oracle.logits(text), len(text) - sum(real), None
            columns, places = [], []
            for t, is_real in enumerate(real):
                if is_real:
                    last, at = at, at + 1
                if last is not None and t >= first:
                    columns.append(t - first)
                    places.append(last)
            close(logits[b, columns], wanted[places], self.of.tolerance, f"row {b}")
        CALLS["texts"] += len(texts)

    def refused(self, match: str, held: Held | None, call: Any, error: type[Exception] = ValueError) -> None:
        """The call is refused by name and changes nothing."""
        before = None if held is None else fingerprint(held.cache)
        try:
            call()
        except error as refusal:
            assert re.search(match, str(refusal)), f"refused by another name than {match!r}: {refusal}"
        else:
            raise AssertionError(f"not refused, wanted {match!r}")
        if held is not None and before is not None:
            assert unchanged(before, fingerprint(held.cache)), "a refused call changed the cache"
            held.check()
        CALLS["refused"] += 1

    def refusal(self, held: Held, new: Piece, with_mask: bool) -> str | None:
        """Why a forward with this piece must be refused; None where it must be right."""
        if not new.length and self.of.kept:
            return "got 0 tokens, wanted at least 1"
        if held.capacity is not None and held.columns + new.length > held.capacity:
            return "past_key_values: "
        if with_mask:
            whole = [old + more for old, more in zip(held.real, new.real, strict=True)]
            return "padding between the real tokens" if self.of.sliding and any(runs(r) > 1 for r in whole) else None
        return "attention_mask: got None" if self.of.kept and held.columns and held.padded() else None

    def forward(self, held: Held, new: Piece, model: Any = None, **how: Any) -> None:
        """One forward that goes on from ``held``. how: with_mask, embeds, positions, keep, context."""
        with_mask = how.get("with_mask", False) or new.padded() or not held.columns and held.padded()
        inputs: dict[str, Any] = dict(past_key_values=held.cache, logits_to_keep=how.get("keep", 0))
        if with_mask:
            inputs["attention_mask"] = torch.cat([held.mask(), new.mask()], 1)
        if how.get("positions") and new.length:
            whole = torch.cat([held.mask(), new.mask()], 1).cumsum(-1) - 1
            inputs["position_ids"] = whole.clamp(min=0)[:, held.columns :]
        if how.get("embeds"):
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(new.ids()).detach()
        else:
            inputs["input_ids"] = new.ids()
        why = self.refusal(held, new, with_mask)
        call = model or self.model
        if why is not None:
            self.refused(why, held, lambda: call(**inputs))
            return
        with CONTEXTS[how.get("context", "no_grad")]():
            out = call(**inputs)
        assert out.past_key_values is held.cache
        held.read(new.rows, new.real)
        held.check()
        CALLS["forwards"] += 1
        self.judge(out.logits, [held.text(b) for b in range(len(held.rows))], new, how.get("keep", 0))

    def new_cache(self, rows: int, static: bool) -> Held:
        cache = self.model.new_cache(static=static, max_cache_len=CAPACITY)
        static = static and self.of.kept
        capacity = CAPACITY if static and not self.of.only_sliding else None
        return Held(cache, [[] for _ in range(rows)], [[] for _ in range(rows)], static=static, capacity=capacity)

    # Reading

    @rule(
        rows=st.integers(1, 3), length=LENGTHS, seed=SEEDS, pad=st.sampled_from(PADS), static=st.booleans(),
        allocate=st.booleans(), record=st.booleans(), context=st.sampled_from(tuple(CONTEXTS)),
    )  # fmt: skip
    def read_new(
        self, rows: int, length: int, seed: int, pad: str, static: bool, allocate: bool, record: bool, context: str
    ) -> None:
        held = self.new_cache(rows, static)
        if allocate:
            held.cache.allocate(rows + seed % 2, dtype=self.model.dtype)
        if record:
            held.cache.activate_past_recording()
            held.recorded = 0
        self.forward(held, piece(rows, length, seed, pad), context=context)
        if held.columns:
            self.keep(held)

    @rule(rows=st.integers(1, 3), length=LENGTHS, seed=SEEDS, pad=st.sampled_from(PADS), hidden=st.booleans())
    def read_whole(self, rows: int, length: int, seed: int, pad: str, hidden: bool) -> None:
        """A batch without a cache, or with one that the model makes."""
        new, made = piece(rows, length, seed, pad), bool(seed % 2)
        held = Held(None, new.rows, new.real)  # type: ignore[arg-type]
        inputs = dict(input_ids=new.ids(), attention_mask=new.mask(), use_cache=made, output_hidden_states=hidden)
        if self.of.sliding and any(runs(r) > 1 for r in new.real):
            self.refused("padding between the real tokens", None, lambda: self.model(**inputs))
            return
        out = self.model(**inputs)
        self.hooked |= hidden
        texts = [held.text(b) for b in range(rows)]
        self.judge(out.logits, texts, new)
        CALLS["forwards"] += 1
        if hidden:
            assert len(out.hidden_states) == 1 + self.model.config.num_hidden_layers
        if made:
            held.cache = out.past_key_values
            self.keep(held)
        if self.of.name == "untrained":
            for b, text in enumerate(texts):  # equal to the teacher up to the window
                if text and all(new.real[b]):
                    wanted = self.of.oracle.teacher_logits(text)[:24]
                    close(out.logits[b, : len(wanted)], wanted, 1e-4, "the teacher up to the window")

    @precondition(lambda self: self.live)
    @rule(
        which=WHICH, length=st.one_of(LENGTHS, st.just(0), st.sampled_from([1, 1, 1, 130])), seed=SEEDS,
        pad=st.sampled_from(PADS), with_mask=st.booleans(), embeds=st.booleans(), positions=st.booleans(),
        keep=st.sampled_from([0, 0, 1, 3]), context=st.sampled_from(tuple(CONTEXTS)),
    )  # fmt: skip
    def read_on(self, which: int, length: int, seed: int, pad: str, **how: Any) -> None:
        held = self.at(which)
        self.forward(held, piece(len(held.rows), length, seed, pad), **how)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, count=st.integers(2, 9), seed=SEEDS)
    def steps(self, which: int, count: int, seed: int) -> None:
        """Token by token, as decoding reads."""
        held = self.at(which)
        for step in range(count):
            self.forward(held, piece(len(held.rows), 1, seed + step), with_mask=self.of.kept)

    # Changes of a cache

    @precondition(lambda self: self.live)
    @rule(which=WHICH)
    def record(self, which: int) -> None:
        held = self.at(which)
        held.cache.activate_past_recording()
        held.recorded = held.recorded or 0

    @precondition(lambda self: self.live)
    @rule(which=WHICH, count=st.one_of(st.integers(0, 6), st.integers(0, 140)), sign=st.sampled_from([-1, -1, -1, 1]))
    def take_back(self, which: int, count: int, sign: int) -> None:
        held = self.at(which)
        if count and sign > 0:
            self.refused("crop|negative|cropped", held, lambda: held.cache.crop(count))
        elif count and held.static:
            self.refused("cannot be cropped", held, lambda: held.cache.crop(-count))
        elif count and held.recorded is None:
            self.refused("cannot be cropped", held, lambda: held.cache.crop(-count))
        elif count > (held.recorded or 0):
            self.refused("tokens are remembered", held, lambda: held.cache.crop(-count))
        else:
            held.cache.crop(-count)
            held.crop(count)
            held.check()
            CALLS["crops"] += 1
            if not held.columns:
                self.live.remove(held)

    @precondition(lambda self: self.live)
    @rule(
        which=WHICH, length=st.integers(1, 20), back=st.integers(1, 12), seed=SEEDS, pad=st.sampled_from(PADS),
        later=st.integers(0, 6),
    )  # fmt: skip
    def draft(self, which: int, length: int, back: int, seed: int, pad: str, later: int) -> None:
        """Read some, take some of it back, as drafts do, and read on."""
        held = self.at(which)
        self.record(which)
        before = held.columns
        self.forward(held, piece(len(held.rows), length, seed, pad))
        if held.columns > before:
            self.take_back(which, min(back, length), -1)
            if later and held in self.live:
                self.forward(held, piece(len(held.rows), later, seed + 1), with_mask=self.of.kept)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, form=st.sampled_from(["copy", "deepcopy", "pickle", "file"]))
    def copies(self, which: int, form: str) -> None:
        held = self.at(which)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.state"
            if form == "file" and held.static:
                self.refused("static cache cannot be saved", held, lambda: save_state(path, self.model, held.cache))
                return
            if form == "pickle" and held.recorded is not None:
                self.refused("records its past", held, lambda: pickle.dumps(held.cache))
                return
            if form == "file":
                save_state(path, self.model, held.cache)
            make = {
                "copy": held.cache.copy,
                "deepcopy": lambda: copy.deepcopy(held.cache),
                "pickle": lambda: pickle.loads(pickle.dumps(held.cache)),
                "file": lambda: load_state(path, self.model),
            }
            twin = held.twin(make[form]())
        if form == "file":
            twin.recorded, twin.recall, twin.places = None, 128, False
        CALLS["copies"] += 1
        self.keep(twin)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, kind=st.sampled_from(["reorder", "select", "repeat"]), seed=SEEDS)
    def rows(self, which: int, kind: str, seed: int) -> None:
        held = self.at(which)
        have = len(held.rows)
        draw = torch.Generator().manual_seed(seed)
        size = have if kind == "reorder" else 1 + seed % have
        order = torch.randint(have, (size,), generator=draw).tolist()
        times = 1 + seed % 2
        if held.static and kind != "reorder":
            change = held.cache.batch_repeat_interleave if kind == "repeat" else held.cache.batch_select_indices
            given = times if kind == "repeat" else torch.tensor(order)
            self.refused("StaticLayer|StaticSlidingWindowLayer", held, lambda: change(given))
            return
        if kind == "repeat" and have * times <= 4:
            order = [b for b in range(have) for _ in range(times)]
            held.cache.batch_repeat_interleave(times)
        elif kind == "select":
            held.cache.batch_select_indices(torch.tensor(order))
        else:
            order = order if kind == "reorder" else list(range(have))
            held.cache.reorder_cache(torch.tensor(order))
        held.select(order)
        held.check()
        CALLS["rows"] += 1

    @precondition(lambda self: self.live)
    @rule(which=WHICH, rows=st.integers(1, 3), length=LENGTHS, seed=SEEDS, pad=st.sampled_from(PADS))
    def reset(self, which: int, rows: int, length: int, seed: int, pad: str) -> None:
        held = self.at(which)
        held.cache.reset()
        held.rows, held.real, held.bytes = [[] for _ in range(rows)], [[] for _ in range(rows)], None
        held.recorded, held.places = None if held.recorded is None else 0, True
        held.check()
        self.forward(held, piece(rows, length, seed, pad))
        if not held.columns:
            self.live.remove(held)

    @precondition(lambda self: self.of is not None and self.live)
    @invariant()
    def caches_say_what_they_have_read(self) -> None:
        for held in self.live:
            held.check()
