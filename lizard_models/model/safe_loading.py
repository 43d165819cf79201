"""``from_pretrained`` of the Lizard families: safetensors only, strict keys, no code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lizard_models.files.weights import read_shards, refuse_pickled_adapter

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class SafeLoading(PreTrainedModel):
    """Mixed into a model: what is loaded is whole, and is nothing but weights."""

    head_keys: tuple[str, ...] = ()
    """Keys of a checkpoint that this class has no module for and may leave out."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', with these differences.

        Weights are read from safetensors, never from pickles. ``trust_remote_code`` is ignored: the classes are here,
        and nothing in a checkpoint is run. A local folder's files are checked before weights are read.

        Raises ValueError for ``use_safetensors=False``, tensor, pipeline or expert parallelism, a folder without
        safetensors, a file that is missing, damaged or cut short, and keys that are missing, unexpected or of another
        shape.
        """
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickled weights can run code and are never read")
        _refuse_plans(kwargs)
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        _check_files(source, kwargs)
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint {source} has a damaged safetensors file ({error}): fetch or copy it again"
            ) from error
        model, info = loaded
        for kind in PROBLEMS:
            names = sorted(str(key) for key in info[kind] if key not in cls.head_keys)
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise ValueError(f"checkpoint {source or ''} has {kind.replace('_', ' ')}: {shown}")
        return (model, info) if output_loading_info else model


def _refuse_plans(kwargs: dict[str, Any]) -> None:
    """Raises ValueError where single layers would be cut: the families' plans know nothing of the new parameters."""
    config = kwargs.get("distributed_config")
    asked = dict(config) if isinstance(config, dict) else dict(vars(config)) if config is not None else {}
    asked |= {name: kwargs[name] for name in ("tp_plan", "tp_size") if kwargs.get(name) is not None}
    for name, value in asked.items():
        plan = name in ("tp_plan", "ep_plan") or name.startswith("enable_")
        if (plan and value) or (name in ("tp_size", "pp_size", "ep_size") and (value or 1) > 1):
            raise ValueError(
                f"{name}={value!r}: a Lizard model has no tensor, pipeline or expert parallel plan. Leave it out: "
                'device_map="auto" spreads whole layers over devices, FSDP shards weights in training'
            )


def load_causal_lm(source: str, dtype: torch.dtype | str, what: str, *, config: PreTrainedConfig | None = None) -> Any:
    """Any causal language model by folder or hub name, Lizard or not, as safely as a Lizard.

    config: in place of the saved one.
    Raises ValueError, with ``what`` in front, for weights that are not in safetensors, missing or damaged.
    """
    try:
        _check_files(source, {})
        return AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (ValueError, SafetensorError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the system: a full disk, a file that may not be read
        raise ValueError(f"{what} {source!r} cannot be read: {error}") from error


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
