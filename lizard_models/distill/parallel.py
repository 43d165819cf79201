"""Several processes, started by torchrun or accelerate: who speaks, what is sharded, how whole tensors come back."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

BEHIND = 3.0  # seconds that processes which end alike may be apart


def process_count() -> int:
    """Processes of this run, by the launcher's environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: str) -> str:
    """Joins the other processes, if there are any, and gives the device of this one: "cpu", "cuda" or "cuda:1".

    Raises ValueError if the launcher asks for what the recipe decides: mixed precision, or accelerate's own FSDP.
    """
    if process_count() == 1:
        return device
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError(
            f"the launcher asks for mixed precision {os.environ['ACCELERATE_MIXED_PRECISION']}, which would round the "
            "new parameters: launch with --mixed_precision no, and choose the teacher's dtype"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("the launcher asks for FSDP with settings of its own: launch without it, and give fsdp=True")
    return str(PartialState(cpu=device == "cpu").device)


def first_to_say(line: str, signal: bool = False) -> bool:
    """Whether this process is to say why it ends: the main one, or another if nobody has said the same.

    signal: it ends by a signal, which is what launchers do to all when one has ended, and then it says nothing.

    It asks no process to come anywhere, since the others may be in the middle of a step: they meet at the launcher's
    store, or the main process's, which waits a moment for them. Where there is none, everybody speaks.
    """
    if process_count() == 1:
        return True
    start = f"lizard_attn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    key = f"{start}/{hashlib.sha256(line.encode()).hexdigest()}"
    try:
        store = _store()
        store.set_timeout(timedelta(seconds=BEHIND))
        if signal and store.add(start, 0):
            return False
        store.add(start, 1)
        ends = time.monotonic() + (0 if is_main_process() else BEHIND)
        while store.add(key, 0) == 0 and time.monotonic() < ends:
            time.sleep(0.05)  # the main process often ends alike, and its word is enough
        first = store.add(key, 1) == 1
        store.set(f"{key}/{os.environ['RANK']}", "1")
        if is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            with contextlib.suppress(RuntimeError):  # it goes with this process
                others = [f"{key}/{rank}" for rank in range(1, process_count())]
                store.wait(others, timedelta(seconds=BEHIND))
    except (RuntimeError, ValueError, OSError, KeyError):
        return True
    return first


def _store() -> Any:
    """Where processes leave words for each other, whether they have joined or not."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ends = time.monotonic() + BEHIND
    while not serves:  # whether anybody is there; torch would print pages where nobody is
        try:
            socket.create_connection((host, port), timeout=BEHIND).close()
            break
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)
    return dist.TCPStore(host, port, is_master=serves, timeout=timedelta(seconds=BEHIND), wait_for_workers=False)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        PartialState().wait_for_everyone()


def leave() -> None:
    """Takes leave of the other processes, at the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether any process says yes; every process must ask."""
    if process_count() == 1:
        return flag
    asked = torch.tensor(float(flag), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked.item())


def agreed(value: Any) -> Any:
    """The main process's value, in every process."""
    if process_count() == 1:
        return value
    values = [value]
    PartialState()  # joins the others, where nothing did before
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agreed_names(names: list[str]) -> list[str]:
    """The names that any process gives, in every process; every process must ask."""
    if process_count() == 1:
        return names
    given: list[Any] = [None] * process_count()
    dist.all_gather_object(given, names)
    return list(dict.fromkeys(name for some in given for name in some))


def sharded(objective: nn.Module, device: str) -> nn.Module:
    """A copy of a training objective whose parameters are spread over all processes (FSDP-2); the original is whole.

    Each decoder layer is gathered for its own forward and backward. Dtypes stay as they are: new parameters and
    adapters float32 beside bfloat16 weights. Gradients are averaged over processes.
    """
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in objective.parameters()
    }
    copied = copy.deepcopy(objective, shared)
    mesh = init_device_mesh(torch.device(device).type, (process_count(),))
    layers = {name for m in copied.modules() if isinstance(m, PreTrainedModel) for name in m._no_split_modules or ()}
    for module in list(copied.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(copied, mesh=mesh)
    return copied


def context_group(ranks: int, device: str) -> Any:
    """The mesh of one dimension over which this process's sequences lie: neighbours, ``ranks`` of them."""
    mesh = init_device_mesh(
        torch.device(device).type, (process_count() // ranks, ranks), mesh_dim_names=("data", "context")
    )
    return mesh["context"]


def share_batches(accelerator: Any, ranks: int) -> None:
    """Lets processes that hold parts of the same sequences read the same batches: every ``ranks`` neighbours."""

    def prepared(loader: DataLoader, device_placement: bool | None = None, **_: Any) -> DataLoader:
        made = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=process_count() // ranks,
            process_index=accelerator.process_index // ranks,
            put_on_device=True,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,  # the main process does not read for all
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )
        accelerator._dataloaders.append(made)
        return made

    accelerator.prepare_data_loader = prepared


class Prepared(nn.Module):
    """Around a sharded objective, so that Trainer sees a model that is wrapped already and adds nothing to it."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.module = objective

    def forward(self, **inputs: Tensor) -> Any:
        """As the objective."""
        return self.module(**inputs)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or state without its shards; every process must ask, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or state."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, the same in every process, sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """``optimizer.state_dict()`` without shards: the same whatever number of processes wrote it."""
    saved = optimizer.state_dict()
    state = {
        index: {name: whole(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        for index, values in saved["state"].items()
    }
    return {**saved, "state": state}


def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """The inverse of ``whole_optimizer_state``, for an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: like(v, parameters[index]) if isinstance(v, Tensor) and v.shape == parameters[index].shape else v
            for name, v in values.items()
        }
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def copy_trained(source: nn.Module, target: nn.Module) -> None:
    """Writes the parameters that train from a sharded copy into the whole original, in every process."""
    originals = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in trained(source):
            originals[name].copy_(whole(parameter))


def trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and values of the parameters that train."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
