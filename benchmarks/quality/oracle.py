"""An oracle instead of a score: what the teacher's later queries lose without a key decides whether it stays.

It knows the text to come, so no model is made that way. It says what the best score of its kind would be worth, and how
much of that a learned score leaves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lizard_models.distill.key_labels import LEAST, key_labels
from lizard_models.distill.stage0 import Labels, LayerKeys, labels_of, read_teacher
from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.recipes import Stage0Config

LOWEST = 2 * math.log(LEAST)  # below every label: of keys that no query sees after they have left the window


def choose_by_labels(model: LizardCausalLM, labeller: LizardCausalLM, recipe: Stage0Config) -> list[RemovableHandle]:
    """Makes ``model`` keep the keys whose labels, as stage 0 would learn them, are the largest of a head.

    Before each forward of its decoder ``labeller`` reads the same tokens as the teacher, and what its layers say of the
    keys takes the place of the layers' scores. That is all that differs from a learned score: places, ties, the time at
    which a key is judged and the sums are as ever. Keys with one later query or more have a label, whatever
    ``label_queries`` says. Removing the handles brings the scores back.

    labeller: of the same layers, with the teacher's weights, which no training of ``model`` may move. Raises ValueError
    for layers that do not match, and, when it reads, for padding and for a cache with tokens in it.
    """
    readers, sources = model.lizard_attentions(), labeller.lizard_attentions()
    if [a.layer_idx for a in readers] != [a.layer_idx for a in sources]:
        raise ValueError(
            f"labeller: converts layers {[a.layer_idx for a in sources]}, wanted {[a.layer_idx for a in readers]}"
        )
    labeller.set_attention_mode("teacher")
    oracle = _Oracle(labeller, labels_of(recipe))
    handles = [model.model.register_forward_pre_hook(oracle.read, with_kwargs=True)]
    for number, attention in enumerate(readers):
        if attention.lizard.key_score is not None:
            handles.append(attention.lizard.key_score.register_forward_hook(oracle.answers(number)))
    return handles


class _Oracle:
    def __init__(self, labeller: LizardCausalLM, labels: Labels) -> None:
        self.labeller, self.labels = labeller, labels
        self.found: list[Tensor] = []  # [B, T, Hk] of each layer
        self.told: list[int] = []  # tokens of these that each layer has asked for

    @torch.no_grad()
    def read(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Labels the tokens that the decoder is about to read."""
        if decoder.mode == "teacher":
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None and not bool(mask.all()):
            raise ValueError("attention_mask: got padding, wanted whole rows: an oracle knows all that follows")
        if past is not None and past.get_seq_length():
            raise ValueError(f"past_key_values: got {past.get_seq_length()} tokens, wanted the whole text at once")
        attentions = self.labeller.lizard_attentions()
        plain = self.labels._replace(queries=1)
        leave = [a for a in attentions if ids.shape[1] > a.lizard.config.window + a.lizard.config.anchors]
        found: list[Tensor] = []

        def look(number: int, attention: LizardAttention, keys: LayerKeys) -> None:
            labels = key_labels(keys.attention, attention.lizard.config.window, plain.kind, plain.block)
            found.append(labels.nan_to_num(nan=LOWEST))

        if leave:
            read_teacher(self.labeller, ids, plain, look, leave)
        of_layer = dict(zip((a.layer_idx for a in leave), found, strict=True))
        none = {a.layer_idx: a.lizard.config.num_key_heads for a in attentions}  # of layers whose keys all stay anyway
        self.found = [
            of_layer[layer] if layer in of_layer else torch.zeros(*ids.shape, heads, device=ids.device)
            for layer, heads in none.items()
        ]
        self.told = [0] * len(attentions)

    def answers(self, number: int) -> Any:
        """A hook of the score of a layer: its labels in place of what it returned."""

        def answer(score: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            scores, state = output
            start, labels, delay = self.told[number], self.found[number], score.delay
            self.told[number] = end = start + scores.shape[1]  # anchors that move make a layer read in blocks
            late = torch.cat([labels.new_zeros(labels[:, :delay].shape), labels], 1)[:, start:end]
            return late.to(scores.dtype), state

        return answer
