"""Before any training, the recommended student gives its teacher's logits on prompts no longer than the window.

    python examples/equals_teacher.py                       # SmolLM2-135M-Instruct, float32
    python examples/equals_teacher.py --teacher my-llama/   # any Llama or Mistral

Prints the largest difference of any logit, prompt by prompt, and beside it the difference between the teacher's own
two attention implementations: rounding alone. Past the window student and teacher differ until stage 1.
"""

from __future__ import annotations

import argparse

import torch

from lizard_models import LizardConfig, linearize
from lizard_models.teachers.find import load_teacher

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property "
    "of some one or other of their daughters.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2-135m")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher, dtype=torch.float32, say=print)
    assert teacher.tokenizer is not None
    config = LizardConfig.preset("recommended")
    student = linearize(teacher.model, config)
    window = config.attention.window
    prompts = [teacher.tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    prompts.append(torch.cat(prompts, 1)[:, :window])
    prompts.append(torch.randint(0, teacher.model.config.vocab_size, (4, window), generator=torch.manual_seed(0)))
    for ids in prompts:
        with torch.no_grad():
            ours = student(ids).logits
            teacher.model.set_attn_implementation("sdpa")
            fused = teacher.model(ids).logits
            teacher.model.set_attn_implementation("eager")
            plain = teacher.model(ids).logits
        difference, rounding = ((x - plain).abs().max().item() for x in (ours, fused))
        size = f"{ids.shape[0]} x {ids.shape[1]:3d} tokens"
        print(f"{size}: student and teacher {difference:.1e}, the teacher's sdpa and eager attention {rounding:.1e}")


if __name__ == "__main__":
    main()
