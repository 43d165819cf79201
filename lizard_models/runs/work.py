"""The work folder of a run: held by one process, of one plan, cleared of what dead ones left."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lizard_models.config import LizardConfig
from lizard_models.distill.parallel import agreed, is_main_process, join, wait_for_all
from lizard_models.distill.resume import RUN, checkpoints, step_of
from lizard_models.files.folders import SUMS, damaged, drafts_of, move_whole, write_whole
from lizard_models.files.locks import LOCK, FolderLock
from lizard_models.files.records import RECORD_SUMS, is_gone, read_json, read_record, seal_broken, sealed, write_record
from lizard_models.files.sources import Say, silent
from lizard_models.runs.plan import FINE_TUNING, STAGES, Plan, asked_stages, check_folders, work_folder
from lizard_models.teachers.loading import TRAINING

PLAN, ROWS, WIDE, KEPT, LOG = "plan.json", "rows.json", "wide_layers.json", "kept_keys.json", "log.jsonl"
NOT_OF_THE_PLAN = ("stages", "processes", "kept_keys")  # of what a run records; the last is in its configuration


class Work:
    """Where a run keeps checkpoints and measurements until its model is finished."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan, self.say = plan, say
        self.folder = work_folder(plan.out)
        self.lock = FolderLock(self.folder, say)
        self.summed = True  # whether what is there has sums; work of earlier versions has none
        self.gone = set[str]()  # records that were deleted, and said to be

    def hold(self) -> None:
        """Makes the folder this process's own, if it is there; every process must call it.

        Raises ValueError where another process works in it.
        """
        self._refuse(agreed(self._take() if is_main_process() else ""))

    def _take(self) -> str:
        return self.lock.take() if self.folder.is_dir() else ""

    def _refuse(self, holder: str) -> None:
        if holder:
            raise ValueError(
                f"out: another run works in {str(self.folder)!r} ({holder}); wait for it, stop it, or give another "
                "`out`"
            )

    def release(self) -> None:
        """Lets others have the folder; an empty one goes."""
        if self.lock.descriptor is not None:
            with contextlib.suppress(OSError):
                if [path.name for path in self.folder.iterdir()] == [LOCK]:
                    (self.folder / LOCK).unlink()
                    self.folder.rmdir()
        self.lock.release()

    def begin(self, settings: dict[str, Any]) -> None:
        """Makes the folder that of a plan, or goes on with what is there; every process must call it.

        settings: what the run records. Raises ValueError for the work of another plan, from which it cannot go on.
        """
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hold()
        check_folders(self.plan, self.folder)  # again: another run may have been here meanwhile
        kept = {key: value for key, value in settings.items() if key not in NOT_OF_THE_PLAN}
        settings = json.loads(json.dumps({**kept, "sums": True}))
        self._compare(settings)
        wait_for_all()
        if is_main_process():
            for path in (self.folder / name for name in (ROWS, WIDE, KEPT) if not self.summed):
                if path.is_file():
                    write_record(path, read_record(path, f"delete {str(path)!r}, and it is made again", False))
            for draft in (*self.folder.glob(".*.json.*"), *self.folder.glob(".run*")):
                draft.unlink(missing_ok=True)
            shutil.rmtree(_gone(self.folder), ignore_errors=True)
            write_whole(self.folder / PLAN, json.dumps(sealed(settings), sort_keys=True, indent=2))
        wait_for_all()
        self._tell()

    def _tell(self) -> None:
        """Says what an earlier run has done, which is not done again."""
        measured = [row["name"] for row in self.read(ROWS) or []]
        if measured:
            self.say(f"skipped, measured before: {', '.join(measured)}")
        for stage in STAGES:
            last, path = checkpoints(self.folder / stage)[-1:], self.folder / stage / RUN
            if last and path.is_file():
                with contextlib.suppress(ValueError):  # what is damaged the stage refuses itself
                    step, steps = step_of(last[0]), read_json(path, "").get("steps")
                    done = f"skipped, trained before: {stage}, {steps} steps"
                    self.say(done if step == steps else f"{stage} goes on from step {step} of {steps}")

    def read(self, name: str) -> Any:
        """What ``write_record`` wrote there, None if nothing, or if it was deleted, as is said of one that is damaged.

        Raises ValueError for a file that is damaged.
        """
        path = self.folder / name
        if is_gone(path):
            if name not in self.gone:
                self.say(f"note: {path} is missing, and is made again")
            self.gone.add(name)
            return None
        return read_record(path, f"delete {str(path)!r}, and it is made again", True)

    def remove(self) -> None:
        """Deletes the folder, which is gone at once."""
        gone = _gone(self.folder)
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _compare(self, settings: dict[str, Any]) -> None:
        path = self.folder / PLAN
        trained = has_checkpoints(self.folder)
        if not path.is_file():
            if trained:
                raise ValueError(
                    f"{path} is missing, by which its checkpoints are known: delete {str(self.folder)!r}, "
                    "and train anew"
                )
            return self._clear()
        remedy = f"delete {str(self.folder)!r}, and train anew" if trained else f"delete {str(path)!r}"
        before = read_json(path, remedy)
        whole = isinstance(before, dict) and isinstance(before.get("config"), dict)
        if not whole or not isinstance(before.get("asked", []), list):
            raise ValueError(f"{path} is damaged (it has no configuration): {remedy}")
        damage = f", or {path} is damaged (another sha256 than when it was written)" if seal_broken(before) else ""
        before = {
            "widen": 0,
            "state_mib": None,
            "weights": [],
            **before,
        }  # runs from before there was this choice lack it
        self.summed = before.setdefault("sums", False)
        before["sums"] = True
        with contextlib.suppress(ValueError, TypeError):  # and so do their configurations, of later fields
            before["config"] = _known(before["config"], settings["config"]["name"])
        known = before.setdefault("teacher_sha256", settings["teacher_sha256"])
        before.setdefault("asked", [name for name in settings["asked"] if name != "stage3"])
        changed = [
            key for key, value in _but_fine_tuning(settings).items() if _but_fine_tuning(before).get(key) != value
        ]
        later = _other_fine_tuning(before, settings)
        if not trained and (changed or later or not self.plan.resume):
            self.summed = True
            if self.plan.resume:
                self.say(f"nothing was trained yet in {str(self.folder)!r}, so the run begins anew")
            return self._clear()
        if known != settings["teacher_sha256"]:
            raise ValueError(
                f"resume: teacher {self.plan.teacher!r} is not the one that {str(self.folder)!r} began with: its "
                f"weights or its configuration changed (sha256 {settings['teacher_sha256'][:12]}, was {known[:12]})"
                f"{damage}; put the old one back, or delete {str(self.folder)!r}, and train anew"
            )
        if later:
            begun = [stage for stage in FINE_TUNING[FINE_TUNING.index(later) :] if checkpoints(self.folder / stage)]
            name = f"stage {later[-1]}"
            if begun and not changed:
                paths = " and ".join(repr(str(self.folder / stage)) for stage in begun)
                raise ValueError(
                    f"resume: {self.folder} has begun {name} with another recipe{damage}; repeat its command with "
                    f"resume=True, or delete {paths}, and what was trained before it is kept"
                )
            if not changed:
                self.say(f"{name} has another recipe than before; it has not begun, so the run goes on with it")
        if changed:
            raise ValueError(
                f"resume: {self.folder} is of a run with other {', '.join(changed)}{damage}; repeat its command with "
                f"resume=True, or delete {str(self.folder)!r}"
            )

    def _clear(self) -> None:
        """Deletes what an earlier run that trained nothing has left."""
        wait_for_all()
        if is_main_process():
            for name in (PLAN, ROWS, WIDE, KEPT, LOG, RECORD_SUMS):
                (self.folder / name).unlink(missing_ok=True)
            for path in (*self.folder.glob("run.md"), *self.folder.glob("run-*.svg")):  # its report
                path.unlink(missing_ok=True)
            for stage in STAGES:
                shutil.rmtree(self.folder / stage, ignore_errors=True)


