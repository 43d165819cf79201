"""Requests recorded, scored elsewhere and answered: the same numbers as lm-eval's own model gives."""

import numpy as np
import pytest
from tiny import student, teacher

from lizard_models.evaluation.requests import Requests, Scores, score


def test_requests_keep_distinct_pairs_and_score_like_a_plain_forward(tmp_path):
    import torch

    pairs = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([5, 6, 7], [8, 9]), ([4], [3, 2, 6, 7]), ([9, 8, 7], [6, 5, 4])]
    requests = Requests.from_pairs(pairs)
    assert len(requests) == 4 and requests.contexts.dtype == np.uint16
    requests.save(tmp_path / "r.xz")
    read = Requests.load(tmp_path / "r.xz")
    assert read.digest == requests.digest
    with pytest.raises(ValueError, match="must have at least one token"):
        Requests.from_pairs([([], [1])])
    (tmp_path / "bad").write_text("nothing")
    with pytest.raises(ValueError, match="not a file of `bench quality requests`"):
        Requests.load(tmp_path / "bad")
    for model in (teacher(), student(window=2)):
        found = score(model, read, batch_tokens=8)
        found.save(tmp_path / "s.npz")
        found = Scores.load(tmp_path / "s.npz")
        for i in range(len(read)):
            context, wanted = read.context(read.context_of[i]).tolist(), read.continuation(i).tolist()
            with torch.no_grad():
                logits = model(torch.tensor([context + wanted])).logits[0, len(context) - 1 : -1]
            log = torch.log_softmax(logits, -1)[range(len(wanted)), wanted]
            assert found.log_likelihoods[i] == pytest.approx(log.sum().item(), rel=1e-4)
            assert found.greedy[i] == (logits.argmax(-1).tolist() == wanted)
