"""A budget in MiB for what a sequence's state takes, spent on kept keys where they save most."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lizard_layers import empty_state, state_bytes
from lizard_models.config import LizardConfig
from lizard_models.distill.parallel import is_main_process, wait_for_all
from lizard_models.evaluation.place_errors import LEVELS, place_errors
from lizard_models.evaluation.share_places import share_places
from lizard_models.files.records import read_record, write_record
from lizard_models.model.keep_places import keep_places
from lizard_models.model.layer_configs import attention_config, converted_layers, lizard_config
from lizard_models.model.linearize import student_config
from lizard_models.runs.memory import constant_bytes, told_places

DTYPE = torch.float32  # of the keys that a budget counts
STEP = 8  # places that are given at a time


class Prices(NamedTuple):
    """Bytes of one sequence's state with float32 keys."""

    without: int  # of the whole model, no key being kept; layers kept softmax, which grow, are not counted
    places: list[int]  # of a place of one key head, by converted layer
    layers: list[int]  # of a converted layer that has any place: its score's sums and ring


def prices(config: PreTrainedConfig) -> Prices:
    """What kept keys cost in a Lizard model of this configuration, whatever it says of them itself."""
    layers, held = converted_layers(config), []
    for places in (0, 1, 2):
        other = copy.deepcopy(config)
        other.lizard = lizard_config(config).replace(attention={"kept_keys": places}).to_dict()
        held.append([state_bytes(empty_state(attention_config(other, i), 1, DTYPE, device="meta")) for i in layers])
        if not places:
            without = constant_bytes(other, DTYPE)
    each = [(two - one) // config.num_key_value_heads for one, two in zip(*held[1:], strict=True)]
    return Prices(without, each, [2 * one - two - none for none, one, two in zip(*held, strict=True)])


def evenly_kept(teacher: PreTrainedConfig, config: LizardConfig, mib: float) -> LizardConfig:
    """``config`` with as many kept keys in every key head as the budget holds, at least one: where a run starts.

    Raises ValueError for a budget below the state without kept keys, and a config that has kept keys already.
    """
    if config.attention.keeps_keys:
        kept = config.attention.kept_keys
        raise ValueError(
            f"state_mib: got kept_keys={kept} as well, wanted one of the two; kept_keys=0 leaves it to the budget"
        )
    config = config.replace(attention={"kept_keys": 1})  # which is refused where keys cannot be kept
    paid = prices(student_config(teacher, config))
    if mib * 2**20 <= paid.without:
        raise ValueError(
            f"state_mib: got {mib:g}, wanted more than the {paid.without / 2**20:.2f} MiB that the state of one "
            "sequence takes without kept keys (float32 keys)"
        )
    left, place = mib * 2**20 - paid.without - sum(paid.layers), sum(paid.places) * teacher.num_key_value_heads
    return config.replace(attention={"kept_keys": max(1, int(left // place))})


def shared_mib(config: PreTrainedConfig, state_mib: float | None, scored: bool) -> float | None:
    """MiB that places are shared out of after stage 0: ``state_mib``, or with ``stage0.share_places`` what the state
    takes with as many places in every key head. None where every head keeps its number.

    scored: whether there is a stage 0. Raises ValueError for a ``state_mib`` without one.
    """
    if state_mib is not None and not scored:
        raise ValueError("state_mib: keys are shared out by the scores of stage 0, which is left out")
    lizard = lizard_config(config)
    even = lizard.attention.keeps_keys and isinstance(lizard.attention.kept_keys, int)
    if state_mib is not None or not (scored and even and lizard.stage0.share_places):
        return state_mib
    return constant_bytes(config, DTYPE) / 2**20


def places_within(config: PreTrainedConfig, errors: Tensor, mib: float) -> list[list[int]]:
    """Places of the key heads of every layer, none in layers kept softmax. errors: of ``place_errors``."""
    paid = prices(config)
    shared = share_places(errors.tolist(), LEVELS, int(mib * 2**20) - paid.without, paid.places, paid.layers, STEP)
    by_layer = dict(zip(converted_layers(config), shared, strict=True))
    return [list(by_layer.get(i, ())) for i in range(config.num_hidden_layers)]


def share_out(model: Any, rows: Tensor, mib: float, path: Path, device: str, home: str) -> None:
    """Gives a model after stage 0 the places that ``mib`` holds, by what they save on ``rows`` [N, T].

    path: of a JSON file with the places and the errors they were chosen by; it is written by the first call and read by
    later ones, so that a run that stops goes on with the same. device: to measure on; home: where the weights are else.
    """
    if not path.is_file():
        model.to(device)
        errors = place_errors(model, rows, LEVELS)
        model.to(home)
        chosen = {"places": places_within(model.config, errors, mib), "levels": LEVELS, "errors": errors.tolist()}
        if is_main_process():
            write_record(path, chosen)
    wait_for_all()
    keep_places(model, read_record(path, f"delete {str(path)!r}, and it is made again", False)["places"])


def told(config: PreTrainedConfig, mib: float) -> list[str]:
    """What became of a budget, in lines. config: of the model with its places."""
    size = constant_bytes(config, DTYPE) / 2**20
    lines = [f"kept keys: {told_places(config)}; the state takes {size:.2f} of {mib:.4g} MiB (float32 keys)"]
    for i in converted_layers(config):
        lines.append(f"  layer {i}: {' '.join(map(str, attention_config(config, i).kept_by_head))}")
    return lines
