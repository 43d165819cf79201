"""The families' norms in one kernel where a student reads or trains, with the residual sum before them; their own
formulas everywhere else."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lizard_models.model.hooks import is_bare, is_hooked
from lizard_ops import add_rms_norm, rms_norm

UNIT_OFFSET = {
    "LlamaRMSNorm": False, "MistralRMSNorm": False, "Qwen2RMSNorm": False, "Qwen3RMSNorm": False,
    "SmolLM3RMSNorm": False, "Gemma2RMSNorm": True, "Gemma3RMSNorm": True,
}  # fmt: skip
TWO_SUMS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer")
_fused: contextvars.ContextVar[FusedNorms | None] = contextvars.ContextVar("lizard_fused_norms", default=None)


class FusedNorms:
    """The norms of one forward, some of which are computed with the residual sum that they read.

    readers: the norm that reads the output of a layer, by the layer's id. steps: who may have a layer's token on a CPU.
    """

    def __init__(self, readers: dict[int, nn.Module | None], steps: Any = None) -> None:
        self.readers, self.steps = readers, steps
        self.ready: tuple[nn.Module, Tensor, int, Tensor] | None = None  # norm, sum, its version, the norm of it

    def of(self, norm: Any, x: Tensor) -> Tensor:
        """What this norm makes of x, without the way through a module where nobody stands on it."""
        if not isinstance(norm, KernelNorm) or not is_bare(norm) or not norm.takes(x):  # type: ignore[arg-type]
            return norm(x)
        return norm.kernel(self, x)

    def sum(self, residual: Tensor, x: Tensor, norm: nn.Module | None) -> Tensor:
        """residual + x. ``norm`` finds its own of it ready where it is called with the sum as it is now."""
        if not isinstance(norm, KernelNorm) or is_hooked(norm) or residual.dtype != x.dtype or not norm.takes(x):
            return residual + x
        weight = norm._parameters["weight"]
        s, y = add_rms_norm(x, residual, weight, norm_eps(norm), unit_offset=norm.unit_offset)
        self.ready = norm, s, version(s), y
        return s

    def take(self, norm: nn.Module, x: Tensor) -> Tensor | None:
        """The norm of x, if ``sum`` has left it."""
        ready, self.ready = self.ready, None
        if ready is None or ready[0] is not norm or ready[1] is not x or ready[2] != version(x):
            return None
        return ready[3]


def version(x: Tensor) -> int:
    """How often x was written to; not counted in inference mode."""
    return 0 if x.is_inference() else x._version


@contextlib.contextmanager
def fused_norms(layers: Iterable[nn.Module], last: nn.Module | None, steps: Any = None) -> Iterator[None]:
    """Within: norms that are ``with_kernel`` take it on CUDA tensors, with the sums before them in layers that are
    ``with_sums``. last: the norm behind the layers. steps: the ``TokenSteps`` of a single token on a CPU. Not for what
    torch.compile traces."""
    layers, readers = list(layers), {}
    for layer, reader in zip(layers, [*layers[1:], None], strict=True):
        if not is_hooked(layer) and not (reader is not None and is_hooked(reader)):
            readers[id(layer)] = last if reader is None else getattr(reader, "input_layernorm", None)
    token = _fused.set(FusedNorms(readers, steps))
    try:
        yield
    finally:
        _fused.reset(token)


def running_norms(x: Tensor) -> FusedNorms | None:
    """Those of the forward that runs in this thread; None where x is not to meet a kernel."""
    return None if torch.compiler.is_compiling() or not (on_gpu(x) or is_one_token(x)) else _fused.get()


def is_one_token(x: Tensor) -> bool:
    """Whether x is a token of one text on a CPU, where an operator fewer counts as a launch does."""
    return x.device.type == "cpu" and x.numel() == x.shape[-1]


def on_gpu(x: Tensor) -> bool:
    """Where there are kernels."""
    return x.is_cuda


def norm_eps(norm: Any) -> float:
    """What a family's norm adds to the mean square. A property of it would keep others from setting its name."""
    eps = getattr(norm, "variance_epsilon", None)
    return norm.eps if eps is None else eps


