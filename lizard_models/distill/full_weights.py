"""Fine-tuning of whole projections: a float32 change a weight, which can be switched off like an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightChange(nn.Module):
    """W -> W + D in W's dtype, D a float32 parameter from zero: a bfloat16 W alone would lose small updates."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.delta).to(weight.dtype) if self.enabled else weight


class FullWeights(nn.Module):
    """``model`` with a ``WeightChange`` on every projection of these names, used like peft's adapted model.

    The weights themselves stay as they are until ``merge_and_unload``, so the model without its changes is the teacher.
    """

    def __init__(self, model: Any, targets: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.changed = [m for name, m in model.named_modules() if name.rpartition(".")[2] in targets]
        for module in self.changed:
            parametrize.register_parametrization(module, "weight", WeightChange(module.weight), unsafe=True)

    def get_base_model(self) -> Any:
        """The model, changes included."""
        return self.model

    def changes(self) -> list[WeightChange]:
        """One a projection."""
        return [module.parametrizations.weight[0] for module in self.changed]  # type: ignore[union-attr,index]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within: the model without its changes."""
        for change in self.changes():
            change.enabled = False
        try:
            yield
        finally:
            for change in self.changes():
                change.enabled = True

    def unload(self) -> Any:
        """The model as it was, for good."""
        return self._remove(merged=False)

    def merge_and_unload(self) -> Any:
        """The model with its changes in its weights, an ordinary one."""
        return self._remove(merged=True)

    @torch.no_grad()
    def _remove(self, merged: bool) -> Any:
        for module, change in zip(self.changed, self.changes(), strict=True):
            weight = module.parametrizations.weight.original  # type: ignore[union-attr]
            if merged:
                weight.copy_(change(weight))
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        return self.model
