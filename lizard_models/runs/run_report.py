"""A run's report: Markdown with plots, written at its end and at every stop, from ``log.jsonl`` alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from lizard_models.distill.log import LogFile
from lizard_models.distill.parallel import is_main_process
from lizard_models.files.folders import SUMS, sha256_of, write_whole
from lizard_models.files.sources import Say, expanded, silent
from lizard_models.runs.plan import work_folder
from lizard_models.runs.run_log import RUN, RunLog, StageLog, read_log
from lizard_models.runs.run_plot import draw_stage
from lizard_models.runs.work import LOG
from lizard_models.teachers.loading import TRAINING

REPORT = "run.md"
SHOWN = 40  # events in the table; of more, saved checkpoints are left out


def write_run_report(folder: Path, say: Say = silent) -> list[Path]:
    """Writes ``run.md`` and a plot for each stage into a folder with ``log.jsonl``. Returns the files.

    folder: a finished model, the work of a run, or where the model of an unfinished run is to be. Each file is the old
    one or the new one; the sums of a finished model are kept right. Without matplotlib there are no plots, and ``say``
    hears of it. Raises ValueError for a folder without a log.
    """
    folder = expanded(folder, "report")
    if not (folder / LOG).is_file() and folder.name not in ("", "..") and (work_folder(folder) / LOG).is_file():
        folder = work_folder(folder)
    if not folder.is_dir():
        raise ValueError(f"report: {str(folder)!r} is no folder; give the folder of a run, or of its model")
    if not (folder / LOG).is_file():
        raise ValueError(f"report: {str(folder)!r} has no {LOG}; give the folder of a run, or of its model")
    log = read_log(folder / LOG)
    written = []
    plots = _plots(log, say)
    for name, text in plots.values():
        write_whole(folder / name, text)
        written.append(folder / name)
    text = told(log, {title: name for title, (name, _) in plots.items()}, (folder / TRAINING).is_file())
    write_whole(folder / REPORT, text)
    written.append(folder / REPORT)
    _renew_sums(folder, written)
    return written


def report_stop(folder: Path, error: BaseException, say: Say) -> None:
    """Logs why a run stops, and writes its report if it has logged anything. What the disk refuses is said."""
    if not is_main_process() or not (folder / LOG).is_file():
        return
    what = " ".join(str(error).split()) or "stopped by a signal"
    LogFile(folder / LOG, RUN).write(event="stopped", why=what)
    try:
        say(f"report: {write_run_report(folder, say)[-1]}")
    except OSError as refused:
        say(f"note: there is no report, its file cannot be written ({refused.strerror or refused})")
    except Exception as broken:  # why the run stops counts more: a signal may have left a library imported in part
        say(f"note: there is no report ({type(broken).__name__}: {broken}); lizard-attn report {folder} writes it")


def _plots(log: RunLog, say: Say) -> dict[str, tuple[str, str]]:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        say("no plot is drawn, matplotlib is missing: pip install 'lizard-attn[demo]'")
        return {}
    drawn: dict[str, tuple[str, str]] = {}
    for stage in log.stages:
        if text := draw_stage(stage):
            slug = re.sub(r"\W+", "-", stage.title.partition(",")[0].strip(), flags=re.ASCII).strip("-") or "stage"
            taken = {name for name, _ in drawn.values()}
            name = f"run-{slug}.svg" if f"run-{slug}.svg" not in taken else f"run-{slug}-{len(drawn)}.svg"
            drawn[stage.title] = (name, text)
    return drawn


def told(log: RunLog, plots: dict[str, str], finished: bool) -> str:
    """The report as Markdown. plots: file of a stage's plot by its title."""
    state = "finished" if finished else f"stopped: {log.stopped}" if log.stopped else "running, or killed"
    parts = ["# The run", f"State: {state}. Written from `{LOG}`; `lizard-attn report FOLDER` writes it again."]
    if log.unread:
        parts.append(f"{log.unread} lines of the log cannot be read, such as one that a kill has cut.")
    parts += [_summary(log)] if any(stage.entries for stage in log.stages) else []
    for stage in log.stages:
        parts.append(f"## {stage.title}")
        if stage.title in plots:
            parts.append(f"![{stage.title}]({plots[stage.title]})")
        if readings := stage.latest(stage.readings):
            parts.append(_layers(readings))
        if stage.events:
            parts.append(_events(stage))
    return "\n\n".join(parts) + "\n"


