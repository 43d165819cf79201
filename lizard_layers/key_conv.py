"""A short convolution over the keys of the linear branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.config import AttentionConfig
from lizard_layers.parameters import Float32Module, float32_parameter, full_precision
from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.streams import layout_of, take_rows


class KeyConv(Float32Module):
    """k'_j = sum_{0 <= l < width} weight_l * k_{j - l}, channel by channel, over earlier keys of the same sequence.

    k [B, T, Hk, D] -> k' of its shape and dtype, summed in float32. weight [Hk D, width] holds the taps oldest first;
    it starts as the identity, the key's own tap 1 and the others 0. So features can say what stood before a key, which
    recall of what followed a name asks for (H3, arXiv 2212.14052; Gated DeltaNet, arXiv 2412.06464).
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.weight = float32_parameter(config.num_key_heads * config.head_dim, config.key_conv)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()[:, -1] = 1.0

    def forward(
        self,
        k: Tensor,
        past: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(k', the last width - 1 keys [N, width - 1, Hk, D], oldest first, zero before the first).

        past: what an earlier call returned second. padding_mask [B, T]: padding is no key. cu_seqlens [N + 1] packs
        sequences into one row. Raises ValueError for packed rows with a past.
        """
        if padding_mask is not None:
            plan = compaction(padding_mask)
            packed = compact(k, plan)
            assert packed is not None
            o, last = self._convolved(packed, past, plan.lengths)
            return restore(o, plan), last
        if cu_seqlens is None:
            return self._convolved(k, past, None)
        if past is not None:
            raise ValueError("cu_seqlens: got packed rows with a carried state, wanted either alone with key_conv")
        layout, back = layout_of(k, None, cu_seqlens), self.weight.shape[1] - 1
        at = torch.arange(k.shape[1], device=k.device)
        since = at - cu_seqlens[torch.searchsorted(cu_seqlens, at, right=True) - 1]  # place within its sequence
        stream = F.pad(k, (0, 0, 0, 0, back, 0))
        o = self._taps(stream, k.shape[1], since)
        index = layout.length.unsqueeze(1) - back + torch.arange(back, device=k.device)
        return o.to(k.dtype), take_rows(k, layout, index)[0]

    def _convolved(self, k: Tensor, past: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        back = self.weight.shape[1] - 1
        stream = F.pad(k, (0, 0, 0, 0, back, 0)) if past is None else torch.cat([past.to(k.dtype), k], 1)
        o = self._taps(stream, k.shape[1], None).to(k.dtype)
        if lengths is None:
            return o, stream[:, k.shape[1] :]
        at = lengths.unsqueeze(1) + torch.arange(back, device=k.device)
        return o, stream.gather(1, at[:, :, None, None].expand(-1, -1, *k.shape[2:]))

    def _taps(self, stream: Tensor, length: int, since: Tensor | None) -> Tensor:
        taps = self.weight.T.unflatten(1, stream.shape[2:])  # [width, Hk, D], oldest first
        back = taps.shape[0] - 1
        stream = full_precision(stream)
        o = stream[:, back : back + length] * taps[back]
        for lag in range(1, back + 1):
            row = stream[:, back - lag : back - lag + length]
            if since is not None:
                row = row.masked_fill((since < lag)[:, None, None], 0.0)
            o = o + row * taps[back - lag]
        return o
