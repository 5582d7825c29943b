"""Measures how well gates of trained FindRec runs tell true from wrong content, as an AUROC.

python evaluation/benchmarks/gates.py RUN_FOLDER ...
"""

import sys
from pathlib import Path

from bench.gates import print_auroc

if __name__ == "__main__":
    print("| run | modality | training events | items | AUROC |\n|---|---|---|---|---|")
    for run in sys.argv[1:]:
        print_auroc(Path(run))
