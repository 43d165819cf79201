"""transformers' tensor parallelism in two processes: the logits and the text of the whole model."""

import multiprocessing
import os
import socket

import pytest
import torch
from tiny import student, tokens
from transformers import AutoModelForCausalLM

from lizard_models import PrefixStates, save_state

pytest.importorskip("transformers.distributed.tensor_parallel")
KINDS = {
    "plain": dict(attention=dict(gate="channel", num_sinks=2, sinks_per_head=True)),
    "kept keys, tied": dict(family="smollm3", attention=dict(kept_keys=[3, 1], score_dim=8), tie_word_embeddings=True),
    "kept softmax": dict(family="qwen3", softmax_layers=[1]),
}


@torch.no_grad()
def answers(model):
    """Logits of a text in pieces, and what the model writes after it."""
    ids, cache = tokens(2, 30), model.new_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([19, 1, 10], 1)]
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    return torch.cat(parts, 1), text


def one_rank(rank, folder, port):
    """What torchrun would start, in a copy of this process: its imports are done."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    from transformers.distributed import DistributedConfig

    found = {}
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(folder / kind, distributed_config=DistributedConfig(tp_size=2))
        found[kind] = *answers(model.double()), sum(p.to_local().numel() for p in cut(model))
        if kind == "plain":
            found["refused"] = refused(model)
            model.save_pretrained(folder / "again")
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # pytest is this process's parent, not its caller


def cut(model):
    return [p for name, p in model.named_parameters() if "lizard" in name]


def refused(model):
    said = []
    with torch.no_grad():
        cache = model(tokens(1, 5)).past_key_values
    for attempt in (
        lambda: save_state("nowhere", model, cache),
        lambda: model.generate(tokens(1, 5), prefix_states=PrefixStates(), max_new_tokens=1),
        lambda: model(tokens(1, 5)),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    for kind, choices in KINDS.items():
        student(**dict(num_hidden_layers=2) | choices).save_pretrained(folder / kind)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=one_rank, args=(rank, folder, port)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_what_one_gives(ranks, kind):
    folder, found = ranks
    model = AutoModelForCausalLM.from_pretrained(folder / kind).double()
    logits, text = answers(model)
    whole = sum(p.numel() for p in cut(model))
    for rank in found:
        torch.testing.assert_close(rank[kind][0], logits, rtol=1e-9, atol=1e-9)
        assert torch.equal(rank[kind][1], text)
        assert rank[kind][2] < 0.8 * whole  # few parameters have no heads


def test_what_a_part_of_a_state_cannot_do_is_refused(ranks):
    for said in ranks[1]:
        for text, wanted in zip(
            said["refused"], ("save_state: not with", "prefix_states: not with", "for inference"), strict=True
        ):
            assert wanted in text


def test_a_split_model_is_saved_whole(ranks):
    folder = ranks[0]
    again, first = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("again", "plain"))
    for (name, a), b in zip(again.named_parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), msg=name)
