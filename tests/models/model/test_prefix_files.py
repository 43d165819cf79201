"""Prefixes on disk: many processes, one of them killed, damaged files, a bound on the bytes."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from tiny import student, tokens

from lizard_models import PrefixStates
from lizard_models.model.prefix.files import Damaged, PrefixFiles
from lizard_models.model.prefix.store import digests_of

GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
FORK = multiprocessing.get_context("fork")


def written(model, ids, **settings):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | settings)


def files_in(folder) -> list:
    return sorted(folder.glob("*/*.prefix"))


@torch.no_grad()
def test_another_process_goes_on_from_the_folder(tmp_path):
    model, text = student(softmax_layers=[1]), tokens(1, 30)
    expected = written(model, text)
    for process in range(3):  # each with a store of its own
        store = PrefixStates(folder=tmp_path)
        torch.testing.assert_close(written(model, text, prefix_states=store), expected, rtol=0, atol=0)
        assert store.counts.read_tokens == (1 if process else 30)
        assert store.counts.from_disk == (1 if process else 0)
    only_disk = PrefixStates(0, folder=tmp_path)
    written(model, text, prefix_states=only_disk)
    assert only_disk.counts.found_tokens == 29 and only_disk.nbytes() == 0
    assert sum(path.stat().st_size for path in files_in(tmp_path)) == store.files.size()
    store.clear()
    assert not files_in(tmp_path)


def damage(path, way: str) -> None:
    data = bytearray(path.read_bytes())
    if way == "cut":
        data = data[: len(data) // 2]
    elif way == "empty":
        data = bytearray()
    elif way == "noise":
        data = bytearray(random.Random(0).randbytes(len(data)))
    else:
        data[{"first": 9, "middle": len(data) // 2, "last": -1}[way]] ^= 16
    path.write_bytes(data)


@torch.no_grad()
@pytest.mark.parametrize("way", ["first", "middle", "last", "cut", "empty", "noise"])
def test_a_damaged_file_is_deleted_and_the_text_read_again(tmp_path, way):
    model, text = student(num_hidden_layers=1), tokens(1, 30)
    expected = written(model, text, prefix_states=PrefixStates(folder=tmp_path))
    for path in files_in(tmp_path):
        damage(path, way)
    store = PrefixStates(folder=tmp_path)
    torch.testing.assert_close(written(model, text, prefix_states=store), expected, rtol=0, atol=0)
    assert store.counts.damaged == 1 and store.counts.read_tokens == 30
    again = PrefixStates(folder=tmp_path)
    written(model, text, prefix_states=again)
    assert again.counts.damaged == 0 and again.counts.read_tokens == 1  # written anew


@torch.no_grad()
def test_a_file_under_another_name_is_not_used(tmp_path):
    """Its tokens and its model are in it: a copy to another text's or model's name is refused."""
    model, other, text, new = (
        student(num_hidden_layers=1),
        student(num_hidden_layers=1, seed=3),
        *tokens(2, 30)[:, None],
    )
    for which, ids in ((model, text), (model, new), (other, text)):
        written(which, ids, prefix_states=PrefixStates(folder=tmp_path))
    paths = {path: path.read_bytes() for path in files_in(tmp_path)}
    assert len(paths) == 6
    for path in paths:  # every file holds another's state of the same length
        length = path.name.partition("-")[0]
        same = [held for other, held in paths.items() if other != path and other.name.startswith(length)]
        for held in same:
            path.write_bytes(held)
            for which, ids in ((model, text), (model, new), (other, text)):
                expected = written(which, ids)
                found = written(which, ids, prefix_states=PrefixStates(folder=tmp_path))
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
        path.write_bytes(paths[path])


def a_state(n: int, length: int = 4000) -> tuple[torch.Tensor, dict]:
    ids = torch.full((20,), n)
    return ids, {"layers.0.s": torch.full((length,), float(n)), "layers.0.z": torch.arange(7)}


def work(folder, seed: int, bound: int, seconds: float) -> None:
    """Writes and reads states until it is told to stop; exits with 1 where one is not what it should be."""
    files, draw, end = PrefixFiles(folder, bound), random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        ids, tensors = a_state(draw.randrange(12))
        digest = digests_of(ids, (20,))[20]
        try:
            found = files.read("model", digest, ids)
        except Damaged:
            os._exit(2)
        if found is not None and any(not torch.equal(t, tensors[name]) for name, t in found.items()):
            os._exit(1)
        if found is None or draw.random() < 0.2:
            files.write("model", digest, ids, tensors)
        if files.size() > bound:
            os._exit(3)
    os._exit(0)


def test_processes_that_share_a_folder_and_are_killed(tmp_path):
    """The bytes stay bounded at every moment, and nobody reads half of a file or another's."""
    bound = 6 * 18_000
    workers = [FORK.Process(target=work, args=(tmp_path, seed, bound, 1.0)) for seed in range(4)]
    for worker in workers:
        worker.start()
    draw, killed, begun = random.Random(5), 0, 0
    while killed < 10:
        time.sleep(0.1)
        victim = draw.randrange(4)
        if workers[victim].exitcode is None:
            os.kill(workers[victim].pid, signal.SIGKILL)
            workers[victim].join()
            killed += 1
        else:  # on a slow machine it ended in time
            assert workers[victim].exitcode == 0
        begun += 1
        workers[victim] = FORK.Process(target=work, args=(tmp_path, 100 + begun, bound, 1.0))
        workers[victim].start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 0 < PrefixFiles(tmp_path, bound).size() <= bound


def test_the_oldest_use_goes_first_and_what_is_too_large_stays_out(tmp_path):
    files = PrefixFiles(tmp_path, 3 * 21_000)
    for n in (0, 1, 2):
        ids, tensors = a_state(n)
        assert files.write("model", str(n), ids, tensors)
        time.sleep(0.01)
    assert files.read("model", "0", a_state(0)[0]) is not None  # used: 1 is the oldest now
    assert files.write("model", "3", *a_state(3))
    assert [files.read("model", str(n), a_state(n)[0]) is not None for n in range(4)] == [True, False, True, True]
    assert not files.write("model", "4", *a_state(4, length=20_000))
    assert files.lengths("model") == {20} and files.lengths("other") == set()
    (tmp_path / "model" / "partial").write_bytes(b"x" * 1000)  # a writer died here
    assert files.write("model", "5", *a_state(5))
    assert not (tmp_path / "model" / "partial").exists()
    shutil.rmtree(tmp_path / "model")
    assert files.read("model", "3", a_state(3)[0]) is None and files.write("model", "6", *a_state(6))


def test_a_system_without_locks_gets_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("lizard_models.model.prefix.files.fcntl", None)
    with pytest.raises(ValueError, match="folder: this system has no fcntl"):
        PrefixStates(folder=tmp_path)
