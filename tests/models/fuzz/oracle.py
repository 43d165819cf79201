"""What a call must give: the same text alone, in one piece, without a cache, in the ops' reference implementation."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

Text = tuple[int, ...]
MOST = 400  # texts whose logits are kept


class Oracle:
    """A copy of the model whose every layer runs the naive op, one text at a time, and the teacher beside it."""

    def __init__(self, model: Any, teacher: Any) -> None:
        self.model, self.teacher = copy.deepcopy(model), teacher
        for attention in self.model.lizard_attentions():
            attention.lizard.config = dataclasses.replace(attention.lizard.config, impl="naive")
        self._known: OrderedDict[tuple[str, Text], Tensor] = OrderedDict()

    def logits(self, text: Text) -> Tensor:
        """[n, V] of the n tokens of a text."""
        return self._of("student", self.model, text)

    def teacher_logits(self, text: Text) -> Tensor:
        """The teacher's."""
        return self._of("teacher", self.teacher, text)

    def _of(self, kind: str, model: Any, text: Text) -> Tensor:
        key = (kind, tuple(text))
        if key not in self._known:
            if not text:
                return torch.zeros(0, model.config.vocab_size, dtype=model.dtype)
            with torch.no_grad():
                self._known[key] = model(torch.tensor([text]), use_cache=False).logits[0]
            while len(self._known) > MOST:
                self._known.popitem(last=False)
        return self._known[key]

    def gradients(self, texts: list[Text], weights: list[Tensor]) -> dict[str, Tensor]:
        """Of the sum of every text's logits [n, V] times its weights [n, V]: each text's own, added."""
        self.model.requires_grad_(True).zero_grad()
        for text, weight in zip(texts, weights, strict=True):
            if text:
                (self.model(torch.tensor([text]), use_cache=False).logits[0] * weight).sum().backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.requires_grad_(False).zero_grad()
        return found
