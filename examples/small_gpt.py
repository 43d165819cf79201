"""A small GPT whose attention is ``lizard_ops.chunk_gated_attn``: the op in an architecture that is not a Lizard.

    python examples/small_gpt.py --steps 300                  # text: the docstrings of Python's standard library
    python examples/small_gpt.py --text book.txt --steps 2000

Bytes in, bytes out. Each head keeps a decayed sum of its keys and values instead of a key-value cache, so a generated
byte costs the same at the millionth position as at the first. Training uses the chunked op, generation the recurrent
one; they give the same answer, and the script checks that before it generates.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizard_ops import AttentionState, chunk_gated_attn, recurrent_gated_attn

VOCABULARY = 256  # bytes


class GatedAttention(nn.Module):
    """Causal linear attention with a data-dependent decay a key head; two query heads share a key head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, heads // 2, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width // 2, bias=False)
        self.value = nn.Linear(width, width // 2, bias=False)
        self.gate = nn.Linear(width, self.key_heads)
        self.out = nn.Linear(width, width, bias=False)
        # A spread of memory lengths from about 10 to about 1000 bytes at the start.
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.gate.bias.copy_(torch.linspace(2.3, 6.9, self.key_heads))

    def forward(self, x: Tensor, state: AttentionState | None = None, step: bool = False):
        """x [B, T, width] -> the same shape, and the state after its last position."""
        q = F.elu(self.query(x).unflatten(-1, (self.heads, self.head_dim))) + 1
        k = F.elu(self.key(x).unflatten(-1, (self.key_heads, self.head_dim))) + 1
        v = self.value(x).unflatten(-1, (self.key_heads, self.head_dim))
        g = F.logsigmoid(self.gate(x).float())
        op = recurrent_gated_attn if step else chunk_gated_attn
        o, state = op(q, k, v, g, initial_state=state, output_final_state=True)
        return self.out(o.flatten(-2)), state


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), GatedAttention(width, heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, state: AttentionState | None, step: bool):
        mixed, state = self.attention(self.attention_norm(x), state, step)
        x = x + mixed
        return x + self.feed_forward(x), state


class SmallGPT(nn.Module):
    """Embeddings, blocks, a tied head. No position embedding: the decays tell near from far."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor, states: list[AttentionState] | None = None, step: bool = False):
        """ids [B, T] -> logits [B, T, VOCABULARY] and one state a layer."""
        x = self.embedding(ids)
        new_states = []
        for index, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[index], step)
            new_states.append(state)
        return self.norm(x) @ self.embedding.weight.T, new_states


def standard_library_docstrings() -> str:
    """English that every Python installation has: the docstrings of its standard library, about 1 MB."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(text for text in texts if text)


def batches(text: Tensor, size: int, length: int, generator: torch.Generator):
    """Endless random windows of the text, [size, length + 1]."""
    while True:
        starts = torch.randint(0, len(text) - length - 1, (size,), generator=generator)
        yield torch.stack([text[s : s + length + 1] for s in starts]).long()


def loss_of(model: SmallGPT, ids: Tensor) -> Tensor:
    """Mean next-byte cross-entropy in nats."""
    logits, _ = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: SmallGPT, text: Tensor, steps: int, size: int, length: int, device: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    source = batches(text, size, length, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model, next(source).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == 1:
            seconds = (time.perf_counter() - start) / step
            left = seconds * (steps - step)
            print(f"step {step:5d}  loss {loss.item():.3f} nats a byte  {seconds:.2f} s a step  {left:.0f} s left")


@torch.no_grad()
def generate(model: SmallGPT, prompt: Tensor, new_bytes: int, temperature: float = 0.7) -> bytes:
    """Prompt in one piece, then a byte at a time from the state alone."""
    logits, states = model(prompt)
    made = []
    for _ in range(new_bytes):
        probabilities = (logits[:, -1].float() / temperature).softmax(-1)
        made.append(torch.multinomial(probabilities, 1))
        logits, states = model(made[-1], states, step=True)
    return bytes(torch.cat(made, 1)[0].tolist())


@torch.no_grad()
def largest_step_difference(model: SmallGPT, ids: Tensor) -> float:
    """Logits of the whole text at once against the same text one byte at a time."""
    whole, _ = model(ids)
    states, steps = None, []
    for t in range(ids.shape[1]):
        logits, states = model(ids[:, t : t + 1], states, step=True)
        steps.append(logits)
    return (torch.cat(steps, 1) - whole).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="bytes a training sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    raw = options.text.read_bytes() if options.text else standard_library_docstrings().encode()
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    held_out = text[: min(len(text) // 10, 16 * (options.length + 1))]
    model = SmallGPT().to(options.device)
    train(model, text[len(held_out) :], options.steps, options.batch_size, options.length, options.device)

    rows = held_out[: len(held_out) // (options.length + 1) * (options.length + 1)].view(-1, options.length + 1)
    with torch.no_grad():
        print(f"held-out loss {loss_of(model, rows.long().to(options.device)).item():.3f} nats a byte")
    prompt = held_out[None, : options.length].long().to(options.device)
    print(f"chunked against one byte at a time: logits differ by at most {largest_step_difference(model, prompt):.1e}")
    print(bytes(prompt[0, -80:].tolist()).decode(errors="replace"), end="")
    print(generate(model, prompt, 200).decode(errors="replace"))


if __name__ == "__main__":
    main()
