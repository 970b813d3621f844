#!/usr/bin/env bash
# Build, test and measure on a fresh GPU machine within ten minutes, the most telling figures first.
#
#     bench/gpu.sh                      everything; needs an NVIDIA GPU and a python3 with torch and triton
#     bench/gpu.sh build kernels        these stages: build tests model compiled kernels data neighbors widths
#     bench/gpu.sh --smoke              the same path at tiny sizes, on a CPU through Triton's interpreter
#
# What was measured is in $OUT (bench/out) after every stage: the device's record, its roofline, and log.txt.
# The exit status is that of build and tests; benchmarks run even if tests fail, and a stage that fails or runs out of
# time leaves the others alone. Variables: PYTHON; WHEELS, a folder of wheels to install first (rivals that the
# machine lacks); COMMIT, what the record shall name where there is no git history; LIMIT, seconds in all.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
END=$((SECONDS + ${LIMIT:-570}))
export PYTHONUNBUFFERED=1

smoke=()
if [[ ${1:-} == --smoke ]]; then
    smoke=(--smoke)
    export TRITON_INTERPRET=1
    shift
fi
all=(build tests model compiled kernels data neighbors widths)
((${#smoke[@]})) && all=(tests model kernels data)
stages=" ${*:-${all[*]}} "

mkdir -p "$OUT"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
exec > >(tee "$OUT/log.txt") 2>&1

stage() { # stage NAME: whether it is wanted
    [[ $stages == *" $1 "* ]] && printf '\n=== %s, after %s s\n' "$1" "$SECONDS"
}

limit() { # limit SECONDS COMMAND...: not longer, nor beyond the end of all; interrupted first, so that it can save
    local left=$((END - SECONDS))
    (($1 < left)) && left=$1
    if ((left < 5)); then
        echo "no time left for: ${*:2}"
        return 124
    fi
    timeout --signal=INT --kill-after=10 "$left" "${@:2}"
}

benchmarks() { # benchmarks SECONDS FILE [PYTEST ARGUMENTS]
    limit "$1" "$PYTHON" -m pytest -p no:cacheprovider -c bench/pytest.ini -q --tb=short "bench/$2" \
        "${smoke[@]}" --seconds "$(($1 * 4 / 5))" "${@:3}"
}

measure() { # measure NAME SECONDS FILE [PYTEST ARGUMENTS]
    stage "$1" || return 0
    benchmarks "${@:2}" --benchmark-json "$runs/$1.json" || echo "$1: exit status $?"
    if [[ -s $runs/$1.json ]]; then
        "$PYTHON" bench/record.py --folder "$OUT" --commit "${COMMIT:-}" "$runs/$1.json"
    fi
}

failed=0
if stage build; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    if [[ -n ${WHEELS:-} ]]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
    fi
    limit 120 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable . || failed=1
fi

if stage tests; then
    parity=(--backend triton --device cuda)
    tests=(tests/kernels tests/cuda tests/test_parity.py tests/test_model.py tests/test_losses.py tests/test_padding.py
        tests/train/test_precision.py tests/train/test_capture.py)
    options=()
    compilations=()
    if ((${#smoke[@]})); then
        parity=(--backend torch)
        tests=(tests/kernels/test_backend.py tests/kernels/test_segments.py)
    else
        "$PYTHON" -c 'import xdist' 2> /dev/null && options=(-n 8)
        # Meanwhile what is measured later is compiled; the compilers keep it on disk.
        for rivals in triton-float32 triton-tf32 triton-bf16 reference-bf16 torch-bf16; do
            benchmarks 170 bench_model.py --benchmark-disable \
                -k "C256 and (training_step and 10k_edges or 8_crystals) and $rivals" > "$runs/$rivals.txt" 2>&1 &
            compilations+=($!)
        done
    fi
    # Warnings are errors with the pinned versions alone: other machines have others.
    limit 170 "$PYTHON" -m pytest -p no:cacheprovider -o minversion=0 -W default -q \
        "${options[@]}" "${tests[@]}" || failed=1
    limit 60 "$PYTHON" tests/parity.py "${parity[@]}" || failed=1
    ((${#compilations[@]})) && wait "${compilations[@]}"
fi

if ((${#smoke[@]})); then
    measure model 120 bench_model.py
    measure kernels 120 bench_kernels.py
    measure data 120 bench_data.py
else
    measure model 150 bench_model.py -k "C256 and not compiled"
    measure compiled 100 bench_model.py -k "C256 and compiled"
    measure kernels 70 bench_kernels.py -k C256
    measure data 50 bench_data.py -k "share or resident or noise or gather and not lmdb"
    measure neighbors 40 bench_neighbors_cuda.py
    measure widths 120 bench_model.py -k "not C256 and not compiled"
fi

for record in "$OUT"/*.json; do
    [[ -e $record ]] && "$PYTHON" bench/roofline.py "$record" --output "$OUT"
done
printf '\nfinished after %s s; build and tests: %s\n' "$SECONDS" "$( ((failed)) && echo FAILED || echo passed)"
exit "$failed"
