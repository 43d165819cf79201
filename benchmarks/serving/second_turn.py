"""Time to the first token of each turn of a conversation, with a store of prefixes and without.

python -m benchmarks.serving.second_turn                       # a random model of SmolLM2-135M's shape
python -m benchmarks.serving.second_turn --model my-lizard --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, PrefixStates, linearize, load_model


def of_shape(window: int) -> Any:
    """A random Lizard of SmolLM2-135M's shape, preset plain."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    return linearize(LlamaForCausalLM(config).eval(), LizardConfig.preset("plain", attention={"window": window}))


@torch.no_grad()
def measure(model: Any, first: int, more: int, turns: int, tokens: int, store: PrefixStates | None) -> dict[str, Any]:
    """Seconds to the first token of each turn (the CPU's, unless on a GPU), and what was written."""
    draw = torch.Generator().manual_seed(1)
    size, device = model.config.vocab_size, model.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # the machine may be shared
    text = torch.randint(3, size, (1, first), generator=draw).to(device)
    times = []
    for _ in range(turns):
        given = {} if store is None else {"prefix_states": store}
        mask = torch.ones_like(text)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = clock()
        model.generate(text, attention_mask=mask, max_new_tokens=1, do_sample=False, **given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(round(clock() - began, 3))
        text = model.generate(text, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **given)
        text = torch.cat([text, torch.randint(3, size, (1, more), generator=draw).to(device)], 1)
    return {"seconds": times, "text": text.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a linearized model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--first", type=int, default=2000, help="tokens of the first prompt")
    parser.add_argument("--more", type=int, default=50, help="tokens of each prompt after it")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    model = load_model(arguments.model).model if arguments.model else of_shape(128)
    model = model.to(arguments.device, dtype)
    sizes = (arguments.first, arguments.more, arguments.turns, arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        disk = PrefixStates(0, folder=folder)
        warm = PrefixStates()
        warm.longest(model, torch.arange(32))  # sums the weights, once a process
        disk.longest(model, torch.arange(32))
        ways = {"without": None, "memory": warm, "disk": disk}
        found = {name: measure(model, *sizes, store) for name, store in ways.items()}
        record = {name: way["seconds"] for name, way in found.items()}
        record["equal"] = all(way["text"] == found["without"]["text"] for way in found.values())
        record["bytes_a_state"] = warm.nbytes() // max(1, len(warm))
    began = time.perf_counter()
    PrefixStates().longest(model, torch.arange(32))
    record["seconds_to_sum_the_weights"] = round(time.perf_counter() - began, 3)
    print(json.dumps(vars(arguments) | record, indent=1))


if __name__ == "__main__":
    main()
