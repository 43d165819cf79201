"""What must hold of a finished model before it is saved."""

from __future__ import annotations

from typing import Any

import torch

from lizard_models.files.weights import name_some, nonfinite

PROBED = 64  # tokens of the text on which a finished model must be finite
SMALLER = "train again with a smaller learning rate, or in float32"


@torch.no_grad()
def refuse_broken(model: Any, device: str, home: str) -> None:
    """Raises FloatingPointError for a model with weights, or logits of a short text, that are not finite.

    device: where the text is read; home: where the model is left.
    """
    if names := nonfinite(dict(model.state_dict())):
        raise FloatingPointError(f"the trained model is not saved: not finite in {name_some(names)}; {SMALLER}")
    ids = torch.arange(min(model.config.vocab_size, PROBED), device=device)[None]
    logits = model.to(device)(input_ids=ids, use_cache=False).logits
    model.to(home)
    if not logits.isfinite().all():
        raise FloatingPointError(f"the trained model is not saved: its logits are not finite; {SMALLER}")
