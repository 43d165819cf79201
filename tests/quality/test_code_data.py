"""Source as data: licences, copies, whole projects held out, the same bytes for the same input."""

import json
from email.message import Message

import numpy as np
import pytest
from readable import byte_tokenizer

from benchmarks.quality.code_data import (
    CodePlan,
    Project,
    SourceFile,
    held_out_names,
    installed_projects,
    permissive_licence,
    without_copies,
    write_code_data,
)
from lizard_models.text.sequences import load_documents, load_sequences


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"License-Expression": "Apache-2.0 OR BSD-2-Clause"}, True),
        ({"License-Expression": "BSD-3-Clause AND 0BSD AND (MIT OR Zlib)"}, True),
        ({"License-Expression": "MPL-2.0 AND MIT"}, False),
        ({"License-Expression": "GPL-3.0-only", "Classifier": "License :: OSI Approved :: MIT License"}, False),
        ({"Classifier": "License :: OSI Approved :: BSD License", "License": "a long text\nwith lines"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General Public License v3"}, False),
        ({"License": "Apache 2.0"}, True),
        ({"License": "MIT, except where it is not"}, False),
        ({}, False),
    ],
)
def test_only_permissive_licences_are_taken(fields, taken):
    metadata = Message()
    for name, value in fields.items():
        metadata[name] = value
    assert (permissive_licence(metadata) is not None) == taken


def lines(kind: str, count: int = 40) -> str:
    return "".join(f"    {kind}_{i} = compute({i}, {kind!r})\n\n" for i in range(count))


def test_copies_are_left_out_and_what_quotes_a_little_is_not():
    files = [
        SourceFile("a", "one.py", lines("x") + lines("y")),
        SourceFile("b", "same.py", lines("x") + lines("y")),
        SourceFile("b", "indented.py", (lines("x") + lines("y")).replace("    ", "\t").replace("\n\n", "\n")),
        SourceFile("c", "quotes.py", lines("z", 120) + lines("x")),
        SourceFile("c", "mostly.py", lines("x") + lines("y") + lines("w", 20)),
        SourceFile("d", "short.py", "import a\n" * 3),
        SourceFile("d", "short_too.py", "import a\n" * 3),
    ]
    assert [file.path for file in without_copies(files)] == ["one.py", "quotes.py", "short.py"]


def test_projects_are_held_out_whole():
    sizes = {f"p{i}": 10 * i for i in range(1, 41)}
    held = held_out_names(sizes, 0.1, seed=0)
    assert 0.05 * sum(sizes.values()) < sum(sizes[name] for name in held) <= 0.1 * sum(sizes.values())
    assert held == held_out_names(dict(reversed(sizes.items())), 0.1, seed=0) != held_out_names(sizes, 0.1, seed=1)
    with pytest.raises(ValueError, match="held_out=0.001: 0 of 40 projects fit"):
        held_out_names(sizes, 0.001, seed=0)


@pytest.fixture
def projects(tmp_path):
    made = []
    for name in "abcdefgh":
        folder = tmp_path / name
        folder.mkdir()
        texts = {f"{name}/m{i}.py": f"# {name} {i} é\n" + lines(f"{name}{i}") for i in range(3)}
        texts[f"{name}/vendored.py"] = lines("vendored")  # in every project
        for i, text in enumerate(texts.values()):
            (folder / f"{i}.py").write_text(text)
        made.append(Project(name, "1.0", "MIT", {path: folder / f"{i}.py" for i, path in enumerate(texts)}))
    (tmp_path / "a" / "0.py").write_bytes(b"\xff\xfe" * 400)  # no UTF-8
    return made


def test_ids_are_those_of_the_files_and_the_same_again(projects, tmp_path):
    tokenizer, plan = byte_tokenizer(), CodePlan(held_out=0.3, look_ups=6, look_up_length=1024)
    told = write_code_data(tmp_path / "one", projects, tokenizer, plan)
    again = write_code_data(tmp_path / "two", list(reversed(projects)), tokenizer, plan)
    assert told["sha256"] == again["sha256"] and len(told["sha256"]) == 3 + sum(
        part["part"] == "held out" for part in told["projects"]
    )
    held = [part["name"] for part in told["projects"] if part["part"] == "held out"]
    assert 0 < len(held) < 4

    ids = np.load(tmp_path / "one" / "train.npy")
    assert ids.dtype == np.uint32 and ids[-1] == 2
    texts = [tokenizer.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == 2) + 1) if len(part)]
    names = {text.split()[1] for text in texts if text.startswith("# ")}
    assert names == set("abcdefgh") - set(held) and not any("vendored" in text for text in texts)
    first = (tmp_path / "one" / "held_out" / f"{held[0]}.npy").resolve()
    whole = tokenizer.decode(np.load(first).tolist())
    assert whole.startswith(f"# {held[0]}/{held[0]}/m") and whole.index("/m1.py") < whole.index("/m2.py")
    records = [json.loads(line) for line in (tmp_path / "one" / "held_out.jsonl").read_text().splitlines()]
    assert {record["project"] for record in records} == set(held)
    assert sum("vendored" in record["path"] for record in records) == 1  # what is held out keeps the first copy
    rows = np.load(tmp_path / "one" / "look_ups.npy")
    assert rows.shape == (6, 1024) and rows.dtype == np.uint32

    begins = byte_tokenizer(around="<s> $A")  # which begins every file
    cut = write_code_data(tmp_path / "cut", projects, begins, CodePlan(held_out=0.3, tokens=5000))
    begun = np.load(tmp_path / "cut" / "train.npy")
    assert cut["tokens"]["train"] == len(begun) == 5000 and np.load(tmp_path / "cut" / "held_out" / first.name)[0] == 1
    assert (begun[np.flatnonzero(begun[:-1] == 2) + 1] == 1).all() and begun[0] == 1 and (begun == 1).sum() > 2
    assert np.array_equal(begun[begun != 1], ids[: 5000 - (begun == 1).sum()])
    assert len(load_sequences([str(tmp_path / "cut" / "train.npy")], None, 512, vocab_size=259)) == 9
    assert load_documents([str(first)], None, 1000, count=1, vocab_size=259).tokens.shape == (1, 1000)


def test_the_machine_has_source_under_permissive_licences():
    found = {project.name: project for project in installed_projects()}
    assert {"python", "numpy", "torch"} <= found.keys() and not {"lizard-attn", "certifi", "tqdm"} & found.keys()
    assert any(path.endswith("argparse.py") for path in found["python"].files)
    assert not any("site-packages" in path for path in found["python"].files)
