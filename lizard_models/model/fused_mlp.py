"""The families' MLPs with one kernel between their projections where a student reads or trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lizard_models.model.hooks import is_hooked, linear
from lizard_models.model.joined import products
from lizard_models.model.norms import blank, running_norms, twin
from lizard_ops import silu_product

SWIGLU = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
SILU = ("SiLUActivation", "SiLU")  # of transformers' activations


class FusedMLP:
    """Mixed into a family's MLP by ``with_product``."""

    joins = ("gate_proj", "up_proj")

    def forward(self, x: Tensor) -> Tensor:
        """As the family's, within ``fused_norms`` with SiLU and product in one kernel."""
        this: Any = self
        parts, fused = this._modules, running_norms(x)
        act = parts["act_fn"]
        if fused is None or type(act).__name__ not in SILU or is_hooked(act):
            return super().forward(x)  # type: ignore[misc]
        gate, up = products(this, x, fused)
        if gate.dtype == torch.float64 or up.dtype != gate.dtype:
            return linear(parts["down_proj"], act(gate) * up)
        return linear(parts["down_proj"], silu_product(gate, up))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the class is made at run time, so a copy is made from the family's."""
        return blank, (FusedMLP, type(self).__mro__[2]), self.__dict__


def with_product(mlp: nn.Module) -> nn.Module:
    """A twin of a family's MLP that can take the kernel, with the same projections; other modules as they are."""
    family: Any = type(mlp)
    if family.__name__ not in SWIGLU or not family.__module__.startswith("transformers."):
        return mlp
    return twin(mlp, FusedMLP)
