"""Expansion of feature-map pre-activations, with the part that could overflow kept in log space."""

from __future__ import annotations

import torch
from torch import Tensor

FEATURE_MAPS = ("identity", "softmax", "exp")


def feature_dim(pre_dim: int, feature_map: str) -> int:
    """Features after expansion: twice the pre-activations for the two-sided maps."""
    return pre_dim if feature_map == "identity" else 2 * pre_dim


def expand_features(x: Tensor, feature_map: str) -> tuple[Tensor, Tensor | None]:
    """Return (features, log_offset) with phi(x) = features * exp(log_offset)[..., None].

    identity  phi(x) = x
    softmax   phi(x) = [softmax(x), softmax(-x)], each half over its own entries (Hedgehog, arXiv 2402.04347)
    exp       phi(x) = [exp(x), exp(-x)]; features are divided by their largest, whose log is log_offset

    x [..., F]; features [..., F] or [..., 2F], float32 at least; log_offset [...] or None when it is zero.
    """
    if feature_map == "identity":
        return x, None
    x = x if x.dtype == torch.float64 else x.float()
    if feature_map == "softmax":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1), None
    both = log_features(x, feature_map)
    top = both.detach().amax(-1, keepdim=True)
    return (both - top).exp(), top.squeeze(-1)


def log_features(x: Tensor, feature_map: str) -> Tensor:
    """log phi(x) of the maps "softmax" and "exp", [..., 2F] in the dtype of x."""
    both = (x, -x) if feature_map == "exp" else (x.log_softmax(-1), (-x).log_softmax(-1))
    return torch.cat(both, -1)