class KernelNorm:
    """Mixed into a family's norm by ``with_kernel``."""

    unit_offset: bool  # whether the weight is what is beyond 1
    _parameters: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        """As the family's, within ``fused_norms`` in one kernel."""
        fused = running_norms(x)
        if fused is None or not self.takes(x):
            return super().forward(x)  # type: ignore[misc]
        return self.kernel(fused, x)

    def kernel(self, fused: FusedNorms, x: Tensor) -> Tensor:
        """The norm of x, ready or computed."""
        this: Any = self
        ready = fused.take(this, x)
        weight = self._parameters["weight"]
        return rms_norm(x, weight, norm_eps(this), unit_offset=self.unit_offset) if ready is None else ready

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel has this norm of x."""
        weight = self._parameters.get("weight")  # None where it was flattened with others
        return weight is not None and x.dtype != torch.float64 and (self.unit_offset or weight.dtype == x.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the class is made at run time, so a copy is made from the family's."""
        return blank, (KernelNorm, type(self).__mro__[2]), self.__dict__


class SummingLayer:
    """Mixed into a family's decoder layer by ``with_sums``."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the family's, within ``fused_norms`` with each residual sum and the norm of it in one kernel."""
        layer: Any = self
        fused, alone = None if args else running_norms(hidden_states), None
        if fused is None and not args and reads_alone(layer, hidden_states):
            fused = FusedNorms({})
            alone = _fused.set(fused)  # as ``fused_norms``, of a layer whose output no norm reads
        if fused is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        try:
            if fused.steps is not None and (y := fused.steps.step(fused, layer, hidden_states, kwargs)) is not None:
                return y
            parts = layer._modules  # a Module's own look-up of an attribute is a function of Python
            first, second = parts["input_layernorm"], parts["post_attention_layernorm"]
            o, _ = parts["self_attn"](hidden_states=fused.of(first, hidden_states), **kwargs)
            x = fused.sum(hidden_states, o, second)
            o = parts["mlp"](fused.of(second, x))
            return fused.sum(x, o, fused.readers.get(id(self)))
        finally:
            if alone is not None:
                _fused.reset(alone)

    def __reduce__(self) -> tuple[Any, ...]:
        """As ``KernelNorm``."""
        return blank, (SummingLayer, type(self).__mro__[2]), self.__dict__


def reads_alone(layer: Any, x: Tensor) -> bool:
    """Whether a student's layer is called without its decoder, which would say that kernels may be taken; also where
    layers are run again in the backward, both times."""
    if torch.compiler.is_compiling() or not on_gpu(x):
        return False
    return getattr(layer.self_attn, "mode", None) == "student"


@functools.cache
def _mixed(kind: type, family: Any) -> type:
    own = {"unit_offset": UNIT_OFFSET[family.__name__]} if kind is KernelNorm else {}
    return type(family.__name__, (kind, family), own)


def blank(kind: type, family: Any) -> Any:
    """A module of the family's class with ``kind`` mixed in, without its attributes."""
    twin: Any = _mixed(kind, family)
    return twin.__new__(twin)


def twin(module: nn.Module, kind: type) -> Any:
    """A module with ``kind`` mixed in and the same parameters and parts. Its class keeps its name; the module itself
    stays what it was."""
    made = blank(kind, type(module))
    made.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters), "_modules": dict(module._modules)}
    return made


def with_kernel(module: nn.Module) -> nn.Module:
    """A twin of a family's norm that can take the kernel; other modules as they are. A teacher may go on with it."""
    family: Any = type(module)
    if family.__name__ not in UNIT_OFFSET or not family.__module__.startswith("transformers."):
        return module
    return twin(module, KernelNorm)


def with_sums(layer: nn.Module) -> nn.Module:
    """A twin of a decoder layer of two residual sums that can take each with the norm behind it; others as they are."""
    family: Any = type(layer)
    if family.__name__ not in TWO_SUMS or not family.__module__.startswith("transformers."):
        return layer
    return twin(layer, SummingLayer)
