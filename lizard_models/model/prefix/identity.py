"""Who a model is: what the states of two models must have in common to mean the same."""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from typing import Any

import torch

from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.state_file import checksum, comparable
from lizard_models.model.tensor_parallel import refuse_split

POSITIONS = ("positions", "position_limit", "position_step")
"""Choices that a state file may differ in, since it says what was read, and a state that stands for a text may not."""


class Identities:
    """The identities of models, found again only where their weights may have changed."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, model: Any) -> str:
        """sha256 [hex] of a model's config, dtype and weights, and of the autocast it is called in.

        The weights are summed again when one of them was moved or written to. Raises ValueError for weights that are
        not there (offloaded), and for adapters, which can be switched on and off.
        """
        with self._lock:
            seen = _fingerprint(model)
            known = self._known.get(model)
            if known is None or seen is None or known[0] != seen:
                known = self._known[model] = (seen, _identity(model))
        return hashlib.sha256(f"{known[1]} {_autocast(model)}".encode()).hexdigest()


def _fingerprint(model: Any) -> Any:
    """What changes with the weights at next to no cost; None where nothing shows it."""
    parameters = list(model.named_parameters())
    if any(p.is_inference() for _, p in parameters):  # they have no count of the writes to them
        return None
    return str(model.dtype), [(name, id(p), p._version, p.is_meta or p.data_ptr()) for name, p in parameters]


def _identity(model: Any) -> str:
    refuse_split(model, "prefix_states")
    for name, part in model.named_modules():
        if hasattr(part, "base_layer"):
            raise ValueError(
                f"prefix_states: {name} has an adapter, which can be switched off, and states do not say whether it "
                "was: merge it first (merge_and_unload)"
            )
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"prefix_states: the weights {name} are not in memory: load the model without offloading")
    choices = lizard_config(model.config).to_dict()["attention"]
    own = {name: choices.get(name) for name in POSITIONS}
    described = {"config": comparable(model.config), "positions": own, "dtype": str(model.dtype)}
    try:
        weights = checksum(model.named_parameters())
    except (RuntimeError, TypeError) as error:  # of quantised weights that are no plain tensors
        raise ValueError(f"prefix_states: the weights of this model cannot be summed: {error}") from error
    return hashlib.sha256(f"{json.dumps(described, sort_keys=True)} {weights}".encode()).hexdigest()


def _autocast(model: Any) -> str:
    kind = model.device.type
    return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "none"
