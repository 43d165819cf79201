"""A CUDA graph's stand-in on a CPU: the operations of a step on the tensors they had, run again without its Python."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lizard_models.model.step_recorder import Uncapturable


class Tape(TorchDispatchMode):
    """Runs a step, writes down every operation, and undoes what it wrote, as if it had not run."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, writes = kwargs or {}, False
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = given[argument.name]
                writes = True
                self.before += [(t, t.clone()) for t in tree_leaves(value)]
        out = func(*args, **kwargs)
        places = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in places else None
                for t in tree_leaves(out)]  # fmt: skip
        if writes or any(t is not None for t in made):  # views are what they were
            self.calls.append((func, args, kwargs, made))
        return out

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before = []

    def run(self):
        for func, args, kwargs, made in self.calls:
            for t, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                if t is not None:
                    t.copy_(new)


class TapeRecorder:
    """Captures on tapes. ``replays`` and ``warm_ups`` count; ``why`` is what a warm-up finds wrong. looks: as the real
    one does, which finds what an implementation for CPUs reads too."""

    def __init__(self, why=None, looks=False):
        self.looks = looks
        self.why, self.tapes, self.replays, self.warm_ups = why, [], 0, 0

    def warm_up(self, step):
        self.warm_ups += 1
        with Uncapturable() if self.looks else nullcontext() as looking:
            out = step()
        return out, looking.found if self.looks else self.why

    def new_pool(self):
        return object()

    def capture(self, step, pool=None):
        with Tape() as tape:
            out = step()
        tape.undo()
        out.fill_(torch.nan)  # nothing has run
        self.tapes.append(tape)

        def replay():
            self.replays += 1
            tape.run()
            return out

        return replay
