"""The reading of a prompt as a CUDA graph, where a shape of it comes again.

Shapes: B rows, T new positions.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from lizard_layers import tensors_of
from lizard_models.model.cache import LizardCache
from lizard_models.model.graphs import accompanied
from lizard_models.model.packing import find_packing
from lizard_models.model.replayable import is_plain, key_of, why_not
from lizard_models.model.step_recorder import Recorder, Replay, recorder_for

logger = logging.get_logger(__name__)

TOKENS = 16384  # B T at most: with more the device takes longer than its host
GRAPHS = 4  # that a model keeps
SHARE = 16  # they take at most a sixteenth of the GPU's memory
SHAPES = 64  # whose coming is remembered
# arguments of a forward that may come, and those that must not be true
NAMES = {
    "input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache", "return_dict", "within_causal_lm",
}  # fmt: skip
UNSET = ("output_attentions", "output_hidden_states")


class Shape(NamedTuple):
    """What makes two readings one graph."""

    begins: bool  # the cache is empty
    rows: int
    length: int
    keep: int  # logits_to_keep
    positions: tuple[int, ...] | None  # of position_ids
    inference: bool


class _Captured(NamedTuple):
    replay: Replay
    input_ids: Tensor  # [B, T]
    position_ids: Tensor | None  # [B or 1, T]
    before: list[Tensor]  # states that it reads, none at the beginning of a text
    after: LizardCache  # with those that it leaves


class ReadGraphs:
    """The graphs of one model, at most ``GRAPHS``, the latest used, of at most ``TOKENS`` tokens each.

    The first reading of a shape runs as ever, the second is captured and replayed, after one that runs as it is on the
    stream of the capture. All share one memory, which is let go with the last of them, and all at once where it is more
    than a 1 / ``SHARE`` of the GPU's, or where weights lie elsewhere. Their own states and logits are copied, so that
    what a caller gets is the caller's; one reading runs at a time.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.came: OrderedDict[Shape, str | None] = OrderedDict()  # with the reason for which it is not captured
        self.forget()

    def forget(self, key: tuple[Any, ...] | None = None) -> None:
        """Let every graph go, and begin anew with a model of this key."""
        self.key, self.warm = key, False
        self.graphs: OrderedDict[Shape, _Captured] = OrderedDict()
        self.pool: Any = None
        self.bytes = 0
        self.done: Any = None  # when the last replay is, on the device
        for shape in self.came:
            self.came[shape] = None

    def read(
        self, model: Any, recorder: Recorder, input_ids: Tensor, cache: LizardCache, inputs: dict[str, Any]
    ) -> Tensor | None:
        """Logits [B, T or logits_to_keep, vocabulary] with the cache as the forward leaves it; None where the forward
        is to run."""
        with self.lock:
            shape = shape_of(input_ids, cache, inputs)
            if shape not in self.came:
                self.came[shape] = None
                while len(self.came) > SHAPES:
                    self.came.popitem(last=False)
                return None
            self.came.move_to_end(shape)
            key = key_of(model)
            if key != self.key:
                self.forget(key)
            reason = self.came[shape] or why_not_now(model, shape, cache, inputs)
            if reason is None and shape not in self.graphs:
                if not self.warm:
                    return self._warm_up(model, recorder, shape, input_ids, cache, inputs)
                reason = self.came[shape] = self._capture(model, recorder, shape, input_ids, cache, inputs)
            if reason is not None:
                tell(reason)
                return None
            self.graphs.move_to_end(shape)
            return self._replay(self.graphs[shape], input_ids, cache, inputs)

    def _warm_up(
        self, model: Any, recorder: Recorder, shape: Shape, ids: Tensor, cache: LizardCache, inputs: dict[str, Any]
    ) -> Tensor | None:
        """A reading as it is on the stream of the capture: libraries allocate, what cannot be captured shows."""
        reason = self.came[shape] = why_not_at_all(model, cache)
        if reason is not None:
            tell(reason)
            return None
        logits, found = recorder.warm_up(lambda: forward(model, ids, inputs.get("position_ids"), cache, shape.keep))
        if found is not None:
            self.came[shape] = found
            tell(found)
        self.warm = found is None
        return logits

    def _capture(
        self, model: Any, recorder: Recorder, shape: Shape, ids: Tensor, cache: LizardCache, inputs: dict[str, Any]
    ) -> str | None:
        """Makes the graph of a shape; why there is none, or None."""
        reason = why_not_at_all(model, cache) or too_large(model, shape)
        if reason is not None:
            return reason
        while len(self.graphs) >= GRAPHS:
            self.graphs.popitem(last=False)
        positions = inputs.get("position_ids")
        ids, positions = ids.clone(), None if positions is None else positions.clone()
        own = LizardCache(model.config) if shape.begins else cache.copy()
        own.seen.live_on(ids.device)
        before, held = states(own), memory(ids.device)
        self.pool = self.pool or recorder.new_pool()
        try:
            replay = recorder.capture(lambda: forward(model, ids, positions, own, shape.keep), self.pool)
        except Exception as error:
            self.pool = self.pool if self.graphs else None
            return f"the capture failed ({type(error).__name__}: {str(error).splitlines()[0]})"
        self.bytes += memory(ids.device) - held
        if self.bytes * SHARE > total_memory(ids.device):
            taken = self.bytes
            self.forget(self.key)
            self.came[shape] = f"the graphs took {taken / 2**30:.2f} GiB, more than a {SHARE}th of the device's memory"
            return self.came[shape]
        self.graphs[shape] = _Captured(replay, ids, positions, before, own)
        return None

    def _replay(self, graph: _Captured, ids: Tensor, cache: LizardCache, inputs: dict[str, Any]) -> Tensor | None:
        rows, length = ids.shape
        given = states(cache) if graph.before else []
        if [(t.shape, t.dtype, t.device) for t in graph.before] != [(t.shape, t.dtype, t.device) for t in given]:
            return None
        cache.make_ready(rows)
        with self._in_turn(ids):
            graph.input_ids.copy_(ids)
            if graph.position_ids is not None:
                graph.position_ids.copy_(inputs["position_ids"])
            if given:
                torch._foreach_copy_(graph.before, given)
            logits = graph.replay().clone()
            cache.take(graph.after)
        cache.advance(length)
        return logits

    @contextlib.contextmanager
    def _in_turn(self, like: Tensor) -> Iterator[None]:
        """Within: after the last replay, whatever the stream it was given."""
        if not like.is_cuda:
            yield
            return
        if self.done is None:
            self.done = torch.cuda.Event()
        else:
            self.done.wait()
        try:
            yield
        finally:
            self.done.record()


