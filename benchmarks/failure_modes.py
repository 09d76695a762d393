"""Ten ways in which targeted RLHF can fail, each run on purpose, with its mark: passed or failed.

    python benchmarks/failure_modes.py                                 all rows: about an hour of one core
    python benchmarks/failure_modes.py --rows forgetting label_noise --seeds 0 1
    python benchmarks/failure_modes.py --summarise                     the table again, from the runs on disk
    python benchmarks/failure_modes.py --quick                         very small, to see that it works

A run is an arm of failure_cells.py in one of its worlds, where people err, junk is in the pool or confidence is noise.
A finished one is a file and is not run again; one that was killed goes on from its checkpoint. Where a finished grid of
label_efficiency.py has compared real with scrambled scores, that is taken. A row that fails stays in the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from failure_cells import SIZE, Site, grid_of, prepare, run_site
from failure_figures import points
from failure_rows import ROWS, Finding, Row
from label_arms import QUICK
from label_efficiency import Job, run_jobs
from provenance import RESULTS, ROOT, commit, from_root, provenance

from trlhf.errors import UserError
from trlhf.files import read_json, write_json

SMALL = (*QUICK, "rl.save_steps=2")
RANDOM = "no_better_than_random"


def jobs_of(folder: Path, sites: Sequence[Site], overrides: tuple[str, ...], code: str) -> list[Job]:
    """Return the jobs that lead to some sites; what sites share comes before the first of them."""
    jobs: dict[str, Job] = {}
    for site in sites:
        start, rest = f"sft of seed {site.seed}", (overrides, code)
        jobs.setdefault(start, Job(start, partial(prepare, folder, Site("clean", "sft", 0, site.seed), *rest)))
        name = f"first labels of {site.world}, seed {site.seed}, budget {site.budget}"
        if site.arm != "sft":
            jobs.setdefault(name, Job(name, partial(prepare, folder, site, *rest), (start,)))
        needs = start if site.arm == "sft" else name
        jobs[site.name] = Job(site.name, partial(run_site, folder, site, *rest), (needs,))
    return list(jobs.values())


def judge(row: Row, sites: Sequence[Site], found: Mapping[Site, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a row says of the runs that are finished; ``passed`` is None as long as some are missing."""
    missing = [site.name for site in sites if site not in found]
    entry: dict[str, Any] = {"words": row.words, "mark": row.mark, "missing": missing}
    if missing:
        return {**entry, "passed": None, "figure": f"{len(missing)} of {len(sites)} runs are missing", "values": {}}
    said = row.judge({site: found[site] for site in (found if row.everywhere else sites)})
    return {**entry, "passed": said.passed, "figure": said.figure, "values": said.values}


def from_label_efficiency(path: Path) -> Finding | None:
    """Return the comparison of real with scrambled scores of a whole grid; None where there is none yet."""
    compared = read_json(path).get("real_or_scrambled") if path.exists() else None
    area = compared and compared["area"]
    if not area:
        return None
    figure = f"area under accuracy, full less scrambled, {len(compared['seeds'])} seeds ({path.name}): {points(area)}"
    return Finding(figure, area["low"] > 0 or area["high"] < 0, compared)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as markdown."""
    words = {True: "pass", False: "**fail**", None: "not run"}
    lines = ["| mode | test | mark | figure | |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {name.replace('_', ' ')} | {row['words']} | {row['mark']} | {row['figure']} | {words[row['passed']]} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run what is missing, write the results; 1 when a run broke off."""
    options = _parser().parse_args(arguments)
    quick, code = options.quick, commit()
    folder = (options.folder or ROOT / "runs" / "failure_modes" / (code + ("-quick" if quick else ""))).resolve()
    output = options.output or (folder if quick else RESULTS) / "failure_modes.json"
    overrides = (*(SMALL if quick else ()), *options.overrides)
    names = [name for name in ROWS if name in (options.rows or ROWS)]
    known = None if quick else from_label_efficiency(options.label_efficiency)
    seeds = {name: tuple(options.seeds or ((0,) if quick else ROWS[name].seeds)) for name in names}
    wanted = {
        name: [] if known and name == RANDOM else [site for seed in seeds[name] for site in ROWS[name].sites(seed)]
        for name in names
    }
    sites = list(dict.fromkeys(site for row in wanted.values() for site in row))
    failed: dict[str, str] = {}
    try:
        missing = [site for site in sites if grid_of(folder, site, overrides, code).found(site.cell) is None]
        if not options.summarise:
            print(f"{len(sites)} runs, {len(missing)} to do, in {from_root(folder)}", flush=True)
            failed = run_jobs(jobs_of(folder, missing, overrides, code), options.jobs, folder / "logs")
        grids = {site: grid_of(folder, site, overrides, code) for site in sites}
        found = {site: record for site, grid in grids.items() if (record := grid.found(site.cell)) is not None}
    except UserError as error:
        print(f"failure_modes: {error}", file=sys.stderr)
        return 2
    rows = {name: judge(ROWS[name], wanted[name], found) for name in names if wanted[name]}
    if known and RANDOM in names:
        shown = {"words": ROWS[RANDOM].words, "mark": ROWS[RANDOM].mark, "missing": []}
        rows[RANDOM] = {**shown, "passed": known.passed, "figure": known.figure, "values": known.values}
    runs = {
        site.name: {
            **{name: record[name] for name in ("accuracy", "plain_accuracy", "labels", "plans", "seconds", "commit")},
            **{name: record.get(name) for name in ("stopped", "calls", "label_errors", "junk", "rounds")},
        }
        for site, record in found.items()
    }
    seen = {name: list(of_row) for name, of_row in seeds.items()}
    document = {**provenance(), "folder": from_root(folder), "overrides": [*SIZE, *overrides], "seeds": seen}
    write_json(output, {**document, "failed": failed, "rows": rows, "runs": runs})
    print(f"\n{table(rows)}\n\nwritten to {from_root(output)}")
    for name, reason in failed.items():
        print(f"broke off: {name}: {reason}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of every row (default: each row's own)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/failure_modes/<commit>)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/failure_modes.json")
    parser.add_argument("--label-efficiency", type=Path, default=RESULTS / "label_efficiency.json", metavar="FILE")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="very small sizes, one seed")
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
