"""Measurements by name that may fail, hang or take the process with them, one after the other, each on disk as soon as it is known.

Time on a GPU is short: a kernel that crashes leaves the process without its GPU, one that never ends
would keep it, and a package may not be there. So the cells run in a process of their own, which a second one, without torch's help,
starts again behind the cell that it died of (`supervise`), or that failed there: a failed capture of a graph may leave torch's allocator in
a state in which later cells fail too. What a cell throws is a row that says so (`run_cell`); a budget of seconds ends the run between two
cells; and results of an earlier run stay where this one has nothing better (`Results`).
"""

import argparse
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared import ROOT, change_json

NO_GPU = 69

# A cell that takes longer hangs; most take a second or two, the first of a large shape as long as its kernels need to be compiled.
CELL_SECONDS = 240
# A process that has lost its GPU, or its life, so often, will lose the next.
MOST_STARTS = 12
# How a process says that it needs to be started again: the GPU does not answer it any more (AGAIN), or may not do what it should (RENEW).
AGAIN = 75
RENEW = 76


class NotRun(Exception):
    """A cell that cannot run here, and why."""


@dataclass(frozen=True)
class Cell:
    """`keys` say what is measured, in the row that it becomes; `measure` returns its figures."""

    name: str
    keys: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


# A cell's row, and the exit code with which the process has to ask for another one, if it has.
Ran = tuple[dict[str, Any], int | None]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else "no message"


def say_goal(goal: dict[str, Any]) -> str:
    """One of gpu_goals.goal in words."""
    verdict = {None: "not measured", True: "met", False: "missed"}[goal["met"]]
    return f"{goal['what']}: found {goal['found']}, at least {goal['goal']}, aim {goal['aim']}, {verdict}"


def results_folder(given: Path | None) -> Path:
    """Where results go: the folder given, else $OUT where a machine collects them, else the results in this checkout."""
    if given is not None:
        return given
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "evals" / "results"


def run_cell(cell: Cell, device: str) -> Ran:
    """Measure a cell. `ok` is None where it could not run, or did not fit; a failed one on a GPU asks for another process."""
    import torch

    began = time.perf_counter()
    code = None
    row: dict[str, Any] = {"name": cell.name, **cell.keys}
    try:
        row |= {**cell.measure(), "ok": True}
    except NotRun as reason:
        row |= {"ok": None, "not_run": str(reason)}
    except torch.OutOfMemoryError as error:
        row |= {"ok": None, "not_run": "out of memory", "why": first_line(error)}
    except Exception as error:  # whatever a kernel or a library throws is what was found; the other cells still run
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            row |= {"ok": None, "not_run": "out of memory", "why": first_line(error)}
            # It did not fit while a graph was captured.
            code = RENEW
        else:
            row |= {"ok": False, "error": f"{type(error).__name__}: {first_line(error)}"}
            code = RENEW
    if not row["ok"]:
        # Only now is the exception gone, with the frames that held tensors.
        gc.collect()
    lost = what_the_gpu_says(device)
    if lost is not None:
        code = AGAIN
        row |= {"ok": False, "error": row.get("error") or lost}
    row["seconds"] = round(time.perf_counter() - began, 3)
    return row, code if device.startswith("cuda") else None


def what_the_gpu_says(device: str) -> str | None:
    """Wait for the GPU and free what is cached there: None, or what it answers where it is lost to this process."""
    import torch

    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # An illegal access shows at any call after the one that made it, and at all of them from there on.
            return f"{type(error).__name__}: {first_line(error)}"
    return None


class Rows(Protocol):
    """Where rows go, one by one, onto the disk."""

    def put(self, row: dict[str, Any]) -> None: ...

    def leave_out(self, names: Sequence[str]) -> None: ...


