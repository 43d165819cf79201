"""Feature maps: the learned projection before the activation, and the activation where the op has none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lizard_layers.config import AttentionConfig
from lizard_layers.parameters import Float32Module, float32_parameter, has_hooks
from lizard_ops import project_both, project_heads


class HedgehogFeatureMap(Float32Module):
    """Pre-activations x W of a Hedgehog feature map (arXiv 2402.04347), W starting from the identity.

    Columns beyond the head dim start as rotations of x, drawn from ``seed``: equal columns would get equal gradients
    and stay equal.

    ``num_maps`` is the number of matrices: 1 for a map shared by all heads, the number of heads for one each, or the
    number of key heads for query heads that share the map of their group.

    x [B, T, H, D], H a multiple of num_maps -> x itself, for what else reads it, and [B, T, H, feature_dim] in its
    dtype; weights and sums are float32's. reuse_gradient: see ``lizard_ops.project_heads``.
    """

    def __init__(self, num_maps: int, head_dim: int, feature_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.weight = float32_parameter(num_maps, head_dim, feature_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            dim, width = self.weight.shape[1:]
            self.weight.copy_(torch.eye(dim, width, dtype=self.weight.dtype, device=self.weight.device))
            draw = torch.Generator().manual_seed(self.seed)
            for start in range(dim, width, dim):
                turns = torch.linalg.qr(
                    torch.randn(len(self.weight), dim, dim, generator=draw, device="cpu", dtype=torch.float32)
                ).Q
                self.weight[:, :, start : start + dim] = turns[:, :, : width - start].to(self.weight)

    @torch.no_grad()
    def start_blind_to(self, biases: Tensor) -> None:
        """W <- (I - P) W, P the projection on the span of each map's ``biases`` [num_maps, n, D], in float64.

        So (x + b) W = x (I - P) W: a vector b that is in every x, however long, moves no activation, and does not
        saturate it. Biases that are zero or not finite are passed over, and a map without others keeps its bits. So
        does one whose biases span more than half of the D dimensions: it would be blind to most of x too.
        """
        for i, rows in enumerate(biases.double().cpu()):
            lengths = rows.norm(dim=-1)
            rows = rows[(lengths > 0) & lengths.isfinite()]
            if not len(rows):
                continue
            _, sizes, basis = torch.linalg.svd(rows / rows.norm(dim=-1, keepdim=True), full_matrices=False)
            basis = basis[sizes > 1e-6 * sizes[0]]
            if 2 * len(basis) <= rows.shape[-1]:
                start = self.weight[i].double().cpu()
                self.weight[i] = (start - basis.T @ (basis @ start)).to(self.weight)

    def forward(self, x: Tensor, reuse_gradient: bool = False) -> tuple[Tensor, Tensor]:
        return project_heads(x, self.weight, reuse_gradient=reuse_gradient)


class FeatureMaps(nn.Module):
    """The maps of queries and keys of one layer, as ``AttentionConfig`` has them.

    ``op_feature_map`` is what the op has to do with the result: finish the activation of pre-activations ("softmax",
    "exp") or take it as it is ("identity").
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.one_sided = config.feature_activation == "one_sided_softmax"
        self.op_feature_map = config.feature_activation if config.two_sided else "identity"
        self.query_map: HedgehogFeatureMap | None = None
        self.key_map: HedgehogFeatureMap | None = None
        if config.feature_projection == "none":
            return
        shared = config.feature_projection == "shared"
        key_maps = 1 if shared else config.linear_key_heads
        shape = (config.head_dim, config.projection_dim)
        self.key_map = HedgehogFeatureMap(key_maps, *shape)
        if not config.tie_features:
            self.query_map = HedgehogFeatureMap(1 if shared else config.num_heads, *shape, seed=1)

    def forward(self, q: Tensor, k: Tensor, reuse_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, fq, fk): q [B, T, Hq, D] and k [B, T, H, D], H the linear key heads, as they came, for the window.

        fq [B, T, Hq, Fp], fk [B, T, H, Fp]. reuse_gradient: see ``lizard_ops.project_heads``.
        """
        fq, fk, weights = q, k, self.weights()
        if weights is not None:
            q, k, fq, fk = project_both(q, k, *weights, reuse_gradient=reuse_gradient)
        elif self.key_map is not None:
            (q, fq), (k, fk) = (self.query_map or self.key_map)(q, reuse_gradient), self.key_map(k, reuse_gradient)
        return (q, k, fq.softmax(-1), fk.softmax(-1)) if self.one_sided else (q, k, fq, fk)

    def start_blind_to(self, q_bias: Tensor | None, k_bias: Tensor | None) -> None:
        """Starts each map blind to the biases of the heads that it reads (``HedgehogFeatureMap.start_blind_to``).

        q_bias [Hq, D], k_bias [Hk, D]: what is added to every token's queries and keys; None where nothing is. A map
        of several heads, shared or tied, is started blind to all of theirs, or as ever where these are too many.
        """
        if self.key_map is None:
            return
        read = [(self.query_map or self.key_map, q_bias), (self.key_map, k_bias)]
        for made in dict.fromkeys(of for of, _ in read):
            maps = len(made.weight)
            groups = [
                bias.repeat_interleave(max(1, maps // len(bias)), 0).unflatten(0, (maps, -1))
                for of, bias in read
                if of is made and bias is not None
            ]
            if groups:
                made.start_blind_to(torch.cat(groups, 1))

    def weights(self) -> tuple[Tensor, Tensor] | None:
        """Those of queries and of keys; None where there are none, or somebody sees what the maps are called with."""
        parts = self._modules  # a Module's own look-up of an attribute is a function of Python
        of_k = parts.get("key_map")
        of_q = parts.get("query_map") or of_k
        if of_q is None or of_k is None or has_hooks(of_q) or has_hooks(of_k):
            return None
        weight_q, weight_k = of_q._parameters["weight"], of_k._parameters["weight"]
        return None if weight_q is None or weight_k is None else (weight_q, weight_k)
