"""transformers' tensor parallelism for a Lizard: the family's plan, and heads of the hybrid attention split with it.

    torchrun --nproc-per-node 2 ask.py   # model = load(..., distributed_config=DistributedConfig(tp_size=2))

Each rank has its own heads of every layer, with their states; their outputs meet in the output projection, as the
family's do. Inference alone. transformers' releases before the one with styles of parameters (5.23) are refused.
"""

from __future__ import annotations

from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from lizard_layers import HybridAttention, config_of_rank, sizes_of_rank
from lizard_models.model.families.configs import CONFIGS

try:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    SUPPORTED = hasattr(TensorParallelLayer, "shard_param")
except ImportError:  # another release
    TensorParallelLayer: Any = object  # type: ignore[no-redef]
    SUPPORTED = False

STYLE = "lizard_heads"
HEAD_PLAN = {"lm_head": "colwise_gather_output"} if SUPPORTED else None


class HeadsOfRank(TensorParallelLayer):
    """A hybrid attention of which each rank has some heads: parameters with an axis of heads are cut in it."""

    def install_forward(self, module: HybridAttention, mesh: Any) -> HybridAttention:
        """Cut the parameters, which are to be loaded yet, and exchange the forward."""
        rank, size = mesh.get_local_rank(), mesh.size()
        whole = module.config
        config, sizes = config_of_rank(whole, rank, size), sizes_of_rank(whole, rank, size)
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            placement = Replicate() if parameter.shape == sizes[name] else Shard(0)
            cut = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
            setattr(module.get_submodule(owner), last, nn.Parameter(cut, requires_grad=parameter.requires_grad))
        module.forward = OfRank(module, config)  # type: ignore[method-assign]
        return module


class OfRank:
    """The forward of a cut layer: that of a layer of the rank's heads, with the parameters that the rank holds."""

    def __init__(self, module: HybridAttention, config: Any) -> None:
        self.module, self.config = module, config
        self.layer: HybridAttention | None = None
        self.held: list[nn.Parameter] = []

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.module.parameters())):
            raise ValueError("a Lizard model split by tensor parallelism is for inference: use torch.no_grad()")
        held = list(self.module.parameters())
        if self.layer is None or len(held) != len(self.held) or any(map(is_not, held, self.held)):
            with torch.device("meta"):
                layer = HybridAttention(self.config)
            cut: Any = self.module.named_parameters()
            parts = {name: parameter.data.to_local() for name, parameter in cut}
            layer.load_state_dict(parts, assign=True)
            self.layer, self.held = layer.requires_grad_(False).train(self.module.training), held
        return self.layer(x, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> OfRank:
        raise ValueError("a Lizard model split by tensor parallelism cannot be copied: load it again")


def refuse_split(model: Any, what: str) -> None:
    """Raises ValueError where each of several ranks has some of the heads, and a state is but a part of one."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"{what}: not with a model split by tensor parallelism, whose ranks have a part of a state each"
        )


def register() -> None:
    """Give the families' configurations their plans, once, before a model is made."""
    if not SUPPORTED:
        return
    style: Any = HeadsOfRank()
    ALL_PARALLEL_STYLES.register(STYLE, style)
    for config in CONFIGS:
        plans = (vars(base).get("base_model_tp_plan") for base in config.__mro__[1:])
        if plan := next(filter(None, plans), None):
            config.base_model_tp_plan = {**plan, "layers.*.self_attn.lizard": STYLE}


register()