def has_checkpoints(folder: Path) -> bool:
    """Whether a work folder holds anything that was trained."""
    return any(checkpoints(folder / stage) for stage in STAGES)


def finished_before(plan: Plan, say: Say = silent) -> bool:
    """Whether the run that ``plan`` would go on with is finished; what a kill left of its last moves is done.

    Its model is at ``plan.out``, or whole beside it, where it could not be moved from, or was killed before. Every
    process must ask.
    """
    if not plan.resume:
        return False
    join(plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return agreed(_finish(Work(plan, say)) if is_main_process() else False)


def _finish(work: Work) -> bool:
    plan = work.plan
    try:
        work._refuse(work._take())
        if plan.out.is_dir() and _is_model_of(plan, plan.out):
            if work.folder.is_dir():
                work.remove()
            else:
                shutil.rmtree(_gone(work.folder), ignore_errors=True)  # a kill in the middle of that
            return True
        if plan.out.exists() or not work.folder.is_dir():
            return False
        for draft in _finished_drafts(plan, work.folder):
            move_whole(draft, plan.out)
            work.remove()
            return True
        return False
    finally:
        work.release()


def _finished_drafts(plan: Plan, folder: Path) -> Iterator[Path]:
    path = folder / PLAN
    known = read_json(path, f"delete {str(folder)!r}, and train anew") if path.is_file() else {}
    for draft in drafts_of(plan.out):
        if _is_model_of(plan, draft) and not damaged(draft):
            if read_json(draft / TRAINING, "")["teacher_sha256"] == known.get("teacher_sha256"):
                yield draft


def _is_model_of(plan: Plan, folder: Path) -> bool:
    """Whether a folder holds a finished model of a plan's teacher, data, weights, budget, start and configuration."""
    if not (folder / SUMS).is_file() or not (folder / TRAINING).is_file():
        return False
    record = read_json(folder / TRAINING, "copy the model again")
    config = dict(record.get("config", {}))
    with contextlib.suppress(ValueError, TypeError):
        config = _known(config, plan.config.name)
    if plan.widen:
        config["wide_layers"] = plan.config.to_dict()["wide_layers"]
    ours = plan.config.to_dict()["attention"]["kept_keys"]
    if plan.state_mib is not None or record.get("kept_keys") == ours:  # what became of the same
        config["attention"] = {**config.get("attention", {}), "kept_keys": ours}
    if record.get("state_mib") != plan.state_mib or record.get("start") != (plan.start and str(plan.start)):
        return False
    if record.get("weights", []) != plan.weights:
        return False
    asked = asked_stages(plan)
    theirs = {"asked": [name for name in asked if name != "stage3"], **record, "config": json.loads(json.dumps(config))}
    ours = {"teacher": plan.teacher, "data": plan.data, "widen": plan.widen, "asked": asked}
    ours["config"] = json.loads(json.dumps(plan.config.to_dict()))
    if _other_fine_tuning(theirs, ours):
        return False
    return all(_but_fine_tuning(theirs).get(key) == value for key, value in _but_fine_tuning(ours).items())


def _known(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A recorded configuration with every field, for one called ``name``: what is plain was recommended once."""
    config = LizardConfig.from_dict(values)
    return (config.replace(name=name) if (config.name, name) == ("recommended", "plain") else config).to_dict()


def _but_fine_tuning(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run records of itself, without what stages 2 and 3 are asked to do."""
    config = {key: value for key, value in settings["config"].items() if key not in FINE_TUNING}
    asked = [name for name in settings["asked"] if name not in FINE_TUNING]
    return {**settings, "config": config, "asked": asked}


def _other_fine_tuning(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first of stages 2 and 3 that is asked to do something else, "" if both are asked to do the same."""
    for stage in FINE_TUNING:
        one, other = (record["config"].get(stage) if stage in record["asked"] else None for record in (before, now))
        if one != other:
            return stage
    return ""


def _gone(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.gone")
