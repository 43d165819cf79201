"""Faults of the kinds that strangers met, to be planted in the library: a fuzz that passes with one of them is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lizard_models.model import cache, cache_layer, causal_lm, decoder, rollback, state_file

Patch = pytest.MonkeyPatch


def _padding_is_read(patch: Patch) -> None:
    real = cache_layer.LizardCacheLayer.read

    def read(
        self: Any, attention: Any, x: Any, q: Any, k: Any, v: Any, rope: Any, mask: Any, blocks: Any = None
    ) -> Any:
        return real(self, attention, x, q, k, v, rope, None, blocks)

    patch.setattr(cache_layer.LizardCacheLayer, "read", read)


def _one_too_few_are_taken_back(patch: Patch) -> None:
    patch.setattr(rollback.Rollback, "without", lambda self, removed: self._after(self._held() - removed + 1))


def _the_record_keeps_its_rows(patch: Patch) -> None:
    patch.setattr(rollback.Rollback, "select", lambda self, indices: None)


def _what_is_read_again_drops_no_keys(patch: Patch) -> None:
    patch.setattr(rollback, "depends_on_blocks", lambda config: config.score_received)


def _the_mask_keeps_its_rows(patch: Patch) -> None:
    patch.setattr(cache.LizardCache, "_select_rows", lambda self, rows: None)


def _a_mask_of_the_past_is_believed(patch: Patch) -> None:
    patch.setattr(cache.LizardCache, "check_mask", lambda self, past_mask: None)


def _a_copy_shares_its_state(patch: Patch) -> None:
    def copy(self: Any, seen: Any) -> Any:
        new = cache_layer.LizardCacheLayer(seen, self.is_compileable)
        new.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "seen"}
        return new

    patch.setattr(cache_layer.LizardCacheLayer, "copy", copy)


def _packed_rows_are_one_text(patch: Patch) -> None:
    patch.setattr(decoder, "find_packing", lambda *args: None)


def _anchors_stay(patch: Patch) -> None:
    patch.setattr(decoder.LizardDecoder, "_anchor_blocks", lambda self, *args: None)


def _padding_counts_when_writing(patch: Patch) -> None:
    real = causal_lm.LizardCausalLM._prepare_position_ids_for_generation

    def positions(self: Any, inputs: Any, kwargs: dict[str, Any]) -> Any:
        return real(self, inputs, kwargs | {"attention_mask": None})

    patch.setattr(causal_lm.LizardCausalLM, "_prepare_position_ids_for_generation", positions)


def _padding_repeats_nothing(patch: Patch) -> None:
    patch.setattr(decoder, "repeat_over_padding", lambda hidden, mask: hidden)


def _files_forget_a_position(patch: Patch) -> None:
    real = cache.LizardCache.advance

    fill = state_file.fill_cache

    def fill_short(cache_: Any, tensors: Any, seen: int) -> None:
        fill(cache_, tensors, seen)
        real(cache_, -1)

    patch.setattr(state_file, "fill_cache", fill_short)


def _drafts_read_the_text_again(patch: Patch) -> None:
    real = causal_lm.LizardCausalLM.prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, read_before: int = 0, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs)

    patch.setattr(causal_lm.LizardCausalLM, "prepare_inputs_for_generation", prepare)


PLANTED: dict[str, Callable[[Patch], None]] = {
    name[1:]: plant for name, plant in dict(globals()).items() if name.startswith("_") and not name.startswith("__")
}
