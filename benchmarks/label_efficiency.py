"""Does targeting save labels? Accuracy against the number of labels, for every arm, budget and seed; and what differs.

    python benchmarks/label_efficiency.py                        the whole grid: a day or more, can be stopped any time
    python benchmarks/label_efficiency.py --arms full uniform_ppo --seeds 0 1
    python benchmarks/label_efficiency.py --summarise            tables, JSON and picture again, from the cells on disk
    python benchmarks/label_efficiency.py --begin-with benchmarks/results/label_efficiency.json   only what is not there
    python benchmarks/label_efficiency.py --quick                very small, to see that it works

A cell is one independent rl stage: an arm of label_arms.py, a label budget, a seed. All arms of a seed start from the
same SFT model, those of a seed and budget also from the same first labels. A finished cell is one file and is not run
again; one that was killed goes on from its checkpoint; one that failed is reported, and tried again by the next start.
Cells come by seed, and the arms that decide come first, so that an unfinished grid is useful.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from label_arms import (
    ARMS,
    BUDGETS,
    COMMON,
    QUICK,
    QUICK_ARMS,
    SCHEDULE,
    Cell,
    cells_of,
)
from label_cells import Grid, lighten, make_reward, make_sft, run_cell
from label_picture import picture
from label_summary import Results, record_of, summarise, tables
from provenance import RESULTS, ROOT, commit, from_root, provenance, public

from trlhf.errors import UserError
from trlhf.files import read_json, write_bytes, write_json


@dataclass(frozen=True)
class Job:
    """Something to do once other jobs are done."""

    name: str
    call: Callable[[], Any]
    needs: tuple[str, ...] = ()


def jobs_of(grid: Grid, cells: Sequence[Cell]) -> list[Job]:
    """Return the jobs that lead to some cells, each stage that cells share before the first of them."""
    jobs: dict[str, Job] = {}
    for cell in cells:
        seed, budget = cell.seed, grid.budget_of_source(cell)
        needs = [f"sft of seed {seed}"]
        jobs.setdefault(needs[0], Job(needs[0], partial(make_sft, grid, seed)))
        if budget is not None:
            needs = [f"first labels of seed {seed}, budget {budget}"]
            jobs.setdefault(needs[0], Job(needs[0], partial(make_reward, grid, seed, budget), (f"sft of seed {seed}",)))
        jobs[cell.name] = Job(cell.name, partial(run_cell, grid, cell), tuple(needs))
    return list(jobs.values())


def run_jobs(jobs: Sequence[Job], workers: int, logs: Path) -> dict[str, str]:
    """Do the jobs, the first that is ready first, and return the errors of those that failed.

    Args:
        jobs: those that others need come before them.
        workers: processes that do them; with one, it is this process.
        logs: folder of the processes' output.

    Raises:
        UserError: one of the processes was killed.
    """
    waiting, failed = {job.name: job for job in jobs}, dict[str, str]()
    running: dict[Future[Any], Job] = {}
    ended, begun = 0, time.monotonic()
    with ExitStack() as stack:
        pool = stack.enter_context(_executor(workers, logs, len(jobs)))
        while waiting or running:
            for job in list(waiting.values()):
                lost = [name for name in job.needs if name in failed]
                if lost:
                    del waiting[job.name]
                    failed[job.name], ended = f"not tried: {lost[0]} failed", ended + 1
                    print(f"[{ended}/{len(jobs)}] {job.name}: {failed[job.name]}", flush=True)
                elif len(running) < workers and not _pending(job, waiting, running):
                    del waiting[job.name]
                    running[pool.submit(job.call)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if isinstance(error, BrokenExecutor):
                    raise UserError("a worker process was killed (out of memory?); start again, with fewer --jobs")
                if error is not None and not isinstance(error, Exception):
                    raise error
                if error is not None:
                    failed[job.name] = f"{type(error).__name__}: {error}"
                ended += 1
                left = (time.monotonic() - begun) / ended * (len(jobs) - ended) / 3600
                said = failed[job.name] if error is not None else _said(future.result())
                print(f"[{ended}/{len(jobs)}] {job.name}: {said}; about {left:.1f} h left", flush=True)
    return failed


def _pending(job: Job, waiting: Mapping[str, Job], running: Mapping[Future[Any], Job]) -> bool:
    """Say whether something that a job needs is not done yet."""
    return any(name in waiting or any(other.name == name for other in running.values()) for name in job.needs)


def _said(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "done"
    return f"{record['accuracy']:.1%}, {record['labels']['spent']:g} labels, {record['seconds']:.0f} s"


class _Here(Executor):
    """Do each job at once, in this process."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executor(workers: int, logs: Path, jobs: int) -> Executor:
    if workers == 1 or not jobs:
        return _Here()
    logs.mkdir(parents=True, exist_ok=True)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker, (logs,))


