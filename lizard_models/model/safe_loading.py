"""``from_pretrained`` of the Lizard families: safetensors only, strict keys, no code from the checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lizard_layers import KeyScore
from lizard_models.files.weights import name_some, nonfinite, read_shards, refuse_pickled_adapter

MOST_LAYERS = 10_000  # of a configuration that is believed
PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
OLD_BUFFERS = "rotary_emb.inv_freq"  # in checkpoints of older transformers, and ignored by the present one


class SafeLoading(PreTrainedModel):
    """Mixed into a model: what is loaded is whole, and is nothing but weights."""

    head_keys: tuple[str, ...] = ()
    """Keys of a checkpoint that this class has no module for and may leave out."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', with these differences.

        Weights are read from safetensors, never from pickles. ``trust_remote_code`` is ignored: the classes are here,
        and nothing in a checkpoint is run. A local folder's files are checked before weights are read.

        Raises ValueError for ``use_safetensors=False``, pipeline or expert parallelism, tensor parallelism of another
        class or by another plan than the causal language model's own, a folder without safetensors, a file that is
        missing, damaged or cut short, and keys that are missing, unexpected or of another shape.
        """
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickled weights can run code and are never read")
        _refuse_plans(cls, kwargs)
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        kwargs |= {"ignore_mismatched_sizes": True}  # they are refused below, by name
        _check_files(source, kwargs)
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint {source} has a damaged safetensors file ({error}): fetch or copy it again"
            ) from error
        model, info = loaded
        refuse_other_keys(info, f"checkpoint {source or ''}", cls.head_keys)
        for module in model.modules():
            if isinstance(module, KeyScore):
                module.requires_grad_(False)  # as the layer has it, and loading does not
        model._loaded()
        return (model, info) if output_loading_info else model

    def _loaded(self) -> None:
        """Called once the weights are there."""


def refuse_other_keys(info: dict[str, Any], what: str, optional: Collection[str] = ()) -> None:
    """Raises ValueError, with ``what`` in front, for tensors that a checkpoint lacks, has too many or of other shapes.

    info: transformers' loading info. optional: keys that may be there or not. A head tied to the embedding counts as
    there, and the rotary frequencies that older versions saved are computed anew.
    """
    for kind in PROBLEMS:
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind, ()))
        names = [key for key in keys if key not in optional and OLD_BUFFERS not in key]
        if names:
            raise ValueError(f"{what} has {kind.replace('_', ' ')}: {name_some(names, 5)}")


def refuse_nonfinite(model: Any, what: str, remedy: str) -> None:
    """Raises ValueError for a model with NaN or infinity in a weight or a saved buffer, naming them."""
    if names := nonfinite(dict(model.state_dict())):
        raise ValueError(f"{what} has weights that are not finite: {name_some(names)}; {remedy}")


def _refuse_plans(cls: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where single layers would be cut by other plans than the class's own for tensor parallelism."""
    config = kwargs.get("distributed_config")
    asked = dict(config) if isinstance(config, dict) else dict(vars(config)) if config is not None else {}
    asked |= {name: kwargs[name] for name in ("tp_plan", "tp_size") if kwargs.get(name) is not None}
    own = bool(cls._tp_plan)
    if own and isinstance(asked.get("tp_plan"), dict):
        raise ValueError(
            f"tp_plan={asked['tp_plan']!r}: a Lizard model splits its heads by a plan of its own: leave it out"
        )
    for name, value in asked.items():
        if own and name in ("tp_plan", "tp_size"):
            continue
        plan = name in ("tp_plan", "ep_plan") or name.startswith("enable_")
        if (plan and value) or (name in ("tp_size", "pp_size", "ep_size") and (value or 1) > 1):
            raise ValueError(
                f"{name}={value!r}: a Lizard model has no {'' if own else 'tensor, '}pipeline or expert parallel plan. "
                "Leave it out: "
                'device_map="auto" spreads whole layers over devices, FSDP shards weights in training'
            )


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a saved model, by folder or hub name; no code of it is run, nor fetched for it.

    Raises ValueError for one that is damaged, that no model of transformers fits, or that names kernels of a hub.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a value of another type than wanted gives errors of many kinds
        if getattr(error, "errno", None) is not None:
            raise
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{kind}{error}") from error
    kernel = getattr(config, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel:
        raise ValueError(f"its config.json names attention kernels of a hub ({kernel!r}), which are never fetched")
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"its config.json has num_hidden_layers={layers!r}, wanted 1 to {MOST_LAYERS}")
    return config


def load_causal_lm(source: str, dtype: torch.dtype | str, what: str, *, config: PreTrainedConfig | None = None) -> Any:
    """Any causal language model by folder or hub name, Lizard or not, as safely as a Lizard.

    config: in place of the saved one.
    Raises ValueError, with ``what`` in front, for weights that are not in safetensors, missing or damaged; for tensors
    that are missing (transformers would start them at random), unexpected or of another shape than the config's; and
    for weights that are not finite.
    """
    try:
        _check_files(source, {})
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # what a configuration that fits nothing gives has no class of its own
        if getattr(error, "errno", None) is not None or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise  # of the system: a full disk, a file that may not be read
        kind = "" if isinstance(error, ValueError | SafetensorError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} {source!r} cannot be read: {kind}{error}") from error
    model, info = loaded
    refuse_other_keys(info, f"{what} {source!r}")
    refuse_nonfinite(model, f"{what} {source!r}", "fetch or copy it again, or load it in float32 if it was cast")
    return model


def _check_files(source: Any, kwargs: dict[str, Any]) -> None:
    adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    for folder in (adapter, source):
        if folder is not None and Path(folder).is_dir():
            refuse_pickled_adapter(Path(folder))
    if source is None or not Path(source).is_dir() or kwargs.get("variant") or kwargs.get("gguf_file"):
        return
    folder = Path(source) / kwargs.get("subfolder", "")
    if not (folder / "adapter_config.json").is_file():  # else the weights are those of the model it names
        read_shards(folder)
