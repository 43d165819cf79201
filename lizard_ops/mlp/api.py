"""SiLU times product: the function that models call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.direct import Looking, who_looks
from lizard_ops.common.dispatch import choose_impl
from lizard_ops.common.kinds import Kinds

_accepted = Kinds()


def silu_product(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """The gated activation of SwiGLU, rounded as the families of Llama round it::

        y = silu(gate) up,   silu(x) = x / (1 + exp(-x))           silu rounded to the dtype first

    Args:
        gate: [..., F], float32 or half precision.
        up: like gate in shape and dtype; both may be halves of one tensor [..., 2 F].
        impl: "auto" (Triton on CUDA tensors where torch.compile does not trace, which fuses the formula; PyTorch
            elsewhere), "triton", "torch" or "naive" (which is "torch").

    Returns:
        y like gate. Triton's exponential may differ from PyTorch's in the last bit of float32; both gradients come
        from one kernel, rounded once. Triton has first derivatives alone.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an impl that cannot do what is asked.

    Source: SwiGLU (arXiv 2002.05202).
    """
    looking = who_looks(gate, up)
    traced = looking is Looking.MORE and torch.compiler.is_compiling()
    known = _accepted.check((gate, up), (), lambda: _check(gate, up), traced)
    if choose_impl("torch" if traced and impl == "auto" else impl, gate, None) == "triton":
        from lizard_ops.mlp.triton_op import silu_product_triton

        return silu_product_triton(gate, up, looking, known)
    return F.silu(gate) * up


def _check(gate: Tensor, up: Tensor) -> None:
    """Raises as ``silu_product``."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    fits = isinstance(gate, Tensor) and gate.ndim > 0 and gate.dtype in floats
    checks.want(fits, "gate", gate, "a tensor [..., F] of float32 or half precision")
    checks.check_tensor("up", up, gate.shape, gate, (gate.dtype,))