_graphs: weakref.WeakKeyDictionary[nn.Module, ReadGraphs] = weakref.WeakKeyDictionary()
_off: contextvars.ContextVar[bool] = contextvars.ContextVar("lizard_no_read_graphs", default=False)


@contextlib.contextmanager
def read_graphs_off(off: bool = True) -> Iterator[None]:
    """Within: whether forwards run as they are."""
    token = _off.set(off or _off.get())
    try:
        yield
    finally:
        _off.reset(token)


def read_from_graph(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, LizardCache] | None:
    """Logits and cache of a forward with these arguments from a graph; None where it is to run as it is."""
    input_ids, cache = inputs["input_ids"], inputs["past_key_values"]
    if torch.compiler.is_compiling() or _off.get() or torch.is_grad_enabled() or model.mode != "student":
        return None
    if type(input_ids) is not Tensor or input_ids.ndim != 2 or input_ids.shape[1] < 2 or not input_ids.shape[0]:
        return None
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() or input_ids.device != model.device:
        return None
    recorder = recorder_for(input_ids.device)
    if recorder is None:
        return None
    if cache is None:
        wanted = inputs.get("use_cache")
        wanted = model.config.use_cache and not model.training if wanted is None else wanted
        cache = LizardCache(model.config) if wanted else None
    if not isinstance(cache, LizardCache) or cache.seen.on_host is None or not returns_logits(model, inputs):
        return None
    if _graphs.get(model) is None:
        _graphs[model] = ReadGraphs()
    logits = _graphs[model].read(model, recorder, input_ids, cache, inputs)
    return None if logits is None else (logits, cache)


