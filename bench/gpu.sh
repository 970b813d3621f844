#!/usr/bin/env bash
# Build, test and measure on a fresh GPU machine within ten minutes, the most telling figures first.
#
#     bench/gpu.sh             everything; needs an NVIDIA GPU and a python3 with torch, triton and pytest-benchmark
#     bench/gpu.sh --smoke     the same path at tiny sizes, on a CPU through Triton's interpreter
#
# What was measured is in $OUT (bench/out) after every stage: the device's record, its roofline, and log.txt.
# The exit status is that of build and tests; benchmarks run even if tests fail, and a stage that fails or runs out
# of time leaves the others alone. Variables: PYTHON; WHEELS, a folder of wheels to install first (rivals that the
# machine lacks); COMMIT, what the record shall name where there is no git history; SECONDS_IN_ALL.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
END=$((SECONDS + ${SECONDS_IN_ALL:-570}))
export PYTHONUNBUFFERED=1
smoke=()
if [[ ${1:-} == --smoke ]]; then
    smoke=(--smoke)
    export TRITON_INTERPRET=1
fi
mkdir -p "$OUT"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
exec > >(tee "$OUT/log.txt") 2>&1

# limit SECONDS COMMAND...: run it so long, and never beyond the end of all; interrupted first, so that it can save.
limit() {
    local left=$((END - SECONDS))
    (($1 < left)) && left=$1
    ((left > 5)) || { echo "no time left for: ${*:2}"; return 124; }
    timeout --signal=INT --kill-after=10 "$left" "${@:2}"
}

stage() { echo; echo "=== $1, after $SECONDS s"; }

benchmarks() { # benchmarks SECONDS FILE [PYTEST ARGUMENTS]
    limit "$1" "$PYTHON" -m pytest -p no:cacheprovider -c bench/pytest.ini -q --tb=short "bench/$2" \
        "${smoke[@]}" --seconds "$(($1 * 4 / 5))" "${@:3}"
}

measure() { # measure NAME SECONDS FILE [PYTEST ARGUMENTS]
    stage "$1"
    benchmarks "${@:2}" --benchmark-json "$runs/$1.json" || echo "$1: exit status $?"
    [[ -s $runs/$1.json ]] && "$PYTHON" bench/record.py --folder "$OUT" --commit "${COMMIT:-}" "$runs/$1.json"
}

failed=0
if ((${#smoke[@]} == 0)); then
    stage build
    [[ -n ${WHEELS:-} ]] && "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
    limit 120 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable . || failed=1
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu --format=csv
fi

stage "tests, and compilation of what will be measured"
pids=()
if ((${#smoke[@]} == 0)); then
    tests=(tests/kernels tests/cuda tests/test_parity.py tests/test_model.py tests/test_losses.py)
    for rivals in "triton and float32" "triton and tf32" "triton and bf16" "reference and compiled" "torch and compiled"; do
        benchmarks 170 bench_model.py --benchmark-disable \
            -k "training_step and C256 and 10k_edges and ($rivals)" > "$runs/compile.txt" 2>&1 &
        pids+=($!)
    done
else
    tests=(tests/kernels/test_backend.py tests/kernels/test_segments.py)
fi
parallel=()
"$PYTHON" -c 'import xdist' 2> /dev/null && ((${#smoke[@]} == 0)) && parallel=(-n 8)
# Warnings are errors with the pinned versions alone; other machines have others.
limit 170 "$PYTHON" -m pytest -p no:cacheprovider -o minversion=0 -W default -q "${parallel[@]}" "${tests[@]}" || failed=1
limit 60 "$PYTHON" tests/parity.py --backend "$( ((${#smoke[@]})) && echo torch || echo triton)" \
    --device "$( ((${#smoke[@]})) && echo cpu || echo cuda)" || failed=1
((${#pids[@]})) && wait "${pids[@]}"

if ((${#smoke[@]})); then
    measure model 100 bench_model.py
    measure kernels 100 bench_kernels.py
else
    measure model 190 bench_model.py -k C256
    measure kernels 70 bench_kernels.py -k C256
    measure neighbors 40 bench_neighbors_cuda.py
    measure widths 90 bench_model.py -k "C128 or C512"
    measure kernel-widths 60 bench_kernels.py -k "C128 or C512"
fi

stage roofline
for record in "$OUT"/*.json; do
    "$PYTHON" bench/roofline.py "$record" --output "$OUT"
done
echo
echo "finished after $SECONDS s; build and tests: $( ((failed)) && echo FAILED || echo passed)"
exit "$failed"
