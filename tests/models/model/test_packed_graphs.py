"""Packed rows under torch.compile and torch.export: right, or a failure that says so."""

import warnings

import pytest
import torch
from tiny import student, tokens

ENDS = (0, 12, 20)
POSITIONS = torch.cat([torch.arange(12), torch.arange(8)])[None]
FORMS = {
    "position ids": dict(position_ids=POSITIONS),
    "and a mask": dict(position_ids=POSITIONS, attention_mask=torch.ones(1, 20, dtype=torch.long)),
    "boundaries": dict(cu_seq_lens_q=torch.tensor(ENDS, dtype=torch.int32)),
    "seq_idx": dict(seq_idx=torch.tensor([[0] * 12 + [1] * 8], dtype=torch.int32)),
}
PACKED = "position_ids.* restart within a row"


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()


def compiled(model, backend="eager", **options):
    return torch.compile(model, backend=backend, **options)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_fails_on_packed_texts(form):
    model, ids = student(num_hidden_layers=1), tokens(1, 20)
    with pytest.raises(RuntimeError, match=PACKED):
        compiled(model, fullgraph=True)(ids, use_cache=False, **FORMS[form])


@torch.no_grad()
def test_packed_texts_and_a_cache_fail_in_a_graph_too():
    model, ids = student(num_hidden_layers=1), tokens(1, 20)
    with pytest.raises(RuntimeError, match=PACKED):
        compiled(model)(ids, past_key_values=model.new_cache(), position_ids=POSITIONS)


@torch.no_grad()
def test_one_graph_reads_padded_rows_with_their_positions():
    model, ids = student(num_hidden_layers=1), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 15:] = 0
    forward = compiled(model, fullgraph=True)
    for positions in (mask.cumsum(1) - 1, (mask.cumsum(1) - 1).clamp(min=0)):  # as generate and a forward count
        given = dict(attention_mask=mask, position_ids=positions, use_cache=False)
        torch.testing.assert_close(forward(ids, **given).logits, model(ids, **given).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_export_reads_one_text_and_fails_on_packed_ones():
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = student(num_hidden_layers=1)

        def forward(self, ids, positions):
            return self.model(ids, position_ids=positions, use_cache=False).logits

    ids, positions, logits = tokens(1, 20), torch.arange(20)[None], Logits()
    exported = torch.export.export(logits, (ids, positions), strict=False).module()
    torch.testing.assert_close(exported(ids, positions), logits(ids, positions), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=PACKED):
        exported(ids, POSITIONS)


def test_a_compiled_forward_reads_and_trains_on_packed_texts_apart():
    """By their positions, with a loss, and by their numbers, in what it has compiled for those."""
    model, ids, gradients = student(num_hidden_layers=1).train().requires_grad_(True), tokens(1, 20), []
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in zip(ENDS, ENDS[1:], strict=False)], 1)
    forward = compiled(model, backend="aot_eager")
    for read in (forward, model):
        model.zero_grad()
        out = read(ids, position_ids=POSITIONS, labels=ids)
        torch.testing.assert_close(out.logits, alone, rtol=1e-4, atol=1e-4)
        out.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(ids, **FORMS["seq_idx"]).logits, alone, rtol=1e-4, atol=1e-4)


def test_a_jit_trace_refuses_packed_rows():
    class Logits(torch.nn.Module):
        def forward(self, ids, positions):
            return model(ids, position_ids=positions, use_cache=False, return_dict=False)[0]

    model, ids = student(num_hidden_layers=1), tokens(1, 12)
    one, two = torch.arange(12)[None], torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(ValueError, match="position_ids: got 2 texts in 1 rows, wanted one a row under torch.jit.trace"):
        torch.jit.trace(Logits(), (ids, two))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(Logits(), (ids, one), check_trace=False)
    assert torch.equal(traced(ids, one), Logits()(ids, one))
    with pytest.raises(RuntimeError, match="restart within a row"):
        traced(ids, two)