def _prepare_worker(logs: Path) -> None:
    """Give a worker one thread, a file for what it prints, and an end together with its parent."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch is not loaded yet
    with (logs / f"{os.getpid()}.txt").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """End this process when its parent has ended, also where that was killed."""
    parent.join()
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run what is missing, write the results; 1 when a cell failed."""
    options = _parser().parse_args(arguments)
    quick = options.quick
    folder = (options.folder or ROOT / "runs" / "label_efficiency" / (commit() + ("-quick" if quick else ""))).resolve()
    output = options.output or (folder if quick else RESULTS) / "label_efficiency.json"
    overrides = (*COMMON, *SCHEDULE, *(QUICK if quick else ()), *options.overrides)
    grid = Grid(folder, overrides, options.keep, commit())
    budgets = sorted(set(options.budgets or (BUDGETS[:2] if quick else BUDGETS)))
    seeds = options.seeds or range(2 if quick else 5)
    cells = cells_of(options.arms or (QUICK_ARMS if quick else tuple(ARMS)), budgets, seeds)
    begun = _first_start(folder / "started.json")
    failed: dict[str, str] = {}
    try:
        if options.begin_with:
            take_over(options.begin_with, grid, cells)
        missing = [cell for cell in cells if grid.found(cell) is None]
        if not options.summarise:
            print(f"{len(cells)} cells, {len(missing)} to run, in {from_root(folder)}", flush=True)
            workers = options.jobs or (1 if quick else os.cpu_count() or 1)
            failed = run_jobs(jobs_of(grid, missing), workers, folder / "logs")
            for cell in cells:
                if not options.keep and cell not in missing:
                    lighten(grid.run(cell))
        found = {cell: record for cell in cells if (record := grid.found(cell)) is not None}
    except UserError as error:
        print(f"label_efficiency: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"label_efficiency: no finished cell in {from_root(folder)}", file=sys.stderr)
        return 2
    results = summarise(Results(found, tuple(budgets)), options.draws)
    document = {
        **{**provenance(), **begun},
        **{"folder": public(str(folder)), "overrides": list(overrides), "schedule": list(SCHEDULE), "failed": failed},
        **{"wanted": len(cells), "finished": len(found)},
        **results,
    }
    write_json(output, document)
    write_bytes(output.with_suffix(".svg"), picture(results, options.draw).encode())
    print(f"\n{tables(results)}\n\nwritten to {from_root(output)} and {from_root(output.with_suffix('.svg'))}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    return 1 if failed else 0


def take_over(path: Path, grid: Grid, cells: Sequence[Cell]) -> None:
    """Write the files of those cells that a results file holds and the grid does not.

    Raises:
        UserError: they were made with other overrides.
    """
    document = read_json(path)
    known = {Cell(record["arm"], record["budget"], record["seed"]): record for record in document["cells"]}
    for cell in cells:
        if cell not in known or grid.found(cell) is not None:
            continue
        made = [*document["overrides"], *document["arms"][cell.arm]["overrides"]]
        if made != [*grid.overrides, *grid.arms[cell.arm].overrides]:
            raise UserError(f"{path}: {cell.name} was made with other overrides; leave --begin-with out")
        write_json(grid.file(cell), record_of(known[cell], grid.overrides_of(cell)))


def _first_start(path: Path) -> dict[str, Any]:
    """Return where and when a grid was begun, which a later start or summary must not hide."""
    if not path.exists():
        write_json(path, {name: value for name, value in provenance().items() if name != "hardware"})
    return {"grid": read_json(path)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of: {', '.join(ARMS)} (default: all)")
    parser.add_argument("--budgets", type=int, nargs="+", help=f"labels (default: {' '.join(map(str, BUDGETS))})")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 3 4")
    parser.add_argument("--jobs", type=int, help="processes, one thread each (default: one for each core)")
    parser.add_argument("--folder", type=Path, help="of the grid (default: runs/label_efficiency/<commit>)")
    parser.add_argument("--begin-with", type=Path, metavar="RESULTS", help="a results file whose cells are taken over")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/label_efficiency.json (and .svg)")
    parser.add_argument("--keep", action="store_true", help="keep every cell's models")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    parser.add_argument("--draw", nargs="+", choices=ARMS, metavar="ARM", help="arms in the picture")
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument("--quick", action="store_true", help="very small sizes, two arms, two budgets, two seeds")
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
