"""What ``recommended`` is meant to reach, beside what the rows show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.quality.results import Record, Results, markdown
from benchmarks.quality.rows import ROWS
from benchmarks.quality.rows.spec import SPACED

TASKS = {"piqa": "acc_norm", "hellaswag": "acc_norm", "arc_easy": "acc", "lambada_openai": "acc"}
Goal = tuple[str, str, str, bool]  # goal, wanted, measured, whether it is met


def goals(results: Results) -> str:
    """A Markdown table of the goals that were measured in one budget, "" where none was."""
    rows = [[goal, wanted, measured, "yes" if met else "**no**"] for goal, wanted, measured, met in _goals(results)]
    return markdown(["goal for `recommended`", "wanted", "measured", "met"], rows) if rows else ""


def _goals(results: Results) -> Iterator[Goal]:
    share = results.share("recommended")
    if share is not None:
        yield "share recovered past 2048", "at least 75%", share.text(0, percent=True), share.mean >= 0.75
    yield from _short_text(results)
    yield from _tasks(results)
    yield from _length(results)
    for name in (row.name for row in ROWS.values() if row.goal == "passkeys"):
        for longest, wanted in ((1024, 1.0), (8192, 0.9)):
            for measure, more in (("passkey", ""), ("passkey" + SPACED, " (and the space before it)")):
                found = _passkeys(results, name, longest, measure)
                if found is None:
                    continue
                goal = f"one passkey{more} up to {longest} tokens, `{name}`"
                yield goal, f"at least {wanted:.0%}", f"{found:.0%} at the worst length", found >= wanted


def _short_text(results: Results) -> Iterator[Goal]:
    def gap(record: Record) -> float | None:
        found = results.records.get(record.controls["teacher"].name, {})
        teacher = found.get(record.seed) or found.get(0)
        own, other = record.losses("loss"), None if teacher is None else teacher.losses("loss")
        return None if own is None or other is None else own.means[0] - other.means[0]

    number = results.number("recommended", gap)
    if number is not None:
        yield "loss at 0 to 128 above the teacher trained alike", "at most 0.010", number.text(3), number.mean <= 0.01


def _tasks(results: Results) -> Iterator[Goal]:
    scores = {name: {task: results.number(name, accuracy(task)) for task in TASKS} for name in results.records}
    own, teacher = scores.get("recommended", {}), scores.get("teacher", {})
    for task in TASKS:
        mine, wanted = own.get(task), teacher.get(task)
        if mine is not None and wanted is not None:
            ratio = mine.mean / wanted.mean
            yield f"{task} beside the teacher", "at least 99%", f"{ratio:.1%}", ratio >= 0.99
    for rival in (row.name for row in ROWS.values() if row.goal == "rival"):
        theirs = scores.get(rival, {})
        means = [[n.mean for n in one.values() if n is not None] for one in (own, theirs)]
        if all(len(values) == len(TASKS) for values in means):
            mine_mean, their_mean = (sum(values) / len(values) for values in means)
            text = f"{mine_mean:.1%} beside {their_mean:.1%}"
            yield f"average of the tasks above `{rival}`", "above", text, mine_mean > their_mean
            first, second = own["lambada_openai"], theirs["lambada_openai"]
            if first is not None and second is not None:
                text = f"{first.mean:.1%} beside {second.mean:.1%}"
                yield f"LAMBADA above `{rival}`", "above", text, first.mean > second.mean


def accuracy(task: str) -> Callable[[Record], float | None]:
    """The accuracy of a task that its goal is about."""

    def value(record: Record) -> float | None:
        return record.values["measures"].get("tasks", {}).get("metrics", {}).get(task, {}).get(TASKS[task])

    return value


def rise_far_away(record: Record) -> float | None:
    """Loss from 16,384 tokens on minus that at 2048 to 4096, None where these were not measured."""
    loss = record.losses("length")
    if loss is None or not {2048, 4096, 16_384} <= set(loss.edges):
        return None
    return loss.past(16_384) - loss.means[loss.edges.index(2048)]


def _length(results: Results) -> Iterator[Goal]:
    number = results.number("recommended", rise_far_away)
    if number is not None:
        goal = "loss from 16,384 on above that at 2048 to 4096"
        yield goal, "at most 0.030", number.text(3), number.mean <= 0.03


def _passkeys(results: Results, name: str, longest: int, measure: str) -> float | None:
    worst = [
        share
        for record in results.records.get(name, {}).values()
        for length, share in record.values["measures"].get(measure, {}).items()
        if int(length) <= longest
    ]
    return min(worst) if worst else None
