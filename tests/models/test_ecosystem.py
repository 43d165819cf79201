"""Tools around transformers on a finished Lizard: peft, accelerate, quantisation, export, lm-eval, the hub."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from readable import byte_tokenizer, save_teacher
from tiny import student, teacher, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, pipeline
from typer.testing import CliRunner

from lizard_models import LizardConfig, linearize_folder
from lizard_models.cli.main import app
from lizard_models.model.cache import LizardCache

NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
NEEDS_BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def generated(model, ids, steps: int = 6):
    settings = dict(max_new_tokens=steps, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def test_pipeline_reads_a_folder_by_its_path_and_chats(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    student(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    talk = pipeline("text-generation", model=str(tmp_path))
    settings = dict(max_new_tokens=5, do_sample=False)
    alone = [talk(text, **settings)[0]["generated_text"] for text in ("a", "the wind turns the mill")]
    together = talk(["a", "the wind turns the mill"], batch_size=2, **settings)
    assert [answer[0]["generated_text"] for answer in together] == alone
    answer = talk([{"role": "user", "content": "hi"}], **settings)[0]["generated_text"]
    assert answer[-1]["role"] == "assistant" and answer[0]["content"] == "hi"


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_peft_adapts_a_finished_model(tmp_path, targets):
    model, ids = student(), tokens(2, 20)
    before = model(ids).logits
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert not any("lizard" in name for name, p in adapted.named_parameters() if p.requires_grad)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # the first step moves B alone, which starts from zero
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()} == {".json", ".safetensors", ".md"}
    with torch.no_grad():
        after = adapted(input_ids=ids).logits
        assert not torch.allclose(before, after)
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, after)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(ids).logits, after, atol=1e-3)
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(ids).logits, merged(ids).logits)


def test_an_adapters_folder_loads_the_model_it_names(tmp_path):
    student().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(tokens(1, 9)).logits, adapted(tokens(1, 9)).logits)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "disk"])
def test_device_maps_change_nothing(tmp_path, device_map):
    model, ids = student(), tokens(2, 20)
    model.save_pretrained(tmp_path / "model")
    if device_map == "disk":
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = dict.fromkeys(parts, "cpu") | {f"model.layers.{i}": ("cpu", "disk", "disk")[i] for i in range(3)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generated(loaded, ids), generated(model, ids))


@torch.no_grad()
def test_layers_are_not_split_between_devices():
    from accelerate import cpu_offload, infer_auto_device_map

    model, ids = student(), tokens(2, 20)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - 3 * layer
    room = {0: rest // 2 + layer + layer // 2 + 1, "cpu": 10 * layer + rest}
    placed = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
    assert "cpu" in placed.values() and 0 in placed.values()
    assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in placed), placed
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


@torch.no_grad()
@NEEDS_TORCHAO
def test_torchao_quantises_the_projections_alone(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, ids = student().bfloat16(), tokens(2, 20)
    model.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
    )
    check_quantised(small, model, ids, "Int8Tensor")
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu")
    assert torch.equal(again(ids).logits, small(ids).logits)


@torch.no_grad()
@NEEDS_BNB
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantises_the_projections_alone(tmp_path, bits):
    ids, errors = tokens(2, 20), []
    for name, model in (("student", student(intermediate_size=128)), ("teacher", teacher(intermediate_size=128))):
        model.bfloat16().save_pretrained(tmp_path / name)
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), device_map="cpu"
        )
        errors.append(check_quantised(small, model, ids, {8: "Int8Params", 4: "Params4bit"}[bits]))
    assert errors[0] < 1.5 * errors[1]


def check_quantised(small, model, ids, kind: str) -> float:
    """The relative error of the logits, after a look at every parameter."""
    for (name, a), (_, b) in zip(small.named_parameters(), model.named_parameters(), strict=True):
        if ".lizard." in name:
            assert a.dtype == torch.float32 and torch.equal(a, b)
        elif "proj" in name:
            assert type(a).__name__ == kind, name
    assert generated(small, ids).shape == (2, 26)
    exact = model(ids).logits.float()
    error = ((small(ids).logits - exact).square().mean().sqrt() / exact.std()).item()
    assert 0 < error < 1
    return error


@torch.no_grad()
def test_torchs_own_int8_leaves_the_new_parameters_alone():
    model, ids = student(), tokens(2, 20)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert small.model.layers[0].self_attn.q_proj.weight().dtype == torch.qint8
    for (_, a), (_, b) in zip(small.lizard_parameters(), model.lizard_parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert generated(small, ids).shape == (2, 26)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = student().requires_grad_(True).train(), tokens(2, 20)
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementations_are_for_softmax_layers_and_the_teacher(tmp_path, name):
    model, ids = student(softmax_layers=(1,)), tokens(2, 20)
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert other.config._attn_implementation == name
    assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-3)
    for each in (model, other):
        each.set_attention_mode("teacher")
    assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-3)
    assert torch.allclose(other(ids).logits, teacher()(ids).logits, atol=1e-3)


def test_an_attention_implementation_that_is_not_there_is_refused():
    with pytest.raises((ImportError, ValueError), match="FlashAttention2|flash_attn"):
        student().set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match="nonsense"):
        student().set_attn_implementation("nonsense")


@torch.no_grad()
def test_the_forward_and_the_decode_step_export():
    model, prompt = student(num_hidden_layers=1), tokens(1, 12)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    whole = torch.export.export(Logits(), (prompt,), strict=False)
    assert torch.allclose(whole.module()(tokens(1, 12, seed=5)), model(tokens(1, 12, seed=5)).logits, atol=1e-5)

    cache = LizardCache(model.config)
    model(prompt, past_key_values=cache)
    step = torch.export.export(DecodeStep(model, cache), (tokens(1, 1), *state_tensors(cache)), strict=False)
    run = step.module()
    state = state_tensors(cache)
    for seed in range(10):  # past the window
        token = tokens(1, 1, seed=seed)
        logits, *state = run(token, *state)
        assert torch.allclose(logits, model(token, past_key_values=cache).logits, atol=1e-4)


class DecodeStep(torch.nn.Module):
    """One token with the state as plain tensors in and out: what ``torch.export`` can take."""

    def __init__(self, model, cache) -> None:
        super().__init__()
        self.model, self.cache = model, copy.deepcopy(cache)

    def forward(self, token, *state):
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        rest = list(state)
        for layer in cache.layers:
            fields = {name: rest.pop(0) for name in tensor_fields(layer.state)}
            layer.state = layer.state._replace(**fields)
        logits = self.model(token, past_key_values=cache).logits
        return logits, *state_tensors(cache)


def tensor_fields(state) -> list[str]:
    return [name for name in state._fields if isinstance(getattr(state, name), torch.Tensor)]


def state_tensors(cache) -> list[torch.Tensor]:
    return [getattr(layer.state, name).clone() for layer in cache.layers for name in tensor_fields(layer.state)]


def test_push_to_hub_sends_safetensors_and_the_runs_own_card(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    out = linearize_folder(tmp_path / "teacher", tmp_path / "out", LizardConfig.preset("plain"))
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    for text in ("preset `plain`: window 128", "untrained", "import lizard_models", f"torch {torch.__version__}"):
        assert text in card.text

    sent = {}

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    def create_commit(self, repo_id, operations, **kwargs):
        sent[repo_id] = sorted(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.push_to_hub("someone/my-lizard")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(sent["someone/my-lizard"])
    assert not any(name.endswith((".bin", ".py", ".pt")) for name in sent["someone/my-lizard"])


WITHOUT_IMPORT = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
import lizard_models
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_the_import_registers_the_classes_and_without_it_transformers_says_so(tmp_path):
    student().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert "model type `lizard_llama` but Transformers does not recognize this architecture" in done.stdout
    assert done.stdout.splitlines()[-1] == "LizardLlamaForCausalLM"


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""


def test_lm_evals_own_command_and_hf_model_read_a_folder(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    student(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = ['{"question": "the wind turns", "choices": [" the mill", " the tide"], "answer": 0}'] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mills.yaml").write_text(TASK.format(name="mills", data=tmp_path / "data.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", list(sys.argv))
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "mills"]
    arguments += ["--device", "cpu", "--batch_size", "2", "--include_path", str(tmp_path / "tasks")]
    result = CliRunner().invoke(app, ["with", "lm_eval", "run", *arguments])
    if importlib.util.find_spec("lm_eval") is None:
        assert result.exit_code == 2 and "module 'lm_eval' is not installed here: pip install it" in result.stderr
        return
    assert result.exit_code == 0, (result.output, result.exception)
    assert "|mills" in result.output.replace(" ", "")


def test_plans_that_cut_layers_are_refused(tmp_path):
    """But for the model's own, which splits heads: ``test_tensor_parallel.py``."""
    from transformers.distributed import DistributedConfig

    model = student(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    for asked, match in (
        ({"tp_plan": {"layers.*.self_attn.q_proj": "colwise"}}, "by a plan of its own"),
        ({"distributed_config": DistributedConfig(tp_size=2, tp_plan={"lm_head": "colwise"})}, "by a plan of its own"),
        ({"distributed_config": DistributedConfig(pp_size=2)}, "has no pipeline or expert parallel plan"),
        ({"distributed_config": dict(pp_size=2, tp_size=2)}, "has no pipeline or expert parallel plan"),
        ({"distributed_config": dict(ep_size=2)}, "has no pipeline or expert parallel plan"),
    ):
        for load in (AutoModelForCausalLM, type(model)):
            with pytest.raises(ValueError, match=match):
                load.from_pretrained(tmp_path, **asked)
    with pytest.raises(ValueError, match="has no tensor, pipeline or expert parallel plan"):
        type(model.model).from_pretrained(tmp_path, tp_size=2)
    assert model.supports_tp_plan and not model.supports_pp_plan


def test_configs_say_that_there_is_no_code_of_a_checkpoints_own(tmp_path):
    model = student(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    assert model.config.auto_map == {} and "auto_map" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.auto_map == {}
