"""How fast a stage runs and what it holds: tokens a second, model-flops use, memory."""

from __future__ import annotations

import re
import time
from typing import Any

import psutil
import torch

from lizard_models.distill.parallel import process_count

MEASURED = ("tokens_per_second", "model_flops_use", "resident_bytes", "cuda_bytes")

PEAKS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
}
"""TFLOP/s of the tensor cores in bfloat16 without sparsity, from the makers' data sheets; the first name that is a word
of the device's counts. Devices share them whatever their power limit is."""


def known_peak(device_name: str) -> float | None:
    """TFLOP/s of a device in bfloat16, None for one that ``PEAKS`` does not name."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """TFLOP/s that a run on ``device`` with weights of ``dtype`` is held against, None if nobody knows."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return known_peak(torch.cuda.get_device_name(device))


class Speed:
    """Reads a clock and the memory between two entries of the log.

    tokens: of a step, over all processes. flop_per_token: of a step (``model.arithmetic``), without what checkpointing
    does again. peak_tflops: of one device. Without either of these there is no model-flops use.
    """

    def __init__(self, tokens: int, flop_per_token: float | None = None, peak_tflops: float | None = None) -> None:
        self.tokens, self.flop_per_token, self.peak_tflops = tokens, flop_per_token, peak_tflops
        self.start(0)

    def start(self, step: int) -> None:
        """From here on, at ``step``, the clock runs."""
        self.last, self.step = time.monotonic(), step

    def read(self, step: int, device: torch.device) -> dict[str, Any]:
        """Since the last reading::

        tokens_per_second   of all processes, saving and measuring included
        model_flops_use     tokens_per_second flop_per_token / (devices peak_tflops 1e12)
        resident_bytes      of this process
        cuda_bytes          the most that was allocated on its GPU, if it has one
        """
        speed = self.tokens * (step - self.step) / max(time.monotonic() - self.last, 1e-9)
        self.start(step)
        values: dict[str, Any] = {"tokens_per_second": speed}
        if self.flop_per_token and self.peak_tflops:
            values["model_flops_use"] = speed * self.flop_per_token / (process_count() * self.peak_tflops * 1e12)
        values["resident_bytes"] = psutil.Process().memory_info().rss
        if device.type == "cuda":
            values["cuda_bytes"] = torch.cuda.max_memory_allocated(device)
        return values
