"""A token of one text through a decoder layer on a CPU, straight: products, norms and the attention's step without the
way through modules, which in a small model takes as long as the products do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizard_layers import text_step_of
from lizard_models.model.attention import LizardAttention
from lizard_models.model.cache import LizardCache
from lizard_models.model.forward_plan import ForwardPlan
from lizard_models.model.fused_mlp import SILU, FusedMLP
from lizard_models.model.hooks import is_bare
from lizard_models.model.joined import adjacent
from lizard_models.model.norms import FusedNorms, KernelNorm, norm_eps
from lizard_models.model.row_product import row_product
from lizard_ops import TextStep, nobody_looks, rms_norm_row, turn_matrix

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
VALUES: Any = dict.values
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TokenSteps:
    """The layers' steps of one forward, for ``fused_norms``."""

    def __init__(self) -> None:
        self.asked = False
        self.cache: LizardCache | None = None
        self.turn: Tensor | None = None  # of the token's position; None where layers go their usual way

    def step(self, fused: FusedNorms, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What ``layer`` makes of x [1, 1, hidden], its state overwritten; None where it goes its usual way."""
        if not self.asked:
            self.asked = True
            self._ask(layer, x, kwargs)
        if self.turn is None or type(x) is not Tensor or x.dtype != torch.float32:
            return None
        held = layer.__dict__.get("token_step")
        if held is None or not held.holds():
            held = layer.__dict__["token_step"] = LayerStep(layer)
        return held.step(fused, x, self.cache, self.turn)

    def _ask(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Whether this forward is a plain step, which its layers see alike."""
        plan, cache, rope = (kwargs.get(name) for name in ("plan", "past_key_values", "position_embeddings"))
        if not isinstance(plan, ForwardPlan) or any(part is not None for part in plan[:3]) or plan.context_group:
            return
        if torch.is_grad_enabled() or not nobody_looks(x) or torch.is_autocast_enabled("cpu"):
            return
        if not is_bare(layer._modules["mlp"]):  # type: ignore[arg-type]  # nor is any where all modules have hooks
            return
        if isinstance(cache, LizardCache) and isinstance(rope, tuple) and rope[0].dtype == torch.float32:
            self.cache, self.turn = cache, turn_matrix(rope[0].view(-1), rope[1].view(-1))


class Parts(NamedTuple):
    """What a layer's step computes with."""

    norms: tuple[Any, Any]
    of_heads: Product
    attention: TextStep
    out: Product
    of_mlp: Product
    down: Product
    layer: int
    sizes: tuple[tuple[int, int], tuple[int, int]]  # of queries and keys together, and of values: heads, dim


class LayerStep:
    """What a layer's step computes with, found once, and what tells whether it still is what the layer has; copies and
    pickles begin without."""

    def __init__(self, layer: nn.Module) -> None:
        modules = list(layer.modules())
        inner = modules[1:]  # hooks of the layer itself stand around its forward
        self.tables: list[dict[str, Any]] = [table for m in modules for table in (m._modules, m._parameters)]
        self.held = [x for table in self.tables for x in table.values()]  # so that nothing else can have their ids
        self.ids = list(map(id, self.held))
        self.parameters = list(layer.parameters())
        self.places = list(map(Tensor.data_ptr, self.parameters))
        self.hooks = tuple(getattr(m, name) for m in inner for name in HOOKS)
        self.own = [vars(m) for m in inner]
        self.sizes = list(map(len, self.own))
        self.mode = vars(layer._modules["self_attn"])
        self.parts = parts_of(layer) if all(is_bare(m) for m in inner) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def holds(self) -> bool:
        """Whether modules, parameters and their places are those that were found, and nobody has come to look."""
        if any(self.hooks) or list(map(len, self.own)) != self.sizes:
            return False
        if list(map(id, chain.from_iterable(map(VALUES, self.tables)))) != self.ids:
            return False
        return list(map(Tensor.data_ptr, self.parameters)) == self.places

    def step(self, fused: FusedNorms, x: Tensor, cache: Any, turn: Tensor) -> Tensor | None:
        """As ``TokenSteps.step``."""
        if self.parts is None or self.mode["mode"] != "student":
            return None
        norms, of_heads, attention, out, of_mlp, down, index, (heads, values) = self.parts
        state = cache.layers[index].to_overwrite()
        text = None if state is None else attention.text(state)
        if text is None:
            return None
        first, second = norms
        y, row = fused.take(first, x), x.view(-1)
        y = rms_norm_row(row, first.weight, norm_eps(first)) if y is None else y.view(-1)
        qkv = of_heads(y)
        v = qkv.as_strided(values, (values[1], 1), heads[0] * heads[1])
        o = attention(text, y, qkv.as_strided(heads, (heads[1], 1)), v, turn)
        s = out(o.view(-1), row)
        gate, up = of_mlp(rms_norm_row(s, second.weight, norm_eps(second))).view(2, -1).unbind()
        return down(F.silu(gate).mul_(up), s).view(1, 1, -1)


def parts_of(layer: Any) -> Parts | None:
    """Those of a layer whose modules are bare; None where one of them is another than a step computes."""
    norm, attn, second, mlp = (layer._modules.get(name) for name in PARTS)
    if not isinstance(attn, LizardAttention) or type(attn).heads is not LizardAttention.heads or not attn.use_rope:
        return None
    if not isinstance(mlp, FusedMLP) or type(mlp._modules["act_fn"]).__name__ not in SILU:  # type: ignore[attr-defined]
        return None
    if not all(isinstance(n, KernelNorm) and not n.unit_offset for n in (norm, second)):
        return None
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in layer.parameters()):
        return None
    groups: list[list[Any]] = [[part._modules[name] for name in part.joins] for part in (layer.self_attn, layer.mlp)]
    groups += [[attn.o_proj], [layer.mlp.down_proj]]
    found = [Product.of(group) for group in groups]
    attention, dim = text_step_of(attn.lizard), attn.head_dim
    of_heads, of_mlp, out, down = found
    if attention is None or of_heads is None or of_mlp is None or out is None or down is None:
        return None
    q, k, v = (len(module.weight) // dim for module in groups[0])
    sizes = (q + k, dim), (v, dim)
    return Parts((norm, second), of_heads, attention, out, of_mlp, down, attn.layer_idx, sizes)


def _nothing() -> None:
    """What copies and pickles of a ``LayerStep`` are."""


class Product:
    """The product of rows with the weights of Linear modules that lie side by side."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Product | None:
        """That of these modules; None where it cannot be one."""
        if any(type(m) is not nn.Linear for m in modules):
            return None
        weights, biases = ([m._parameters[name] for m in modules] for name in ("weight", "bias"))
        with_bias = biases[0] is not None
        if any((b is not None) != with_bias for b in biases) or any(w is None for w in weights):
            return None
        weight, bias = adjacent(weights), adjacent(biases) if with_bias else None
        return None if weight is None or (bias is None) == with_bias else cls(weight, bias)

    def __call__(self, row: Tensor, residual: Tensor | None = None) -> Tensor:
        """weight row [D], with the bias and ``residual`` [rows] if there are."""
        added = residual if self.bias is None else self.bias if residual is None else self.bias + residual
        return row_product(self.weight, row, added)
