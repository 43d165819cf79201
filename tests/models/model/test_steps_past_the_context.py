"""Steps past the teacher's context, where anchors have moved on: hardly dearer than before, right with padding."""

from collections import Counter

import pytest
import torch
from tape import TapeRecorder
from tiny import student, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.no_launch import without_kernels
from lizard_models.model import decode_graph
from lizard_models.model.decode_graph import kind_of_step
from lizard_models.model.layer_configs import lizard_config

LIMIT = 24
CLAMPED = {"positions": "clamped", "position_limit": LIMIT, "position_step": 10}
DROPPED = {"kept_past": "dropped", "coverage": "left"}
KERNELS = {"where", "copy_", "gather", "max", "eq", "ge", "lt", "bitwise_and", "clone", "index", "index_put_",
           "masked_fill", "masked_fill_"}  # fmt: skip


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step_costs(layers, seen, **choices):
    """(launches by name, operators that write by name) of a step after so many tokens."""
    model = student(num_hidden_layers=layers, attention=CLAMPED | choices).bfloat16()
    ids = tokens(2, seen + 1)
    with torch.no_grad(), without_kernels() as launches:
        cache = model(ids[:, :seen], use_cache=True).past_key_values
        launches.by_name.clear()
        with Operators() as operators:
            at = torch.full((2, 1), seen)
            model(ids[:, -1:], position_ids=at, past_key_values=cache, use_cache=True)
    return Counter(launches.by_name), Counter({n: c for n, c in operators.found.items() if n in KERNELS})


@pytest.mark.parametrize(
    ("choices", "more"),
    [
        ({"kept_keys": 0}, {}),
        ({"kept_keys": 5}, {"clone": 1, "eq": 1, "where": 1, "copy_": 1}),
        (DROPPED | {"kept_keys": 5}, {"lt": 1, "masked_fill_": 2}),
    ],
)
def test_a_layer_past_the_context_turns_its_anchors_and_copies_no_state(choices, more):
    """Of a layer: one launch more, for the anchors, and one for the kept keys with four operators on them, or three
    operators that drop them."""
    found = []
    for seen in (LIMIT - 4, LIMIT + 4):
        one, three = (step_costs(layers, seen, **choices) for layers in (1, 3))
        found.append([{name: (b[name] - a[name]) / 2 for name in a | b} for a, b in zip(one, three, strict=True)])
    before, after = found
    changed = [{n: b.get(n, 0) - a.get(n, 0) for n in a | b} for a, b in zip(before, after, strict=True)]
    launches, operators = ({n: c for n, c in kinds.items() if c} for kinds in changed)
    assert launches == {"turn_kernel": 1} | ({"steps_kernel": 1} if "clone" in more else {})
    assert operators == more


@pytest.mark.parametrize("choices", [{"kept_keys": 0}, {"kept_keys": 5}, DROPPED | {"kept_keys": 5}])
@pytest.mark.parametrize("graph", [False, True])
def test_a_row_of_padding_fills_its_anchors_while_others_have_moved_on(choices, graph, monkeypatch):
    """Beside a text past the context, one of two tokens writes what it writes alone, also from a graph that served
    texts without padding before."""
    recorder = TapeRecorder()
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: recorder if graph else None)
    model, ids = student(num_hidden_layers=2, attention=CLAMPED | choices), tokens(2, LIMIT + 6)
    assert lizard_config(model.config).attention.anchors > 2

    def written(given, **options):
        """(ids, logits of each token), from a cache of the model's own."""
        seen = []
        keep = lambda _, scores: seen.append(scores.clone()) or scores  # noqa: E731
        found = model.generate(given, max_new_tokens=12, do_sample=False, logits_processor=[keep], **options)
        return found[:, -12:], torch.stack(seen, 1)

    written(ids)
    mask = torch.ones_like(ids)
    mask[0, :-2] = 0
    both, scores = written(ids, attention_mask=mask)
    assert len(recorder.tapes) == (2 if graph else 0)
    for row, alone in enumerate((ids[:1, -2:], ids[1:])):
        wanted, wanted_scores = written(alone, decode_graph=False)
        assert torch.equal(both[row], wanted[0])
        torch.testing.assert_close(scores[row], wanted_scores[0], rtol=1e-4, atol=1e-4)


def test_kinds_of_steps():
    model = student(num_hidden_layers=1, attention=CLAMPED)
    cache = model(tokens(1, LIMIT - 1), use_cache=True).past_key_values
    assert kind_of_step(model.model, cache) == "before"
    model(tokens(1, 1), past_key_values=cache, use_cache=True)
    assert kind_of_step(model.model, cache) == "after"
    cache.padded = True
    assert kind_of_step(model.model, cache) == "after padding"
    fixed = student(num_hidden_layers=1, attention={"positions": "true"})
    cache = fixed(tokens(1, LIMIT + 1), use_cache=True).past_key_values
    assert kind_of_step(fixed.model, cache) == "before"
