"""Lizards in vLLM's engine: every token as ``generate`` writes it. Skipped where vLLM is not installed.

It has a virtual environment of its own (docs/serving.md): ``pytest tests/engine``.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from readable import byte_tokenizer
from tiny import student, tokens

from lizard_vllm.names import ARCHITECTURES

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # vLLM's newer model runner: conftest.py

pytest.importorskip("vllm", reason="vLLM is not installed: docs/serving.md says how")
os.environ |= {  # an engine in this process, and no compiler: both are quick
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

LENGTHS = (1, 5, 30, 70, 200, 33)
ANCHORS = dict(positions="clamped", position_limit=48, position_step=8)
HEADS = dict(head_dim=32)  # the smallest of vLLM's own attention on a CPU
KEYS = dict(kept_keys=4, score_dim=8)
SHARED = KEYS | dict(kept_keys=[[3, 1], [0, 0], [0, 5]])  # places of each layer and head
CASES = {
    "llama": {},
    "mistral": dict(family="mistral"),
    "qwen2": dict(family="qwen2"),
    "qwen3": dict(family="qwen3"),
    "smollm3": dict(family="smollm3", num_hidden_layers=4),
    "gemma2, a window wider than its sliding one": HEADS | dict(family="gemma2", window=16),
    "gemma3": HEADS | dict(family="gemma3_text"),
    "gemma3, all converted": dict(family="gemma3_text", keep_sliding_layers=False),
    "kept softmax": HEADS | dict(softmax_layers=[1]),
    "kept softmax, no positions": HEADS | dict(family="smollm3", num_hidden_layers=4, softmax_layers=[0, 3]),
    "wide": dict(wide_layers=[0], wide_window=24),
    "wide, kept softmax": HEADS | dict(wide_layers=[0], wide_window=24, softmax_layers=[2]),
    "paper": dict(preset="paper"),
    "liger": dict(preset="liger"),
    "kept keys": dict(attention=KEYS),
    "received scores": dict(attention=KEYS | dict(score_received=True, score_stride=4)),
    "kept keys left out of the sums": dict(attention=KEYS | dict(coverage="left")),
    "places shared out": dict(attention=SHARED),
    "anchors that move": dict(attention=ANCHORS),
    "kept keys that move": dict(attention=ANCHORS | KEYS),
    "places that move": dict(attention=ANCHORS | SHARED | dict(coverage="left")),
}
CACHED = ("llama", "kept softmax", "gemma3", "wide", "kept keys", "anchors that move", "places that move")


def saved(folder, **kind):
    """A random Lizard in a folder."""
    tokenizer = byte_tokenizer()
    model = student(**dict(vocab_size=len(tokenizer), max_position_embeddings=1024) | kind).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@contextlib.contextmanager
def engine(folder, **options):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    shared = dict(dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64)
    shared |= dict(enable_prefix_caching=False, distributed_executor_backend="uni", disable_log_stats=False)
    try:
        llm = LLM(str(folder), **shared | options)
        assert llm.llm_engine.vllm_config.use_v2_model_runner == V2
        yield llm
    finally:
        cleanup_dist_env_and_memory()


def asked(llm, prompts, count: int):
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)


def written(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def alone(model, prompts, count: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        found.append(output[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_that_of_generate(tmp_path, case):
    """Six texts at once, read in pieces of a batch of 64 tokens beside those that write."""
    model = saved(tmp_path, **CASES[case])
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    with engine(tmp_path) as llm:
        assert written(asked(llm, prompts, 24)) == alone(model, prompts, 24)


@pytest.mark.parametrize("case", CACHED)
def test_turns_go_on_from_cached_prefixes(tmp_path, case):
    model = saved(tmp_path, **CASES[case])
    texts = [tokens(1, n, seed=n)[0].tolist() for n in (150, 40, 290)]
    with engine(tmp_path, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=512) as llm:
        for turn in range(3):
            outputs = asked(llm, texts, 12)
            assert written(outputs) == alone(model, texts, 12)
            if turn:
                assert sum(output.num_cached_tokens for output in outputs) > 0
            new = [tokens(1, 9, seed=turn)[0].tolist() for _ in texts]
            texts = [text + said + more for text, said, more in zip(texts, written(outputs), new, strict=True)]
        shared = [texts[2][:200] + tokens(1, n, seed=n)[0].tolist() for n in (3, 20, 50)]  # one start, three ends
        assert written(asked(llm, shared, 12)) == alone(model, shared, 12)


@pytest.mark.parametrize("case", ["qwen3", "kept softmax", "kept keys of each head"])
def test_two_ranks_write_what_one_does(tmp_path, monkeypatch, case):
    """Tensor parallelism: heads, and the pages of their states, split over two processes."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    kind = CASES.get(case) or dict(attention=KEYS | dict(kept_keys=[3, 1]))
    model = saved(tmp_path, **kind)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    split = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    with engine(tmp_path, **split) as llm:
        assert written(asked(llm, prompts, 24)) == alone(model, prompts, 24)


def test_the_names_are_those_of_the_families():
    from vllm.model_executor.models import ModelRegistry

    import lizard_vllm
    from lizard_models.model.families import FAMILIES, load_family

    assert {load_family(family).__name__ for family in FAMILIES} == set(ARCHITECTURES)
    for _ in range(2):
        lizard_vllm.register()
    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(tensor_parallel_size=3, distributed_executor_backend="mp"), "--tensor-parallel-size: .* its 2 key heads"),
        (dict(decode_context_parallel_size=2, tensor_parallel_size=2), "--decode-context-parallel-size"),
        (dict(speculative_config=dict(method="ngram", num_speculative_tokens=2)), "--speculative-config"),
        (dict(kv_cache_dtype="fp8"), "--kv-cache-dtype"),
        (dict(enable_lora=True), "--enable-lora"),
        (dict(enable_prefix_caching=True, block_size=32, mamba_block_size=16), "--block-size is 32 and --mamba-block"),
    ],
)
def test_what_is_not_there_is_refused_by_name(tmp_path, options, match):
    saved(tmp_path, num_hidden_layers=1)
    with pytest.raises(Exception, match=match), engine(tmp_path, **options):
        pass