class Results:
    """A JSON file: `rows`, each with the number of its run in `runs` (machine and versions), and what the last call `left_out`."""

    def __init__(self, path: Path, run: dict[str, Any], page: Callable[[dict[str, Any]], str] | None = None) -> None:
        """
        Args:
            page: makes text of the file's value, which stands beside it as Markdown.
        """
        self.path, self._page = path, page

        def enter(value: dict[str, Any] | None) -> dict[str, Any]:
            value = value or {"runs": [], "left_out": [], "rows": []}
            if run not in value["runs"]:
                value["runs"].append(run)
            self._run = value["runs"].index(run)
            return value

        change_json(path, enter)

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        kept: dict[str, Any] = {}

        def both(value: dict[str, Any]) -> dict[str, Any]:
            change(value)
            kept.update(value)
            return value

        change_json(self.path, both)
        if self._page is not None:
            self.path.with_suffix(".md").write_text(self._page(kept), "utf-8")

    def put(self, row: dict[str, Any]) -> None:
        """The row in the place of an earlier one, but for a measured one that could not be measured now."""

        def change(value: dict[str, Any]) -> None:
            earlier = {old["name"]: old for old in value["rows"]}
            if row["ok"] is None and earlier.get(row["name"], row)["ok"] is True:
                return
            value["rows"] = list({**earlier, row["name"]: {**row, "run": self._run}}.values())

        self._change(change)

    def leave_out(self, names: Sequence[str]) -> None:
        self._change(lambda value: value.update(left_out=list(names)))

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in json.loads(self.path.read_text("utf-8"))["rows"]}

    def missing(self, cells: "Iterable[Cell]", after: str | None) -> "list[Cell]":
        """Those that have no figures here; and `after`, which an earlier process died of, for it marks where to go on."""
        there = {name for name, row in self.rows().items() if row["ok"] is True}
        return [cell for cell in cells if cell.name not in there or cell.name == after]

    def of_last_call(self, cells: "Iterable[Cell]") -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of those cells that the last call tried, and the names of those that it left out."""
        value = json.loads(self.path.read_text("utf-8"))
        tried = {cell.name for cell in cells} - set(value["left_out"])
        return [row for row in value["rows"] if row["name"] in tried], value["left_out"]


@dataclass(frozen=True)
class Resumption:
    """What `supervise` tells a process that it starts.

    Attributes:
        progress: file in which the process says what it is at.
        after: name of the last cell that an earlier process tried.
        why: what became of that process, if it could not say so itself.
    """

    progress: Path
    after: str | None = None
    why: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Resumption":
        return cls(Path(options.progress), options.after, options.why)

    def over(self) -> None:
        """Say that nothing is left to do: whatever the exit code, there is no reason to start another process."""
        self.progress.write_text(json.dumps({"over": True}), "utf-8")


def add_options(arguments: argparse.ArgumentParser) -> None:
    """--seconds, and what `supervise` says to the process that it starts."""
    arguments.add_argument(
        "--seconds", type=float, default=float("inf"), help="start nothing after so many; what is left out is listed"
    )
    for internal in ("--progress", "--after", "--why", "--until"):
        arguments.add_argument(internal, help=argparse.SUPPRESS)


def run_cells(
    cells: Sequence[Cell],
    results: Rows,
    resumption: Resumption,
    *,
    device: str,
    until: float,
    say: Callable[[dict[str, Any]], None],
    run: Callable[[Cell, str], Ran] | None = None,
) -> int | None:
    """Run the cells in turn until that moment (of time.time()), each by `run`, else `run_cell`. A number: the process must end with it."""
    names = [cell.name for cell in cells]
    start = 0
    if resumption.after in names:
        start = names.index(resumption.after) + 1
        if resumption.why is not None:
            lost = cells[start - 1]
            row = {"name": lost.name, **lost.keys, "ok": False, "error": resumption.why}
            results.put(row)
            say(row)
    for index, cell in enumerate(cells[start:], start):
        if time.time() > until:
            results.leave_out(names[index:])
            return None
        resumption.progress.write_text(json.dumps({"running": cell.name}), "utf-8")
        # From a thread that needs nothing of Python: a kernel that never ends holds the interpreter.
        faulthandler.dump_traceback_later(CELL_SECONDS, exit=True)
        row, code = (run or run_cell)(cell, device)
        faulthandler.cancel_dump_traceback_later()
        results.put(row)
        say(row)
        if code is not None:
            return code
    results.leave_out([])
    return None


def supervised(file: str, seconds: float) -> int:
    """`supervise` this command line again, as a program of its own that starts nothing after so many seconds."""
    until = str(time.time() + seconds)
    return supervise([sys.executable, str(Path(file).resolve()), *sys.argv[1:], "--until", until])


def supervise(command: Sequence[str]) -> int:
    """Run the command, which ends in `run_cells`, with `--progress FILE` behind it, as often as it takes: its exit code.

    FILE lies in a folder that stays until all is over: what one process has put there the next may use.
    """
    # A SystemExit ends the child too, which a signal alone would not.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="gpu_cells-") as folder:
        progress = Path(folder) / "progress.json"
        more: list[str] = []
        lost = 0
        while lost < MOST_STARTS:
            progress.unlink(missing_ok=True)
            code = subprocess.run([*command, "--progress", str(progress), *more]).returncode
            at = json.loads(progress.read_text("utf-8")) if progress.exists() else {}
            if at.get("over") or "running" not in at:
                return code
            more = ["--after", at["running"]]
            # One that only fails its cells ends when there are no more.
            lost += code != RENEW
            if code not in (AGAIN, RENEW):
                how = f"signal {-code}" if code < 0 else f"exit code {code}, maybe after {CELL_SECONDS} s"
                more += ["--why", f"the process died: {how}"]
            print(f"started again after: {at['running']}", flush=True)
    print(f"given up after {MOST_STARTS} lost processes", file=sys.stderr)
    return 1
