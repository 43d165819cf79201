"""What only a GPU can show of models: CUDA graphs of compiled steps, and numbers that come late from the device."""

import copy
import dataclasses
import gc

import pytest
import torch
from tiny import student
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_layers import tensors_of
from lizard_models import LizardConfig, linearize
from lizard_models.distill import RunArguments, train_stage0, train_stage1
from lizard_models.model import decode_graph, joined, norms, read_graph
from lizard_models.model.attention import LizardAttention
from lizard_models.model.decode_graph import free_decode_graphs
from lizard_models.model.step_recorder import CudaRecorder

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
    model = linearize(llama(**wide, max_position_embeddings=131_072).bfloat16(), LizardConfig.preset("plain"))
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


def test_scores_are_fitted_from_a_graph_as_without_one(tmp_path):
    """Labels and gradients of every layer are made inside of the forward: the graph holds them all."""
    kept = {"kept_keys": 16, "score_received": True, "window": 32}
    config = LizardConfig.preset("plain").replace(attention=kept)
    recipe = dataclasses.replace(
        config.stage0, epochs=None, max_steps=8, batch_size=2, sequence_length=256, label_queries=32, precision="fp32"
    )
    fitted = {}
    for graph in (False, True):
        model = linearize(llama(), config).requires_grad_(False)
        run = RunArguments(output_dir=tmp_path / str(graph), device="cuda", cuda_graph=graph)
        result = train_stage0(model, model.key_scores(), Tokens(), run, recipe)
        fitted[graph] = [result.losses, result.r2, [p.detach().cpu() for p in model.key_scores().parameters()]]
    torch.testing.assert_close(fitted[True], fitted[False], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_loss_that_turns_nan_on_the_device_is_named(tmp_path, monkeypatch, cuda_graph):
    """Nothing waits for the device in between: the run stops a few steps later and names the step all the same."""
    model = linearize(llama(), LizardConfig.preset("plain")).requires_grad_(False)
    attention, calls = LizardAttention.teacher_attention, torch.zeros((), device="cuda")

    def broken(self, *args, **kwargs):
        calls.add_(1)
        return torch.where(calls > 40, torch.nan, attention(self, *args, **kwargs))

    monkeypatch.setattr(LizardAttention, "teacher_attention", broken)
    recipe = dataclasses.replace(
        LizardConfig.preset("plain").stage1, max_steps=60, batch_size=2, sequence_length=256, precision="fp32"
    )
    run = RunArguments(output_dir=tmp_path / "run", device="cuda", cuda_graph=cuda_graph, save_steps=5)
    where = r"(first after|for) \S*layers\.0.*, its gradient is not finite in"
    said = rf"^training: relative error is nan at step (1\d|2\d), {where}"
    with pytest.raises(FloatingPointError, match=said):
        train_stage1(model, Tokens(), run, recipe)
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert last < 22  # of what was finite


def eager_and_graphed(model, ids, **options):
    options = dict(max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True) | options
    torch.manual_seed(3)
    compiled = {"cache_implementation": None}  # without a graph a static cache's step is transformers' to compile
    plain = model.generate(ids, **options | compiled, decode_graph=False)
    torch.manual_seed(3)
    return plain, model.generate(ids, **options, decode_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.2, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_generate_replays_its_step_bit_for_bit(dtype, options, monkeypatch):
    monkeypatch.setattr(decode_graph, "tell", pytest.fail)
    config = LizardConfig.preset("plain", attention={"window": 16})
    model = linearize(llama().to(dtype), config).eval()
    draw = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(1, 512, (3, 40), device="cuda", generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    plain, graphed = eager_and_graphed(model, ids, attention_mask=mask, **options)
    assert torch.equal(plain.sequences, graphed.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, graphed.logits, strict=True))
    a, b = plain.past_key_values, graphed.past_key_values
    for one, other in zip(a.lizard_layers(), b.lizard_layers(), strict=True):
        for name, t in tensors_of(one.state).items():
            assert torch.equal(t, tensors_of(other.state)[name]), name
    assert a.get_seq_length() == b.get_seq_length() and torch.equal(a.positions(), b.positions())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_layers_compute_what_the_families_do(dtype, family, monkeypatch):
    """Sums with norms, gates with biases, joined projections, SiLU with product: beside float64 no further off."""
    model = student(family=family, window=8).cuda()
    ids = torch.randint(1, 97, (3, 40), device="cuda")
    assert (
        joined.adjacent([getattr(model.model.layers[0].mlp, name).weight for name in ("gate_proj", "up_proj")])
        is not None
    )

    def logits(of):
        cache = of(ids[:, :30], use_cache=True).past_key_values
        return torch.cat([of(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)], 1).double()

    exact = logits(copy.deepcopy(model).double())
    fused = logits(model.to(dtype))
    monkeypatch.setattr(norms, "on_gpu", lambda x: False)
    errors = [(found - exact).square().mean().sqrt() for found in (fused, logits(model))]
    assert errors[0] <= 1.5 * errors[1] + 1e-5 * exact.abs().max()


def assert_same_caches(a, b):
    for one, other in zip(a.lizard_layers(), b.lizard_layers(), strict=True):
        for name, t in tensors_of(one.state).items():
            assert torch.equal(t, tensors_of(other.state)[name]), name
    assert a.get_seq_length() == b.get_seq_length() and torch.equal(a.positions(), b.positions())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "attention",
    [
        {"window": 16},
        {"window": 16, "kept_keys": 8},
        {"window": 16, "kept_keys": [[8, 0], [3, 20]], "score_received": True, "coverage": "left"},
    ],
)
@pytest.mark.parametrize(("rows", "length", "keep"), [(1, 640, 1), (3, 300, 0), (2, 17, 1)])
def test_prompts_are_read_from_a_graph_bit_for_bit(dtype, attention, rows, length, keep, monkeypatch):
    """Of a whole text, and of the pieces of one, into new caches and into one that is read into again."""
    monkeypatch.setattr(read_graph, "tell", pytest.fail)
    model = linearize(llama().to(dtype), LizardConfig.preset("plain", attention=attention)).eval()
    kept, found = model.new_cache(), []
    for n in range(5):
        draw = torch.Generator("cuda").manual_seed(n)
        ids = torch.randint(1, 512, (rows, length), device="cuda", generator=draw)
        kept.reset()
        for cache in (None, kept):
            pair = [
                model(ids, past_key_values=c, use_cache=True, logits_to_keep=keep, decode_graph=graph)
                for c, graph in ((cache, None), (None, False))
            ]
            assert torch.equal(pair[0].logits, pair[1].logits)
            assert_same_caches(*(outputs.past_key_values for outputs in pair))
            if cache is None:
                found.append(pair)
            more = ids.flip(1)
            for _ in range(2):
                outputs = [
                    model(more, past_key_values=of.past_key_values, logits_to_keep=keep, decode_graph=graph)
                    for of, graph in zip(pair, (None, False), strict=True)
                ]
                assert torch.equal(outputs[0].logits, outputs[1].logits)
            assert_same_caches(*(of.past_key_values for of in pair))
    for one, other in found:  # what came back first has not been written to
        assert torch.equal(one.logits, other.logits)
        assert_same_caches(one.past_key_values, other.past_key_values)
    graphs = read_graph._graphs[model].graphs
    assert sorted(shape.begins for shape in graphs) == [False, True]
    for _ in range(4):
        written = [
            model.generate(ids, max_new_tokens=9, do_sample=False, decode_graph=graph) for graph in (None, False)
        ]
        assert torch.equal(*written)
    assert any(shape.positions for shape in graphs)  # with generate's position ids
    free_decode_graphs(model)
    assert not read_graph._graphs.get(model)


def test_memory_of_read_graphs_is_given_back():
    model = linearize(llama().bfloat16(), LizardConfig.preset("plain")).eval()
    ids = torch.randint(1, 512, (2, 700), device="cuda")
    with torch.no_grad():
        for _ in range(3):
            model(ids, use_cache=True, logits_to_keep=1)
        free_decode_graphs(model)
        gc.collect()
        held = torch.cuda.memory_allocated()
        for length in (700, 600, 500, 400, 300, 200):
            for _ in range(4):
                model(ids[:, :length], use_cache=True, logits_to_keep=1)
        free_decode_graphs(model)
        gc.collect()
    assert torch.cuda.memory_allocated() <= held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_of_fused_layers_are_the_families(dtype, family, monkeypatch):
    """Beside float64 no further off."""
    model = student(family=family, window=8).cuda().train().requires_grad_(True)
    ids = torch.randint(1, 97, (3, 40), device="cuda")

    def gradients(of):
        of.zero_grad()
        of(ids, use_cache=False).logits.double().square().mean().backward()
        return torch.cat([p.grad.double().flatten() for p in of.parameters() if p.grad is not None])

    exact = gradients(copy.deepcopy(model).double())
    fused = gradients(model.to(dtype))
    assert torch.equal(fused, gradients(model))
    monkeypatch.setattr(norms, "on_gpu", lambda x: False)
    errors = [(found - exact).norm() for found in (fused, gradients(model))]
    assert errors[0] <= 1.5 * errors[1] + 1e-5 * exact.norm()


def test_a_pool_of_graphs_serves_calls_of_other_lengths(monkeypatch):
    monkeypatch.setattr(decode_graph, "tell", pytest.fail)
    model = linearize(llama().bfloat16(), LizardConfig.preset("plain")).eval()
    captures, capture = [], CudaRecorder.capture
    monkeypatch.setattr(CudaRecorder, "capture", lambda self, step: captures.append(1) or capture(self, step))
    for rows, length in ((2, 300), (2, 33), (5, 60), (2, 200), (5, 1)):
        ids = torch.randint(1, 512, (rows, length), device="cuda")
        options = dict(max_new_tokens=16, do_sample=False)
        torch.rand(1, device="cuda")  # random numbers are drawn as before
        before = torch.cuda.get_rng_state()
        assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, decode_graph=False))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert len(captures) == 2
    free_decode_graphs(model)
    gc.collect()
    held = torch.cuda.memory_allocated()
    model.generate(ids, **options)
    free_decode_graphs(model)
    gc.collect()
    assert torch.cuda.memory_allocated() <= held


def test_anchors_that_move_on_are_captured_a_second_time(monkeypatch):
    monkeypatch.setattr(decode_graph, "tell", pytest.fail)
    choices = {"window": 8, "position_limit": 24, "position_step": 10}
    model = linearize(llama().float(), LizardConfig.preset("plain", attention=choices)).eval()
    ids = torch.randint(1, 512, (2, 15), device="cuda")
    plain, graphed = eager_and_graphed(model, ids, max_new_tokens=50)
    assert torch.equal(plain.sequences, graphed.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, graphed.logits, strict=True))


def test_a_step_that_waits_for_the_device_is_not_captured(monkeypatch):
    told = []
    monkeypatch.setattr(decode_graph, "tell", told.append)
    model = linearize(llama().float(), LizardConfig.preset("plain")).eval()
    norm = type(model.model.norm)
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x) * float(x.isfinite().all()))
    ids = torch.randint(1, 512, (2, 15), device="cuda")
    plain, graphed = eager_and_graphed(model, ids)
    assert torch.equal(plain.sequences, graphed.sequences) and len(told) == 1 and "waits for the device" in told[0]
    torch.rand(3, device="cuda")