def _summary(log: RunLog) -> str:
    head = ("stage", "step", "loss at first", "lowest", "at last", "gradient norm", "tokens/s", "model-flops use",
            "memory", "seconds")  # fmt: skip
    rows = []
    for stage in log.stages:
        entries = stage.latest(stage.entries)
        if not entries:
            continue
        losses = [entry["loss"] for entry in entries]
        steps = max((e["steps"] for e in stage.events if isinstance(e.get("steps"), int)), default=0)
        sizes = [max(e.get("cuda_bytes", 0), 0) or e.get("resident_bytes", 0) for e in entries]
        rows.append(
            (
                stage.title,
                f"{entries[-1]['step']}" + (f" of {steps}" if steps else ""),
                *(f"{loss:.4g}" for loss in (losses[0], min(losses), losses[-1])),
                _middle(entries, "grad_norm", "{:.3g}"),
                _middle(entries, "tokens_per_second", "{:,.0f}"),
                _middle(entries, "model_flops_use", "{:.1%}"),
                f"{max(sizes) / 2**30:.2f} GiB" if any(sizes) else "",
                f"{entries[-1].get('seconds', 0):.0f}",
            )
        )
    note = "Gradient norm, tokens/s and model-flops use are medians; memory is the most, of a GPU if there is one."
    return f"{table(head, rows)}\n\n{note} Seconds are of the last process."


def _middle(entries: list[dict[str, Any]], name: str, form: str) -> str:
    values = [entry[name] for entry in entries if name in entry]
    return form.format(median(values)) if values else ""


def _layers(readings: list[dict[str, Any]]) -> str:
    first, last = readings[0], readings[-1]
    before = dict(zip(first["layers"], first["error"], strict=True))
    rows = []
    for place, layer in enumerate(last["layers"]):
        memory, share = last["memory"][place], last["linear_share"][place]
        saturated = last["saturated"][place]
        rows.append(
            (
                f"{layer}",
                f"{before[layer]:.4f}" if layer in before else "",
                f"{last['error'][place]:.4f}",
                f"{median(memory):,.1f}" if memory else "",
                f"{min(memory):,.1f} to {max(memory):,.1f}" if memory else "",
                f"{saturated:.1%}" if saturated is not None else "",
                f"{mean(share):.1%}" if share else "",
                f"{min(share):.1%} to {max(share):.1%}" if share else "",
            )
        )
    head = ("layer", f"error at step {first['step']}", f"at {last['step']}", "memory, median head", "its heads",
            "gates above 0.999", "linear share", "its heads")  # fmt: skip
    return f"{table(head, rows)}\n\nMemory is 1 / (1 - gate) in tokens."


def _events(stage: StageLog) -> str:
    events = stage.events
    if len(events) > SHOWN:
        saved = sum(e["event"] == "saved" for e in events)
        events = [e for e in events if e["event"] != "saved"][-SHOWN:]
        events = [{"event": f"saved {saved} times", "step": ""}, *events]
    rows = []
    for event in events:
        rest = {k: v for k, v in event.items() if k not in ("stage", "event", "step", "time")}
        said = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
        rows.append((str(event.get("time", "")), str(event["step"]), str(event["event"]), said))
    return table(("time", "step", "what", ""), rows)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; bars within its cells are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in line) + " |" for line in lines)


def _renew_sums(folder: Path, written: list[Path]) -> None:
    """Puts the sums of the report into those of a finished model; what else they say stays."""
    sums = folder / SUMS
    if not sums.is_file():
        return
    names = {path.name for path in written}
    kept = [line for line in sums.read_text(errors="replace").splitlines() if line.partition("  ")[2] not in names]
    lines = [*kept, *(f"{sha256_of(path)}  {path.name}" for path in written)]
    write_whole(sums, "".join(f"{line}\n" for line in sorted(lines, key=lambda line: line.partition("  ")[2])))
