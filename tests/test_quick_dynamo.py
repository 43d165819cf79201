"""The shortened tracer of tests/quick_dynamo.py finds the graphs that torch.compile finds as it comes."""

import quick_dynamo
import torch

from lizard_ops import chunk_gated_attn


def graph_of(q, k, v, g):
    found = []

    def backend(graph, _):
        found.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    o = torch.compile(lambda *x: chunk_gated_attn(*x)[0], fullgraph=True, backend=backend)(q, k, v, g)
    assert len(found) == 1
    return found[0], o


def test_graphs_are_those_of_the_whole_tracer(monkeypatch):
    q, k, v = (torch.rand(1, 9, 2, 4) for _ in range(3))
    quick, o = graph_of(q, k, v, -torch.rand(1, 9, 2))
    assert quick_dynamo.REPLACED
    for owner, name, value in quick_dynamo.REPLACED:
        monkeypatch.setattr(owner, name, value)
    whole, wanted = graph_of(q, k, v, -torch.rand(1, 9, 2))
    assert quick == whole and o.shape == wanted.shape
