"""Measures the GPU of this machine: kernels, training steps, a resumed run, ranking, FAISS, NCCL.

python evaluation/benchmarks/gpu.py --out FOLDER [--only SECTION ...] [--limit-s SECONDS]
    [--device cpu --small]

Each section runs in a process of its own with a time limit, so that no failure loses the others. FOLDER gets
report.md and report.json, which are written anew after each section, and the log of each section.
`--device cpu --small` is a rehearsal without a GPU, in about a minute. evaluation/benchmarks/gpu.sh does all
that a bare machine needs.
"""

import argparse
import sys
from pathlib import Path

from bench.gpu.sections import SECTIONS, Setting, run_all, run_section

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--limit-s", type=float, default=420, help="for all sections together (default 420)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, whose figures mean nothing")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # run this one, here
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(given.device, given.small, given.out.resolve())
    if given.section:
        run_section(given.section, setting)
        sys.exit()
    sys.exit(run_all(given.only, setting, limit_s=given.limit_s, program=Path(__file__).resolve()))
