#!/usr/bin/env bash
# Installs FindRec on a machine with a GPU, runs the tests that need one, and measures it; ten minutes at most.
#
#     bash evaluation/benchmarks/gpu.sh [--out FOLDER] [--dry-run] [options of gpu.py]
#
# FOLDER (default: gpu-report) gets report.md and report.json (the figures, with card, driver and versions),
# steps.tsv (what ended how, in seconds) and a log of each step. A failed step does not stop the others, but is
# the exit code. --dry-run rehearses it on a CPU with small sizes and the Python that PYTHON names (default:
# .venv/bin/python), and only shows what would be installed. FINDREC_MAMBA=1 also compiles mamba-ssm, to compare
# with, for which ten minutes may be too short: LIMIT_S sets another limit.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=gpu-report
dry=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --dry-run) dry=yes; shift ;;
        *) break ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
limit=${LIMIT_S:-600}
failed=0
: >"$out/steps.tsv"

# step NAME SECONDS COMMAND...: at most that long, and no longer than there is time left.
step() {
    local name=$1 most=$2 begun=$SECONDS code
    shift 2
    local left=$((limit - SECONDS))
    [ "$most" -gt "$left" ] && most=$left
    if [ "$most" -lt 5 ]; then
        code=skipped
    else
        timeout --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1 </dev/null
        code=$?
    fi
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begun))" >>"$out/steps.tsv"
    echo "== $name: exit code $code, $((SECONDS - begun)) s"
    [ "$code" = 0 ] || { failed=1; tail -n 5 "$out/$name.log" 2>/dev/null | cut -c1-200; return 1; }
}

if [ -n "$dry" ]; then
    python=${PYTHON:-.venv/bin/python}
    step setup 60 make -n -B setup VENV="$out/venv" PYTHON=python3
    device="--device cpu --small"
    collect=--collect-only
else
    step setup 420 make setup || exit 1
    python=.venv/bin/python
    # What the loss is compared with. Its dependencies are there.
    step liger 30 $python -m pip install --no-deps --quiet liger-kernel==0.8.5
    device=
    collect=
fi
step doctor 120 "$python" -m findrec.cli.app doctor
# Those files only: collecting all tests takes half a minute.
step tests 120 "$python" -m pytest -q -m gpu $collect $(grep -rl --include='test_*.py' 'mark\.gpu' tests)
step figures $((limit - SECONDS)) "$python" evaluation/benchmarks/gpu.py --out "$out" \
    --limit-s $((limit - SECONDS - 10)) $device "$@"

{
    printf '\n## gpu.sh\n\n| step | exit code | s |\n|---|---:|---:|\n'
    awk -F'\t' '{ printf "| %s | %s | %s |\n", $1, $2, $3 }' "$out/steps.tsv"
} >>"$out/report.md"
echo "report: $out/report.md"
exit $failed
