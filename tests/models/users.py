"""What users of transformers do, one row each, on a Lizard, its teacher, and the Mamba-2 that transformers ships.

    python tests/models/users.py > docs/users.md

A row says what happens to each of the three: "yes" where it works as described, else what is seen instead. The tests
run every row and hold it to that, so the table cannot say more than they do.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from readable import byte_tokenizer
from tiny import student, teacher
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, pipeline

MODELS = ("lizard", "teacher", "mamba2")
VOCABULARY = len(byte_tokenizer())


@dataclass(frozen=True)
class Row:
    """What is done, the check that does it, and what each model answers: "yes" or what is seen instead."""

    what: str
    check: Callable[[Any], str]
    lizard: str = "yes"
    teacher: str = "yes"
    mamba2: str = "yes"


@lru_cache
def model(name: str) -> Any:
    """One of MODELS, tiny, with random weights; do not change it."""
    if name == "lizard":
        return student(vocab_size=VOCABULARY, num_hidden_layers=2)
    if name == "teacher":
        return teacher(vocab_size=VOCABULARY, num_hidden_layers=2).requires_grad_(False)
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=16, num_heads=8, head_dim=16, expand=2,
        n_groups=2, chunk_size=8, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval().requires_grad_(False)


def outcome(row: Row, name: str) -> str:
    """What the row's check says of a model, or the error it ends in."""
    try:
        return row.check(model(name))
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def matches(expected: str, seen: str) -> bool:
    """Whether an expectation holds: the words themselves, or an error whose message has the quoted words in it."""
    kind, _, quoted = expected.partition(": ")
    if kind.endswith("Error"):
        return seen.startswith(kind + ": ") and quoted.strip("“”") in seen
    return expected == seen


# ---- the checks


def ids(length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def write(m: Any, prompt: torch.Tensor, steps: int = 8, **settings: Any) -> Any:
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0} | settings
    return m.generate(prompt, max_new_tokens=steps, **settings)


def said(good: bool, otherwise: str = "no") -> str:
    return "yes" if good else otherwise


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-3) -> bool:
    return torch.allclose(a.float(), b.float(), atol=tolerance)


def cache_name(m: Any) -> str:
    return "cache_params" if isinstance(m, Mamba2ForCausalLM) else "past_key_values"


def cached(m: Any, prompt: torch.Tensor, **inputs: Any) -> Any:
    return m(prompt, use_cache=True, **inputs)[cache_name(m)]


