"""What a decoder tells its attention layers about one forward, in one object."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lizard_models.model.packing import Packing
from lizard_models.model.positions import MovedAnchors


class ForwardPlan(NamedTuple):
    """Rides through transformers' layers as the keyword argument ``plan``. B batch, T new positions.

    A tuple, so that hooks which move a layer's inputs (accelerate, FSDP) take it apart and put it together again.
    """

    padding_mask: Tensor | None = None
    """[B, T] bool, True at real tokens; None where all are real."""

    packing: Packing | None = None
    """Where packed sequences begin, None where every row is one."""

    anchor_blocks: MovedAnchors | None = None
    """How far the anchors have moved on, by layer type; None where they have not."""

    with_gradients: bool = False
    """In mode "distill": whether the layers' losses get gradients. The forward around them runs without."""

    without_mask: bool = False
    """The attention mask is a placeholder that no layer reads: every row is full and plainly causal."""

    context_group: Any = None
    """A process group or mesh over whose ranks every row lies in parts; None where the rows are whole."""
