"""The whole fault suite, 20 to 30 minutes on two cores: `make faults`, or

    python -m tests.faults [--only F2 F5] [--seed 1] [--output docs/results/faults.md] [--json faults.json]

Ctrl-C ends it early: it then reports what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests import ranks  # noqa: F401  (forked ranks are to have one thread, and to have imported what a first step imports)
from tests.faults.campaign import Campaign, Injection, Result
from tests.faults.matrix import ROWS, whole_matrix
from tests.faults.report import page
from tests.faults.storm import Storm, blow

STORMS = 3
KILLS = 10  # of a storm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows of the matrix")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what is random")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a page of Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result as it comes")
    return parser.parse_args()


def main() -> int:
    arguments, began = parse_arguments(), time.monotonic()
    cases: list[Injection | Storm] = [case for case in whole_matrix(arguments.seed) if case.row in arguments.only]
    if "F20" in arguments.only:
        cases += [Storm("dp2 tp2", arguments.seed + number, KILLS) for number in range(STORMS)]
    results: list[Result] = []
    with TemporaryDirectory(prefix="faults-") as folder, suppress(KeyboardInterrupt):
        for result in _run(cases, Campaign(Path(folder) / "campaign")):
            results.append(result)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    text = page(results, len(cases), _command(), _environment(), time.monotonic() - began)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return int(any(result.wrong for result in results) or len(results) < len(cases))


def _run(cases: Sequence[Injection | Storm], campaign: Campaign) -> Iterator[Result]:
    """Run one after the other, and say how each has gone."""
    for number, case in enumerate(cases, start=1):
        result = blow(campaign, case) if isinstance(case, Storm) else campaign.inject(case)
        state = "as it has to be" if not result.wrong else "LOST: " + "; ".join(result.wrong)
        print(f"{number}/{len(cases)} {result.name}: {state} ({result.seconds:.1f} s)", flush=True)
        if result.wrong:
            print("\n".join(f"    {line}" for line in result.log.splitlines() if line.startswith(("supervisor", "error"))))
        yield result


def _command() -> str:
    return " ".join(["python -m tests.faults", *sys.argv[1:]])


def _environment() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), Python {platform.python_version()}, torch "
        f"{torch.__version__}; {time.strftime('%B %Y')}; load average {load:.1f} at the end."
    )


if __name__ == "__main__":
    sys.exit(main())