def returns_logits(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether these arguments of a forward ask for logits and a cache, and for no more."""
    given = {name for name, x in inputs.items() if x is not None} - NAMES
    given -= {name for name in UNSET if not inputs.get(name)}
    if given - {"logits_to_keep"} or not isinstance(inputs.get("logits_to_keep"), int):
        return False
    wants_dict = inputs.get("return_dict")
    asked = any(getattr(model.config, name, False) for name in UNSET)
    return not asked and bool(model.config.return_dict if wants_dict is None else wants_dict)


def shape_of(input_ids: Tensor, cache: LizardCache, inputs: dict[str, Any]) -> Shape:
    """What the graph of these inputs depends on."""
    positions, begins = inputs.get("position_ids"), cache.seen.on_host == 0 and is_empty(cache)
    places = None if positions is None else tuple(positions.shape)
    keep = inputs.get("logits_to_keep") or 0
    rows, length = input_ids.shape
    return Shape(begins, rows, length, keep, places, torch.is_inference_mode_enabled())


def is_empty(cache: LizardCache) -> bool:
    """Whether no layer holds anything that a forward would read."""
    return all(layer.is_empty for layer in cache.lizard_layers())


def why_not_now(model: Any, shape: Shape, cache: LizardCache, inputs: dict[str, Any]) -> str | None:
    """Why these values are not read from a graph, or None. Raises what the forward would for them."""
    decoder, seen, mask = model.model, cache.seen.on_host or 0, inputs.get("attention_mask")
    if shape.rows * shape.length > TOKENS:
        return f"more than {TOKENS} tokens at once"
    if any(layer.record_past for layer in cache.lizard_layers()):
        return "the cache records its past"
    if not shape.begins and any(layer.state is None for layer in cache.lizard_layers()):
        return "the cache lacks a state"
    if decoder.moves_anchors and seen + shape.length > decoder.position_range.limit:
        return "the anchors move on"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    cache.expect(shape.rows, shape.length)
    if mask is not None:
        if mask.shape != (shape.rows, seen + shape.length) or not bool(mask.all()):
            return "an attention_mask with padding"
        if seen:
            cache.check_mask(mask[:, :seen].bool())
    positions = inputs.get("position_ids")
    if positions is None:
        return None
    if positions.ndim != 2 or positions.shape[1] != shape.length or positions.shape[0] not in (1, shape.rows):
        return "position_ids of another shape"
    return "packed sequences" if find_packing(positions, shape.rows, None) is not None else None


def why_not_at_all(model: Any, cache: LizardCache) -> str | None:
    """Why no forward of the model as it is can be captured, or None."""
    other = None if is_plain(model) else "adapters, or modules of other packages"
    return why_not(model, cache) or other


def too_large(model: Any, shape: Shape) -> str | None:
    """Why a graph would take too much memory, by the largest tensors of a forward; or None."""
    config, tokens = model.config, shape.rows * shape.length
    logits = (shape.rows * shape.keep or tokens) * config.vocab_size
    wanted = (logits + tokens * (2 * config.intermediate_size + 4 * config.hidden_size)) * model.dtype.itemsize
    allowed = total_memory(model.device) / SHARE
    return f"a graph of {tokens} tokens would take more than a {SHARE}th of the memory" if wanted > allowed else None


def forward(model: Any, input_ids: Tensor, position_ids: Tensor | None, cache: LizardCache, keep: int) -> Tensor:
    """Logits of a forward that runs as it is, but for what ``why_not_now`` has looked at."""
    inputs = {"position_ids": position_ids, "past_key_values": cache, "logits_to_keep": keep}
    with read_graphs_off(), accompanied():  # hooks of the model itself run around every call
        return type(model).forward(model, input_ids, **inputs, use_cache=True, return_dict=True).logits


def states(cache: LizardCache) -> list[Tensor]:
    """All tensors of the states, layer after layer; none where there are no states."""
    held = [layer.state for layer in cache.lizard_layers() if layer.state is not None]
    return [t for state in held for t in tensors_of(state).values()]


def memory(device: torch.device) -> int:
    """Bytes that PyTorch has of a device."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def total_memory(device: torch.device) -> float:
    """Bytes that a device has."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def free_read_graphs(model: nn.Module) -> None:
    """Let go of the graphs that read this model's prompts, and of what is known of their shapes."""
    _graphs.pop(model, None)


def tell(reason: str) -> None:
    """Say once why prompts are not read from a graph."""
    logger.warning_once(f"prompts are read without a CUDA graph: {reason}")
