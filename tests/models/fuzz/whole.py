"""The fuzz goes on: writing, refusals, packed rows, training, modes, files and compiled forwards of the model."""

from __future__ import annotations

import copy
import pickle
import tempfile
from typing import Any

import torch
from drawn import LENGTHS, PADS, SEEDS, Piece, piece, runs
from held import Held
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from machine import CALLS, WHICH, Calls, close
from torch import Tensor
from transformers import DynamicCache

STOPS = tuple(range(2, 97, 4))  # a quarter of the tokens, so that rows end early
WAYS = ("plain", "plain", "whole", "static", "lookup", "assisted", "taught", "beams", "chunks")


class Fuzz(Calls):
    """Everything a model does beside reading on."""

    # Writing

    def written(
        self, held: Held, new: Piece, way: str, count: int, stops: bool, seed: int, alone: bool = False
    ) -> None:
        """``generate`` on from ``held`` (or from nothing): every token greedy, and the cache then what it says."""
        ids, mask = (
            torch.cat(pair, 1) for pair in ((held.ids().view(len(held.rows), -1), new.ids()), (held.mask(), new.mask()))
        )
        fresh, rows = not held.columns, len(held.rows)
        settings: dict[str, Any] = dict(max_new_tokens=count, do_sample=False, pad_token_id=0)
        if stops:
            settings["eos_token_id"] = list(STOPS)
        if way in ("lookup", "assisted", "taught") and rows > 1 or way in ("whole", "static", "beams") and not fresh:
            way = "plain"
        if way == "chunks" and not (bool(mask[:, -1].all()) and fresh):
            way = "plain"
        extra = {
            "whole": dict(use_cache=False),
            "static": dict(cache_implementation="static"),
            "lookup": dict(prompt_lookup_num_tokens=1 + seed % 6),
            "assisted": dict(assistant_model=self.of.other if seed % 2 else copy.deepcopy(self.model)),
            "taught": dict(assistant_model=self.of.teacher),
            "chunks": dict(prefill_chunk_size=1 + seed % 9),
        }.get(way, {})
        inputs: dict[str, Any] = dict(input_ids=ids, attention_mask=mask)
        if not fresh:
            inputs["past_key_values"] = held.cache
            if alone:
                inputs = held.cache.inputs_for(new.ids(), new.mask())
        if self.of.sliding and any(runs(r) > 1 for r in mask.tolist()):
            if way not in ("assisted", "taught", "lookup"):
                self.refused(
                    "padding between the real tokens",
                    held if not fresh else None,
                    lambda: self.model.generate(**inputs, **settings),
                )
            return
        if alone and not fresh and way in ("assisted", "taught", "lookup"):
            self.refused("only with the whole text", held, lambda: self.model.generate(**inputs, **settings, **extra))
            return
        if way == "beams":
            settings |= dict(num_beams=2)
            found = self.model.generate(**inputs, **settings)
            assert torch.equal(found, self.model.generate(**inputs, **settings, use_cache=False)), "beams"
            CALLS["generates"] += 2
            return
        out = self.model.generate(**inputs, **settings, **extra, return_dict_in_generate=True)
        CALLS["generates"] += 1
        more = out.sequences[:, new.length if alone and not fresh else ids.shape[1] :]
        whole, real = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1).bool()
        for b in range(rows):
            self.greedy(ids[b][mask[b].bool()].tolist(), more[b].tolist(), stops, count)
        cache = out.past_key_values
        if way == "whole" or cache is None:
            return
        seen = cache.get_seq_length()
        assert ids.shape[1] <= seen <= whole.shape[1], (seen, whole.shape)
        after = held if not fresh else Held(cache, [], [])
        after.rows, after.real, after.bytes = whole[:, :seen].tolist(), real[:, :seen].tolist(), None
        if way == "static" and self.of.kept:
            if self.of.sliding:
                return  # made for this text alone: a window may have been cut to its length
            after.static, after.capacity = True, cache.layers[first_kept(cache)].max_cache_len
        if way in ("lookup", "assisted", "taught"):
            cache.crop(0)
            after.recorded, after.recall = 0, cache.lizard_layers()[0].recall
        elif after.recorded is not None:
            cache.crop(0)
            after.recorded = 0
        after.check()
        if fresh:
            self.keep(after)

    def greedy(self, prompt: list[int], more: list[int], stops: bool, count: int) -> None:
        """Every token the likeliest after its text, to the first stop; padding from there on."""
        ends = [t for t, token in enumerate(more) if stops and token in STOPS]
        length = ends[0] + 1 if ends else len(more)
        assert ends or len(more) == count, (len(more), count)
        assert not any(more[length:]), more
        if prompt:
            logits = self.of.oracle.logits(tuple(prompt + more[:length]))[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(more[:length])[:, None])[:, 0]
            short = (logits.amax(1) - chosen).max()
            assert short <= self.of.tolerance * (1 + logits.abs().max()), (
                f"not the likeliest token, by {short:.3g}: {more}"
            )
        CALLS["texts"] += 1

    @rule(
        rows=st.integers(1, 3), length=LENGTHS, seed=SEEDS, pad=st.sampled_from(["none", "left", "left", "right"]),
        way=st.sampled_from(WAYS), count=st.integers(1, 9), stops=st.booleans(), letters=st.sampled_from([3, 95]),
    )  # fmt: skip
    def write(
        self, rows: int, length: int, seed: int, pad: str, way: str, count: int, stops: bool, letters: int
    ) -> None:
        new = piece(rows, length, seed, "left" if self.of.sliding else pad, letters)  # a gap once it writes
        if not all(map(any, new.real)):  # a row of nothing to go on from
            new = Piece(new.rows, [r if any(r) else [*r[1:], True] for r in new.real])
        self.written(Held(None, [[]] * rows, [[]] * rows), new, way, count, stops, seed)  # type: ignore[arg-type]

    @precondition(lambda self: self.live)
    @rule(
        which=WHICH, length=st.integers(1, 9), seed=SEEDS, way=st.sampled_from(WAYS), count=st.integers(1, 9),
        stops=st.booleans(), alone=st.booleans(),
    )  # fmt: skip
    def write_on(self, which: int, length: int, seed: int, way: str, count: int, stops: bool, alone: bool) -> None:
        held = self.at(which)
        new = piece(len(held.rows), length, seed)
        if held.static:
            if held.capacity is not None and held.columns + length + count > held.capacity:
                return
            way = "plain"
        if not held.places and held.padded():
            alone = alone and not self.of.kept
        if self.of.kept and held.padded() and alone:
            self.refused("give generate the mask of the whole text", held, lambda: held.cache.inputs_for(new.ids()))
            alone = False
        self.written(held, new, way, count, stops, seed, alone)

    # Refusals

    @precondition(lambda self: self.live)
    @rule(
        which=WHICH, seed=SEEDS,
        kind=st.sampled_from([
            "rows", "columns", "counts", "places", "packed", "dynamic", "teacher", "distill", "training", "both",
            "neither", "attentions", "offload", "move", "token", "paged",
        ]),
    )  # fmt: skip
    def wrong(self, which: int, seed: int, kind: str) -> None:
        """A call that must be refused by name and change nothing."""
        held, model = self.at(which), self.model
        rows = len(held.rows)
        new = piece(rows, 2 + seed % 3, seed)
        mask = torch.cat([held.mask(), new.mask()], 1)
        past = dict(past_key_values=held.cache)

        def refuse(match: str, error: type[Exception] = ValueError, **inputs: Any) -> None:
            with torch.no_grad():
                self.refused(match, held, lambda: model(**{"input_ids": new.ids(), **past, **inputs}), error)

        if kind == "rows":
            full = "make a longer one"  # of a static cache whose kept layers have no position left
            named = f"holds {rows} rows, but the inputs have {rows + 1}|{full}"
            refuse(named, input_ids=piece(rows + 1, 1, seed).ids())
        elif kind == "columns":
            refuse("attention_mask has shape", attention_mask=mask[:, 1 + seed % 3 :] if seed % 2 else mask[:, :1])
        elif kind in ("counts", "places"):
            self.other_mask(held, new, mask, seed, kind)
        elif kind == "packed":
            refuse("a batch of packed sequences keeps no cache", position_ids=torch.arange(new.length).flip(0)[None])
        elif kind == "dynamic":
            refuse("past_key_values must be a LizardCache", past_key_values=DynamicCache())
        elif kind in ("teacher", "distill"):
            model.set_attention_mode(kind)
            refuse('mode "teacher" cannot fill a LizardCache' if kind == "teacher" else "keeps no cache")
            model.set_attention_mode("student")
        elif kind == "training":
            self.hooked = True
            model.train().gradient_checkpointing_enable()
            self.refused("gradient checkpointing", held, lambda: model(new.ids(), **past))
            model.gradient_checkpointing_disable()
            model.eval()
        elif kind == "both":
            refuse("exactly one of input_ids", inputs_embeds=torch.zeros(rows, 2, 64, dtype=model.dtype))
        elif kind == "neither":
            refuse("exactly one of input_ids", input_ids=None)
        elif kind == "attentions":
            refuse("output_attentions", output_attentions=True)
        elif kind == "offload":
            self.refused(
                "offloading is not supported",
                held,
                held.cache.layers[0 if not self.of.kept else first_state(held.cache)].offload,
            )
        elif kind == "move" and held.recorded is not None:
            self.refused("cannot be moved", held, lambda: held.cache.to("cpu", torch.float32))
        elif kind == "token":
            half = new.mask()
            half[0, : 1 + seed % 2] = int(self.of.sliding)
            whole = torch.cat([held.mask(), half], 1)
            if self.of.sliding and any(runs(r) > 1 for r in whole.tolist()):  # a past that ends in padding
                refuse("padding between the real", input_ids=new.ids() + 97, attention_mask=whole)
            else:
                refuse("", IndexError, input_ids=new.ids() + 97, attention_mask=whole)
        elif kind == "paged":
            refuse("no continuous batching", cache=DynamicCache())

    def other_mask(self, held: Held, new: Piece, mask: Tensor, seed: int, kind: str) -> None:
        """A mask of the past that disagrees with it, in how many tokens or only in which."""
        row, at = seed % len(held.rows), seed % held.columns
        mask = mask.clone()
        if kind == "counts":
            mask[row, at] = 1 - mask[row, at]
        else:
            mask[row, : held.columns] = mask[row, : held.columns].flip(0)
        same = bool((mask[:, : held.columns] == held.mask()).all())
        gaps = self.of.sliding and any(runs(r) > 1 for r in mask.tolist())
        call = dict(input_ids=new.ids(), attention_mask=mask, past_key_values=held.cache)
        if gaps:
            self.refused("padding between the real", held, lambda: self.model(**call))
        elif kind == "counts" or (self.of.kept and held.places and not same):
            self.refused("real tokens.* but past_key_values has read", held, lambda: self.model(**call))
        elif not self.of.kept or same:
            if held.capacity is not None and held.columns + new.length > held.capacity:
                return
            with torch.no_grad():
                out = self.model(**call)
            held.read(new.rows, new.real)
            self.judge(out.logits, [held.text(b) for b in range(len(held.rows))], new)
            CALLS["forwards"] += 1
            # The mask that was given is now the one that is remembered; its places differ, its counts do not.
            held.places = held.places and same

    # Packed rows, training, modes

    @rule(
        rows=st.integers(1, 2), lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=SEEDS,
        form=st.sampled_from(["position_ids", "cu_seq_lens_q", "seq_idx"]), pad=st.booleans(),
        train=st.sampled_from(["no", "no", "yes", "checkpointed"]),
    )  # fmt: skip
    def packed(self, rows: int, lengths: list[int], seed: int, form: str, pad: bool, train: str) -> None:
        rows = 1 if form == "cu_seq_lens_q" else rows
        orders = [lengths[b:] + lengths[:b] for b in range(rows)]
        new = piece(rows, sum(lengths), seed)
        spare = 1 + seed % 4 if pad and form == "position_ids" else 0  # padding on the right of every row
        ids = torch.cat([new.ids(), torch.zeros(rows, spare, dtype=torch.long)], 1)
        places = torch.tensor([[t for n in order for t in range(n)] + [0] * spare for order in orders])
        ends = torch.tensor([0, *torch.tensor(orders[0]).cumsum(0).tolist()], dtype=torch.int32)
        inputs: dict[str, Any] = {
            "position_ids": dict(position_ids=places),
            "cu_seq_lens_q": dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends),
            "seq_idx": dict(seq_idx=torch.tensor([[i for i, n in enumerate(o) for _ in range(n)] for o in orders])),
        }[form]
        if spare:
            inputs["attention_mask"] = (torch.arange(ids.shape[1]) < new.length).long().expand(rows, -1)
        if spare and self.of.sliding:
            self.refused("packed rows with padding", None, lambda: self.model(ids, **inputs))
            return
        texts, at = [], []
        for b, order in enumerate(orders):
            start = 0
            for n in order:
                texts.append(tuple(new.rows[b][start : start + n]))
                at.append((b, slice(start, start + n)))
                start += n
        self.trained(ids, texts, at, inputs, train, seed)

    @rule(
        rows=st.integers(1, 3), length=st.integers(1, 20), seed=SEEDS, pad=st.sampled_from(PADS),
        train=st.sampled_from(["yes", "checkpointed", "reentrant"]), cut=st.integers(0, 20),
    )  # fmt: skip
    def learn(self, rows: int, length: int, seed: int, pad: str, train: str, cut: int) -> None:
        """A forward and backward of a padded batch; with ``cut`` in two pieces through a cache."""
        new = piece(rows, length, seed, "right" if self.of.sliding and pad == "gaps" else pad)
        texts = [tuple(t for t, r in zip(*pair, strict=True) if r) for pair in zip(new.rows, new.real, strict=True)]
        at = [(b, torch.tensor(real)) for b, real in enumerate(new.real)]
        inputs = dict(attention_mask=new.mask())
        self.trained(new.ids(), texts, at, inputs, train, seed, cut if train == "yes" and 0 < cut < length else 0)

    def trained(
        self, ids: Tensor, texts: list[tuple[int, ...]], at: list[Any], inputs: dict[str, Any], train: str, seed: int,
        cut: int = 0,
    ) -> None:  # fmt: skip
        """Logits and, in training, gradients are those of the texts alone, added."""
        model = self.model
        if train in ("checkpointed", "reentrant"):
            self.hooked = True
            model.gradient_checkpointing_enable({"use_reentrant": train == "reentrant"})
        if train != "no":
            model.train().requires_grad_(True)
            model.zero_grad()
        try:
            if cut:
                mask, cache = inputs["attention_mask"], model.new_cache()
                parts = [model(ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache).logits]
                parts.append(model(ids[:, cut:], attention_mask=mask, past_key_values=cache).logits)
                logits = torch.cat(parts, 1)
            else:
                out = model(ids, **inputs)
                assert train == "no" or out.past_key_values is None
                logits = out.logits
            found = [logits[b, columns] for b, columns in at]
            for text, one in zip(texts, found, strict=True):
                close(one.detach(), self.of.oracle.logits(text), self.of.tolerance, "a text in training")
            CALLS["texts"] += len(texts)
            CALLS["forwards"] += 1
            if train != "no" and any(texts):
                draw = torch.Generator().manual_seed(seed)
                weights = [torch.randn(one.shape, generator=draw, dtype=one.dtype) for one in found]
                sum((one * weight).sum() for one, weight in zip(found, weights, strict=True)).backward()
                self.same_gradients(self.of.oracle.gradients(texts, weights))
        finally:
            model.gradient_checkpointing_disable()
            model.eval().requires_grad_(False)
            model.zero_grad()

    def same_gradients(self, wanted: dict[str, Tensor]) -> None:
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        assert found.keys() >= wanted.keys(), wanted.keys() - found.keys()
        for name, gradient in found.items():
            other = wanted.get(name, torch.zeros_like(gradient))
            size = max(1.0, float(other.abs().max()))
            close(gradient / size, other / size, 10 * self.of.tolerance, name)
        CALLS["backwards"] += 1

    @rule(
        rows=st.integers(1, 3), length=st.integers(2, 24), seed=SEEDS, pad=st.sampled_from(["none", "left", "right"]),
        mode=st.sampled_from(["teacher", "distill"]),
    )  # fmt: skip
    def as_teacher(self, rows: int, length: int, seed: int, pad: str, mode: str) -> None:
        """Modes "teacher" and "distill" pass on what the teacher does; the caches alive do not notice."""
        new, model = piece(rows, length, seed, pad), self.model
        model.set_attention_mode(mode)
        self.hooked = True
        try:
            with torch.no_grad():
                out = model(new.ids(), attention_mask=new.mask(), output_hidden_states=True, use_cache=False)
                theirs = self.of.teacher(
                    new.ids(), attention_mask=new.mask(), output_hidden_states=True, use_cache=False
                )
            real = new.mask().bool()
            for ours, wanted in zip(out.hidden_states, theirs.hidden_states, strict=True):
                close(ours[real], wanted[real], 10 * self.of.tolerance, f"mode {mode}")
            if mode == "teacher":
                for b, row in enumerate(new.rows):
                    text = tuple(t for t, is_real in zip(row, new.real[b], strict=True) if is_real)
                    close(out.logits[b][real[b]], self.of.oracle.teacher_logits(text), 1e-4, "the teacher alone")
                self.taught_steps(new)
            CALLS["teacher"] += 1
        finally:
            model.set_attention_mode("student")

    def taught_steps(self, new: Piece) -> None:
        """Mode "teacher" reads on with keys and values of its own."""
        cache, row = self.model.new_cache(), new.rows[0]
        cut = max(1, len(row) // 2)
        with torch.no_grad():
            parts = [
                self.model(torch.tensor([part]), past_key_values=cache).logits[0] for part in (row[:cut], row[cut:])
            ]
        close(torch.cat(parts), self.of.oracle.teacher_logits(tuple(row)), 1e-4, "the teacher in pieces")

    # The model itself

    @precondition(lambda self: self.made < 2)
    @rule(form=st.sampled_from(["pickle", "deepcopy", "folder"]))
    def again(self, form: str) -> None:
        """From now on another object with the same weights, to which caches alive belong as well."""
        if form == "pickle" and self.hooked:  # hooks of transformers (hidden states, checkpointing) cannot be
            form = "deepcopy"
        if form == "folder":
            self.hooked = False
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                model = type(self.model).from_pretrained(folder, dtype=self.of.model.dtype)
        else:
            model = copy.deepcopy(self.model) if form == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        kept, new = dict(self.model.named_parameters()), dict(model.named_parameters())
        assert kept.keys() == new.keys() and all(torch.equal(p, new[n]) for n, p in kept.items())
        self.model, self.made = model.eval().requires_grad_(False), self.made + 1
        CALLS["models"] += 1


def first_state(cache: Any) -> int:
    """Index of the first converted layer."""
    return cache.layers.index(cache.lizard_layers()[0])


def first_kept(cache: Any) -> int:
    """Index of the first kept softmax layer."""
    return next(i for i, layer in enumerate(cache.layers) if not hasattr(layer, "state"))
