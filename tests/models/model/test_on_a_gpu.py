"""What only a GPU can show of models: CUDA graphs of compiled steps, and numbers that come late from the device."""

import dataclasses

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize
from lizard_models.distill import RunArguments, train_stage1
from lizard_models.model.attention import LizardAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def llama(**sizes):
    shape = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=2, pad_token_id=0, eos_token_id=None, **shape | sizes)
    with torch.device("cuda"):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_a_long_prompt_in_pieces_before_compiled_steps():
    """Width and batch of a model of 8B parameters: a graph of each piece of 8192 tokens ended in a crash."""
    wide = dict(hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8)
    model = linearize(llama(**wide, max_position_embeddings=131_072).bfloat16(), LizardConfig.preset("recommended"))
    ids = torch.randint(1, 512, (16, 20_000), device="cuda")
    settings = dict(max_new_tokens=8, do_sample=False, cache_implementation="static", prefill_chunk_size=8192)
    found = model.generate(ids, **settings)
    assert found.shape == (16, 20_008)
    again = model.generate(ids[:, :9000], **settings)  # another number of pieces
    assert again.shape == (16, 9008)
    cache = model.new_cache()
    for piece in ids.split(8192, 1):
        logits = model(piece, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
    best, second = logits.topk(2).values.unbind(-1)
    clear = best - second > 0.05  # a bfloat16 logit of this size says no more
    assert clear.any() and torch.equal(found[clear, 20_000], logits.argmax(-1)[clear])


class Tokens(Dataset):
    digest = "drawn"

    def __len__(self):
        return 400

    def __getitem__(self, index):
        return {"input_ids": torch.randint(1, 512, (256,), generator=torch.Generator().manual_seed(index))}


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_loss_that_turns_nan_on_the_device_is_named(tmp_path, monkeypatch, cuda_graph):
    """Nothing waits for the device in between: the run stops a few steps later and names the step all the same."""
    model = linearize(llama(), LizardConfig.preset("recommended")).requires_grad_(False)
    attention, calls = LizardAttention.teacher_attention, torch.zeros((), device="cuda")

    def broken(self, *args, **kwargs):
        calls.add_(1)
        return torch.where(calls > 40, torch.nan, attention(self, *args, **kwargs))

    monkeypatch.setattr(LizardAttention, "teacher_attention", broken)
    recipe = dataclasses.replace(
        LizardConfig.preset("recommended").stage1, max_steps=60, batch_size=2, sequence_length=256, precision="fp32"
    )
    run = RunArguments(output_dir=tmp_path / "run", device="cuda", cuda_graph=cuda_graph, save_steps=5)
    with pytest.raises(
        FloatingPointError, match=r"relative error is nan at step (1\d|2\d), its gradient is not finite"
    ):
        train_stage1(model, Tokens(), run, recipe)
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert last < 22  # of what was finite
