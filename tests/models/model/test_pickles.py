"""A model as a whole in a pickle, a copy, and another process."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import FAMILIES, student, tokens

from lizard_models.model.positions import FarRotary


def saved_and_loaded(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": saved_and_loaded, "deepcopy": copy.deepcopy}


@torch.no_grad()
@pytest.mark.parametrize("form", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copied_model_is_the_same_model(family, form):
    model, ids = student(family=family), tokens(1, 20)
    positions = torch.arange(300, 320)[None]  # past the teacher's context
    wanted = model(ids).logits, model(ids, position_ids=positions).logits
    for part in (model, model.model):
        again = COPIES[form](part)
        assert type(again) is type(part)
        with_rope = getattr(again, "model", again)
        assert isinstance(with_rope.rotary_emb, FarRotary) and type(with_rope.rotary_emb) is type(
            model.model.rotary_emb
        )
        if part is model:
            assert torch.equal(again(ids).logits, wanted[0])
            assert torch.equal(again(ids, position_ids=positions).logits, wanted[1])
            again.set_attention_mode("teacher")
            assert model.mode == "student"


@pytest.mark.parametrize("form", COPIES)
def test_a_model_that_distils_is_copied_without_its_losses(form):
    model, ids = student(num_hidden_layers=1).requires_grad_(True), tokens(1, 20)
    model.set_attention_mode("distill")
    model(ids)
    again = COPIES[form](model)
    with pytest.raises(ValueError, match="no losses of layers"):
        again.layer_losses()
    assert torch.equal(again(ids).loss, model(ids).loss) and model.layer_losses().shape == (1,)


def test_another_process_reads_the_pickle(tmp_path):
    model, ids = student(num_hidden_layers=1), tokens(1, 20)
    torch.save((model, ids, model(ids).logits), tmp_path / "model.pt")
    program = (
        "import torch, sys; m, ids, logits = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(m(ids).logits, logits); print(type(m).__name__)"
    )
    read = subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], capture_output=True, text=True)
    assert read.stdout.strip() == "LizardLlamaForCausalLM", read.stderr


@torch.no_grad()
@pytest.mark.parametrize("kept", [(), (1,)])
def test_a_cache_is_pickled_but_not_while_it_records(kept):
    model, ids = student(softmax_layers=kept), tokens(1, 20)
    cache = model(ids[:, :15]).past_key_values
    again = pickle.loads(pickle.dumps(cache))
    wanted = model(ids[:, 15:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 15:], past_key_values=again).logits, wanted) and again.get_seq_length() == 20
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="records its past cannot be pickled"):
        pickle.dumps(cache)
