"""Run the benchmarks, save the results, and write docs/benchmarks.md from them.

python benchmarks/run.py                           # every section except cuda, more than an hour
python benchmarks/run.py --only merge --runs 5     # one section; --only may be repeated
python benchmarks/run.py --cuda                    # include the GPU sections
python benchmarks/run.py --render                  # only write the page from existing results
python benchmarks/run.py --tiny                    # try everything in a minute, separate from the real results
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from benchmarks import algebra, cuda, extract, memory, merge, page, scaling
from benchmarks.machine import machine, versions
from benchmarks.measure import ROOT, remove
from benchmarks.options import Options

SECTIONS: tuple[ModuleType, ...] = (merge, extract, algebra, memory, scaling, cuda)


def main() -> int:
    """Measure the chosen sections, then write the page."""
    args = _arguments()
    work = args.work / "tiny" if args.tiny else args.work
    results = args.results or work / "results"
    docs = work if args.tiny else ROOT / "docs"
    failed = False
    for section in [] if args.render else _chosen(args.only, args.cuda):
        try:
            _measure(section, _options(args, work), results)
        except (Exception, SystemExit):  # the others are still measured
            traceback.print_exc()
            failed = True
    if not args.keep:
        for folder in work.glob("bench-llama-*"):
            remove(folder)
    target = args.page or docs / "benchmarks.md"
    if (results / "scaling.json").exists():
        scaling.draw(json.loads((results / "scaling.json").read_text()), target.parent / "images" / scaling.PICTURE)
    page.render(SECTIONS, results, target)
    print(f"wrote {target}", file=sys.stderr)
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [s.NAME for s in SECTIONS]
    parser.add_argument("--only", choices=names, action="append", help="this section; repeatable")
    parser.add_argument("--runs", type=int, default=5, help="of ours and of what takes seconds (default 5)")
    parser.add_argument("--peer-runs", type=int, default=5, help="of peers that take minutes (default 5)")
    parser.add_argument(
        "--without", action="append", default=[], help="a peer: peft, mergekit, axolotl, dense; repeatable"
    )
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU too")
    parser.add_argument("--tiny", action="store_true", help="small shapes and a separate page, in WORK/tiny")
    parser.add_argument("--render", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, adapters and outputs")
    for name in ("hidden", "inner", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="override the section's own value")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 2, 4, 8], help="of scaling, in GB")
    parser.add_argument("--work", type=Path, default=Options.work, help="checkpoints, environments, results")
    parser.add_argument("--results", type=Path, help="default: WORK/results")
    parser.add_argument("--page", type=Path, help="default: docs/benchmarks.md")
    return parser.parse_args()


def _options(args: argparse.Namespace, work: Path) -> Options:
    return Options(
        work.resolve(), args.runs, args.peer_runs, args.hidden, args.inner, args.layers, args.vocab, tuple(args.sizes),
        tuple(args.without), args.tiny, args.keep, args.cuda, environments=args.work.resolve(),
    )  # fmt: skip


def _chosen(only: list[str] | None, with_cuda: bool) -> list[ModuleType]:
    """Return the sections to measure; cuda only by name or with --cuda, and only if there is a GPU."""
    found = [s for s in SECTIONS if s.NAME in (only or []) or (not only and (s is not cuda or with_cuda))]
    if cuda in found and not torch.cuda.is_available():
        print("cuda: no GPU, not measured", file=sys.stderr)
        found.remove(cuda)
    for section in found:
        print(f"{section.NAME}: may take {section.TAKES}", file=sys.stderr)
    return found


def _measure(section: ModuleType, options: Options, results: Path) -> None:
    """Measure one section and save its figures with the date, the machine and the versions."""
    print(f"== {section.NAME}", file=sys.stderr)
    options.work.mkdir(parents=True, exist_ok=True)
    found = section.measure(options)
    result = {"section": section.NAME, "date": datetime.date.today().isoformat()}
    result |= {"machine": machine(options.work), "versions": versions(options.environments)} | found
    results.mkdir(parents=True, exist_ok=True)
    fresh = results / f"{section.NAME}.json.new"
    fresh.write_text(json.dumps(result, indent=1, default=str) + "\n")
    fresh.replace(results / f"{section.NAME}.json")


if __name__ == "__main__":
    sys.exit(main())
