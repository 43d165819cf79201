"""The decode step of ``generate`` as a CUDA graph: what may be captured, what is copied where, who keeps it.

Shapes: B rows.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from lizard_layers import state_bytes
from lizard_models.model.cache import LizardCache
from lizard_models.model.cache_name import CACHE
from lizard_models.model.read_graph import free_read_graphs, read_graphs_off
from lizard_models.model.replayable import is_plain, key_of, why_not
from lizard_models.model.step_recorder import Recorder, Replay, recorder_for

logger = logging.get_logger(__name__)

LEAST_STEPS = 4  # to come, for which a capture is worth the time of one step
POOLED = 2  # caches with their graphs that a model keeps from one call to the next
SHARE = 16  # a state of more than a sixteenth of the memory is not kept between calls
GIVEN = {"next_sequence_length", CACHE, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
NO_PART = ("use_cache", "return_dict", "within_causal_lm", "output_attentions", "output_hidden_states")


class _Captured(NamedTuple):
    """A step in a graph, and all that it was captured with. It holds no reference to its cache, whose value it is."""

    replay: Replay
    input_ids: Tensor  # [B, 1]
    position_ids: Tensor  # [B, 1]
    states: list[Any]
    kind: str
    key: tuple[Any, ...]
    model: weakref.ref[Any]

    def fits(self, cache: LizardCache, kind: str, like: Tensor) -> bool:
        """Whether it is still the step of this cache, whose states lie where they lay."""
        held = self.kind == kind and self.input_ids.shape == like.shape
        return held and all(a.state is b for a, b in zip(cache.lizard_layers(), self.states, strict=True))


_graphs: weakref.WeakKeyDictionary[LizardCache, _Captured] = weakref.WeakKeyDictionary()
_pools: weakref.WeakKeyDictionary[nn.Module, list[LizardCache]] = weakref.WeakKeyDictionary()
_running: contextvars.ContextVar[DecodeSteps | None] = contextvars.ContextVar("lizard_decode_steps", default=None)


class DecodeSteps:
    """The steps of one call of ``generate``.

    The first runs as it is, on the stream of the capture; from the second on one graph is replayed. Ids are copied into
    its tensor, positions too unless it has counted them on itself, the state lies where it lay, and the logits
    [B, 1, vocabulary] that come back are good until the next step.
    """

    def __init__(self, model: Any, cache: LizardCache, recorder: Recorder, to_come: int) -> None:
        self.model, self.recorder, self.to_come = model, recorder, to_come
        self.key = key_of(model)
        self.reusable = is_plain(model)
        self.inside = False
        self.warm: set[str] = set()  # kinds of steps
        self.refused: str | None = None
        self.last: _Captured | None = None  # where the last step came from
        # peft's own way of preparing inputs reads what a step of the library's does without
        self.prepares = "prepare_inputs_for_generation" not in vars(model)
        if not self.reusable or not _belongs(cache, model, self.key):
            _graphs.pop(cache, None)

    def logits(self, cache: Any, input_ids: Tensor | None, inputs: dict[str, Any]) -> Tensor | None:
        """Those of a step from a graph; None where the step is to run as it is.

        inputs: the other arguments of the forward.
        """
        if self.inside:
            return None
        self.last = None
        if self.refused is not None or input_ids is None or input_ids.shape[1] != 1:
            return None
        if isinstance(cache, LizardCache) and cache.seen.on_host == 0 or inputs.get("attention_mask") is not None:
            return None  # a prompt of one token
        self.refused = why_not_this(cache, inputs)
        if self.refused is not None:
            tell(self.refused)
            return None
        position_ids, kind = inputs["position_ids"], kind_of_step(self.model.model, cache)
        captured = _graphs.get(cache)
        if captured is None or not captured.fits(cache, kind, input_ids):
            _graphs.pop(cache, None)
            self.to_come -= 1
            if self.to_come < LEAST_STEPS:
                return None
            if kind not in self.warm:
                self.warm.add(kind)
                return self._warm_up(cache, input_ids, position_ids)
            captured = self._capture(cache, input_ids, position_ids, kind)
            if captured is None:
                return None
            _graphs[cache] = captured
        captured.input_ids.copy_(input_ids)
        if position_ids is not captured.position_ids:
            captured.position_ids.copy_(position_ids)
        seen = cache.seen.on_host
        logits = captured.replay()
        cache.seen.on_host = seen + 1
        self.last = captured
        return logits

    def inputs(self, input_ids: Tensor, given: dict[str, Any]) -> dict[str, Any] | None:
        """The forward's inputs of a step, as ``prepare_inputs_for_generation`` makes them of what it is given, without
        copies; None where there is more to them."""
        positions = given.get("position_ids")
        more = {name for name, x in given.items() if x is not None} - GIVEN
        if not self.prepares or more or positions is None or given.get("next_sequence_length") != 1:
            return None
        made = {"input_ids": input_ids[:, -1:], CACHE: given[CACHE]}
        made["position_ids"] = positions if positions.shape[1] == 1 else positions[:, -1:]
        return made | {name: given[name] for name in ("use_cache", "logits_to_keep") if name in given}

    def advance(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of ``generate`` for the next step: of positions and mask only what it reads, the positions.

        None where transformers is to make them.
        """
        positions, more = given.get("position_ids"), {name for name, x in given.items() if x is not None} - GIVEN
        if not self.prepares or more or positions is None:
            return None
        after = positions[:, -1:] + 1 if self.last is None else self.last.position_ids
        return given | {"position_ids": after, "attention_mask": None}

    def _step(self, cache: LizardCache, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        self.inside = True
        try:
            forward: Any = type(self.model).forward  # hooks of the model itself run around every step
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "past_key_values": cache}
            return forward(self.model, **inputs, use_cache=True, return_dict=True).logits
        finally:
            self.inside = False

    def _warm_up(self, cache: LizardCache, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """A step as it is before the capture: kernels compile, libraries allocate, what cannot be captured shows."""
        logits, self.refused = self.recorder.warm_up(lambda: self._step(cache, input_ids, position_ids))
        if self.refused is not None:
            tell(self.refused)
        return logits

    def _capture(self, cache: LizardCache, input_ids: Tensor, position_ids: Tensor, kind: str) -> _Captured | None:
        ids, positions, seen = input_ids.clone(), position_ids.clone(), cache.seen.on_host
        held = weakref.ref(cache)

        def step() -> Tensor:
            logits = self._step(held(), ids, positions)  # type: ignore[arg-type]
            positions.add_(1)
            return logits

        try:
            replay = self.recorder.capture(step)
        except Exception as error:
            self.refused = f"the capture failed ({type(error).__name__}: {str(error).splitlines()[0]})"
            tell(self.refused)
            return None
        finally:
            cache.seen.on_host = seen  # nothing has run
        states = [layer.state for layer in cache.lizard_layers()]
        return _Captured(replay, ids, positions, states, kind, self.key, weakref.ref(self.model))


def kind_of_step(decoder: Any, cache: LizardCache) -> str:
    """Which step comes next: before the anchors move on, after it, or where a row of padding may yet fill its own."""
    assert cache.seen.on_host is not None
    if not decoder.moves_anchors or cache.seen.on_host + 1 <= decoder.position_range.limit:
        return "before"
    return "after padding" if cache.padded else "after"


def tell(reason: str) -> None:
    """Say once why the steps are not captured."""
    logger.warning_once(f"generate decodes step by step, without a CUDA graph: {reason}")


def _belongs(cache: LizardCache, model: nn.Module, key: tuple[Any, ...]) -> bool:
    captured = _graphs.get(cache)
    return captured is None or (captured.model() is model and captured.key == key)


def why_not_this(cache: Any, inputs: dict[str, Any]) -> str | None:
    """Why this step cannot be one of the graph's, or None. inputs: all of the forward's but ids and cache."""
    given = {name for name, x in inputs.items() if name not in NO_PART and x is not None}
    given |= {name for name in ("output_attentions", "output_hidden_states") if inputs.get(name)}
    given -= {"logits_to_keep"} if inputs.get("logits_to_keep") in (None, 0, 1) else set()
    if given != {"position_ids"}:
        return f"the forward gets {', '.join(sorted(given)) or 'no position_ids'}"
    if not inputs.get("return_dict"):
        return "the forward returns a tuple"
    if not isinstance(cache, LizardCache) or cache.seen.on_host is None or cache.seen.on_device is None:
        return "the cache is counted by another graph"
    if any(layer.state is None or layer.record_past for layer in cache.lizard_layers()):
        return "the cache records its past"
    return None


@contextlib.contextmanager
def decode_steps(
    model: Any, wanted: bool, rows: int, to_come: int, inputs: dict[str, Any], kept: bool
) -> Iterator[None]:
    """Within: the steps of ``generate`` for these rows come from a graph where they can.

    inputs: of ``generate``, whose new cache may be replaced by one of the model's pool, to which it goes back. kept:
    the cache is the caller's afterwards. to_come: how many steps at most.
    """
    cache: Any = inputs.get(CACHE)
    recorder = recorder_for(model.device) if wanted and model.mode == "student" else None
    reason = None if recorder is None else why_not(model, cache)
    if reason is not None:
        tell(reason)
    if recorder is None or reason is not None:
        with read_graphs_off(not wanted):
            yield
        return
    own = not kept and not getattr(cache, "_is_user_defined", False)
    if own and cache.seen.on_host == 0:
        cache = inputs[CACHE] = _take(model, rows) or cache
    steps = DecodeSteps(model, cache, recorder, to_come)
    before = _running.set(steps)
    try:
        yield
    finally:
        _running.reset(before)
        if not steps.reusable:
            _graphs.pop(cache, None)
        elif own:
            _give(model, cache)


def running_steps(model: Any) -> DecodeSteps | None:
    """Those of the call of ``generate`` of this model that runs in this thread; None outside of one."""
    if torch.compiler.is_compiling():
        return None
    steps = _running.get()
    return steps if steps is not None and steps.model is model else None


def free_decode_graphs(model: nn.Module) -> None:
    """Let go of the caches and graphs that ``generate`` has kept for its next call, and of those that read prompts."""
    _pools.pop(model, None)
    free_read_graphs(model)


def _take(model: Any, rows: int) -> LizardCache | None:
    """An empty cache of so many rows with its graph, whose state keeps its place; None where there is none."""
    pool = _pools.get(model, [])
    key = key_of(model) if pool else ()
    for cache in list(pool):
        captured = _graphs.get(cache)
        if captured is not None and captured.input_ids.shape[0] == rows and captured.key == key:
            try:
                pool.remove(cache)  # no other thread has it
            except ValueError:
                continue
            cache.blank()
            return cache
    return None


def _give(model: Any, cache: LizardCache) -> None:
    """Keep a cache and its graph for the next call."""
    captured = _graphs.get(cache)
    if captured is None:
        return
    held = sum(state_bytes(state) for state in captured.states)
    if model.device.type == "cuda" and held * SHARE > torch.cuda.get_device_properties(model.device).total_memory:
        return
    rows = captured.input_ids.shape[0]
    pool = _pools.setdefault(model, [])
    others = [c for c in pool if c in _graphs and _graphs[c].input_ids.shape[0] != rows]
    pool[:] = [*others, cache][-POOLED:]