def after(m: Any, cache: Any, more: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return m(more, use_cache=True, **{cache_name(m): cache}, **inputs).logits


def greedy(m: Any) -> str:
    out = row = ids(13)
    for _ in range(8):
        out = torch.cat([out, m(out, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return said(torch.equal(write(m, row), out))


def left_padding(m: Any) -> str:
    rows = [ids(13), ids(5, 3), ids(1, 4)]
    batch = torch.cat([torch.cat([torch.zeros(1, 13 - row.shape[1], dtype=torch.long), row], 1) for row in rows])
    mask = torch.stack([(torch.arange(13) >= 13 - row.shape[1]).long() for row in rows])
    together = write(m, batch, attention_mask=mask)[:, -8:]
    return said(torch.equal(together, torch.cat([write(m, row)[:, -8:] for row in rows])))


def right_padding(m: Any) -> str:
    row = ids(5)
    padded = torch.cat([row, torch.zeros(1, 8, dtype=torch.long)], 1)
    return said(close(m(padded, attention_mask=(torch.arange(13) < 5).long()[None]).logits[:, :5], m(row).logits))


def right_padded_state(m: Any) -> str:
    row, more = ids(5), ids(3, 7)
    padded = torch.cat([row, torch.zeros(1, 8, dtype=torch.long)], 1)
    mask = (torch.arange(13) < 5).long()[None]
    cache = cached(m, padded, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(1, 3, dtype=torch.long)], 1)
    if isinstance(m, Mamba2ForCausalLM):
        mask = None  # its layers know only masks of the new tokens
    goes_on = after(m, cache, more, attention_mask=mask, position_ids=torch.arange(5, 8)[None])
    return said(close(goes_on, m(torch.cat([row, more], 1)).logits[:, 5:]), "no, other logits")


def chunked_generate(m: Any) -> str:
    return said(torch.equal(write(m, ids(29), prefill_chunk_size=7), write(m, ids(29))))


def chunked_forward(m: Any) -> str:
    row, cache, parts = ids(29), None, []
    for part in row.split([11, 1, 9, 8], dim=1):
        out = m(part, use_cache=True, **{cache_name(m): cache})
        cache = out[cache_name(m)]
        parts.append(out.logits)
    return said(close(torch.cat(parts, 1), m(row).logits))


def beam_search(m: Any) -> str:
    return said(torch.equal(write(m, ids(11), num_beams=3), write(m, ids(11), num_beams=3, use_cache=False)))


def sampling(m: Any) -> str:
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(write(m, ids(9), do_sample=True, num_return_sequences=3))
    return said(torch.equal(*draws) and len(draws[0].unique(dim=0)) == 3)


def prompt_lookup(m: Any) -> str:
    return said(torch.equal(write(m, ids(9), prompt_lookup_num_tokens=2), write(m, ids(9))))


def assistant_model(m: Any) -> str:
    return said(torch.equal(write(m, ids(9), assistant_model=model("teacher")), write(m, ids(9))))


def contrastive(m: Any) -> str:
    return said(write(m, ids(9), penalty_alpha=0.6, top_k=4).shape[1] == 17)


def pipe(m: Any) -> str:
    tokenizer = byte_tokenizer()
    talk = pipeline("text-generation", model=m, tokenizer=tokenizer)
    texts, settings = ["a", "the wind turns the mill"], dict(max_new_tokens=5, do_sample=False)
    together = [answer[0]["generated_text"] for answer in talk(texts, batch_size=2, **settings)]
    return said(together == [talk(text, **settings)[0]["generated_text"] for text in texts])


def chat(m: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    talk = pipeline("text-generation", model=m, tokenizer=tokenizer)
    answer = talk([{"role": "user", "content": "hi"}], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    return said(answer[-1]["role"] == "assistant")


def save_and_load(m: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        m.save_pretrained(folder)
        return said(torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids(20)).logits, m(ids(20)).logits))


def lora(m: Any) -> str:
    from peft import LoraConfig, get_peft_model

    targets = ["in_proj"] if isinstance(m, Mamba2ForCausalLM) else ["q_proj", "v_proj"]
    adapted = get_peft_model(copy.deepcopy(m), LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted(input_ids=ids(20), labels=ids(20)).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    torch.optim.SGD(trained, 0.1).step()
    with torch.no_grad():
        tuned = adapted.eval()(input_ids=ids(20)).logits
        return said(
            all(p.grad is not None for p in trained) and close(adapted.merge_and_unload()(ids(20)).logits, tuned)
        )


def checkpointing(m: Any) -> str:
    trained, gradients = copy.deepcopy(m).requires_grad_(True).train(), []
    for again in (False, True):
        if again:
            trained.gradient_checkpointing_enable()
        trained.zero_grad()
        trained(ids(20), labels=ids(20)).loss.backward()
        gradients.append([p.grad.clone() for p in trained.parameters() if p.grad is not None])
    return said(all(map(torch.equal, *gradients)))


def half_precision(m: Any) -> str:
    half = copy.deepcopy(m).bfloat16()
    error = (half(ids(20)).logits.float() - m(ids(20)).logits).square().mean().sqrt() / m(ids(20)).logits.std()
    return said(write(half, ids(20)).shape[1] == 28 and error.item() < 0.1, "no, it is far off")


def device_map(m: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        m.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
        return said(torch.equal(write(loaded, ids(20)), write(m, ids(20))))


def compiled(m: Any) -> str:
    prompt, step = ids(12), torch.compile(m.forward, backend="eager", fullgraph=True)
    caches = [cached(m, prompt) for _ in range(2)]
    pairs = []
    for seed in range(3):
        inputs = [{"use_cache": True, cache_name(m): cache} for cache in caches]
        pairs.append([f(ids(1, seed), **given).logits for f, given in zip((m, step), inputs, strict=True)])
    return said(all(close(a, b) for a, b in pairs))


def crop(m: Any) -> str:
    cache = cached(m, ids(6))
    cache.activate_past_recording()
    after(m, cache, ids(6, 3))
    cache.crop(-3)
    kept = torch.cat([ids(6), ids(6, 3)[:, :3], ids(3, 8)], 1)
    return said(close(after(m, cache, ids(3, 8)), m(kept).logits[:, 9:]), "no, other logits")


def prompt_cache(m: Any) -> str:
    prompt = ids(12)
    cache = cached(m, prompt)
    answers = []
    for seed in (5, 6):
        longer = torch.cat([prompt, ids(4, seed)], 1)
        with_cache = write(m, longer, **{cache_name(m): copy.deepcopy(cache)})
        answers.append(torch.equal(with_cache, write(m, longer)))
    return said(all(answers), "no, other tokens")


def cache_argument(m: Any) -> str:
    return said("past_key_values" in m(ids(3), use_cache=True), f"no, it is `{cache_name(m)}`")


def packed_rows(m: Any) -> str:
    a, b = ids(9), ids(6, 3)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    logits = m(torch.cat([a, b], 1), position_ids=positions, use_cache=False).logits
    return said(close(logits[:, 9:], m(b).logits), "no, the second document sees the first")


def constant_memory(m: Any) -> str:
    sizes = [sum(t.nbytes for t in tensors_in(cached(m, ids(length)))) for length in (40, 80)]
    return {sizes[0]: "yes", 2 * sizes[0]: "no, it doubles"}.get(sizes[1], f"no, {sizes[0]} to {sizes[1]} bytes")


def tensors_in(value: Any) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, torch.Tensor):
            found[top.data_ptr()] = top
        elif isinstance(top, dict):
            stack.extend(top.values())
        elif isinstance(top, (list, tuple)):
            stack.extend(top)
        elif hasattr(top, "__dict__"):
            stack.extend(vars(top).values())
    return list(found.values())


def past_the_context(m: Any) -> str:
    """Every model writes on; only one with positions it was not trained at has a context to leave."""
    return said(write(m, ids(250), 20).shape[1] == 270)


def batch_loss(m: Any) -> str:
    labels = torch.cat([ids(20), ids(20, 5)])
    alone = torch.stack([m(row[None], labels=row[None]).loss for row in labels]).mean()
    return said(close(m(labels, labels=labels).loss, alone))


def static_cache(m: Any) -> str:
    return said(torch.equal(write(m, ids(9), cache_implementation="static"), write(m, ids(9))))


def resize(m: Any) -> str:
    larger = copy.deepcopy(m)
    larger.resize_token_embeddings(VOCABULARY + 5)
    return said(close(larger(ids(9)).logits[..., :VOCABULARY], m(ids(9)).logits))


def embeddings_in(m: Any) -> str:
    return said(close(m(inputs_embeds=m.get_input_embeddings()(ids(9))).logits, m(ids(9)).logits))


def hidden_states(m: Any) -> str:
    return said(len(m(ids(9), output_hidden_states=True).hidden_states) == 3)


def attentions(m: Any) -> str:
    m = copy.deepcopy(m)
    if not isinstance(m, Mamba2ForCausalLM):
        m.set_attn_implementation("eager")
    return said(len(m(ids(9), output_attentions=True).attentions) == 2)


def exported(m: Any) -> str:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = m

        def forward(self, prompt: torch.Tensor) -> torch.Tensor:
            return self.model(prompt, use_cache=False).logits

    program = torch.export.export(Logits(), (ids(12),), strict=False).module()
    return said(close(program(ids(12, 5)), m(ids(12, 5)).logits))


def loss_ignores_masked_labels(m: Any) -> str:
    labels = ids(12).clone()
    labels[:, :6] = -100
    logits = m(ids(12)).logits[:, 5:-1].flatten(0, 1)
    return said(close(m(ids(12), labels=labels).loss, torch.nn.functional.cross_entropy(logits, labels[0, 6:])))


STATEFUL = "ValueError: “assisted generation is not supported with stateful models”"
CONTRASTIVE = "ValueError: “Contrastive Search requires `trust_remote_code=True`”"
LEAKS = "no, the second document sees the first"
NO_MATRIX = "ValueError: “no attention matrices to return”"
ROWS = [
    Row("greedy `generate` equals full forward passes", greedy),
    Row("left-padded batches write what single prompts do", left_padding),
    Row("right padding changes no logits", right_padding),
    Row("a cache filled from a right-padded row goes on as if unpadded", right_padded_state, mamba2="no, other logits"),
    Row("`generate(prefill_chunk_size=7)`", chunked_generate, mamba2="ValueError: “Cannot use prefill chunking”"),
    Row("forward in pieces of any sizes with the cache", chunked_forward),
    Row("beam search equals beam search without a cache", beam_search),
    Row("sampling repeats under a seed, `num_return_sequences`", sampling),
    Row("assisted generation (prompt lookup)", prompt_lookup, mamba2=STATEFUL),
    Row("assisted generation with an assistant model", assistant_model, mamba2=STATEFUL),
    Row("contrastive search", contrastive, CONTRASTIVE, CONTRASTIVE, CONTRASTIVE),
    Row('`pipeline("text-generation")`, batched', pipe),
    Row("chat templates through the pipeline", chat),
    Row("`save_pretrained`, `from_pretrained`: equal bits", save_and_load),
    Row("LoRA with peft: a step, merged", lora),
    Row("gradient checkpointing: equal gradients", checkpointing),
    Row("bfloat16: forward and `generate`", half_precision),
    Row('`device_map="auto"`', device_map),
    Row("`torch.compile(fullgraph=True)` of the decode step", compiled),
    Row("`torch.export` of the forward", exported),
    Row("the cache has the name `past_key_values`", cache_argument, mamba2="no, it is `cache_params`"),
    Row("`cache.crop`, after `activate_past_recording`", crop, mamba2="no, other logits"),
    Row("many prompts from one cached prefix", prompt_cache, mamba2="no, other tokens"),
    Row("packed rows: restarting `position_ids` keep documents apart", packed_rows, mamba2=LEAKS),
    Row("memory of a sequence stays the same from 40 to 80 tokens", constant_memory, teacher="no, it doubles"),
    Row("`generate` goes past `max_position_embeddings`", past_the_context),
    Row('`cache_implementation="static"`', static_cache),
    Row("`resize_token_embeddings`", resize),
    Row("`inputs_embeds`", embeddings_in),
    Row("`output_hidden_states`", hidden_states),
    Row("`output_attentions`, eager", attentions, lizard=NO_MATRIX, mamba2="AttributeError: “attentions”"),
    Row("the loss of a batch is the mean of its rows' losses", batch_loss),
    Row("`labels` with -100: the loss of the rest", loss_ignores_masked_labels),
]

HEAD = """# What users of transformers do

Each row is a test (`pytest tests/models/test_users.py`) on tiny random models: a Lizard (preset `plain`, window
8), its Llama teacher, and transformers' own Mamba-2. "yes" means that what the row says holds; anything else is what is
seen instead. Written by `python tests/models/users.py > docs/users.md`; a test holds this file to the rows.

| | Lizard | its teacher | Mamba-2 |
|---|---|---|---|
"""


def table() -> str:
    """docs/users.md."""
    lines = [" | ".join([f"| {row.what}", *(getattr(row, name) for name in MODELS)]) + " |" for row in ROWS]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
