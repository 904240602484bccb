#!/usr/bin/env bash
# On a machine with a GPU, from the folder that pack.sh made: tests, benches, the peers where PyTorch is, and compute-sanitizer
# where it is installed. Writes results/: logs, JSON lines, results.md, and all of it as results.tar.gz, anew after every
# step; where OUT is set, the last two to that folder too. Ends with an error if something failed. Where tests fail, memory is
# checked, and nothing is measured.
#
# Usage: run.sh [--seconds N] [--peak TFLOP/s TB/s] [STEP...]
# Steps, all of them without one, what is worth most first: tests bench peers kernels sanitizer. Together they end within N
# seconds, 540 without that; what there is no time for is cut short or left out. --peak is what the device reaches in a
# large bf16 GEMM and in a copy, for the fractions of the floor; without it, it is measured where PyTorch is.
set -uo pipefail
cd "$(dirname "$0")"
seconds=540
peak=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --seconds)
            [ $# -ge 2 ] || { echo "--seconds needs a number" >&2 && exit 2; }
            seconds=$2
            shift 2
            ;;
        --peak)
            [ $# -ge 3 ] || { echo "--peak needs two numbers: TFLOP/s and TB/s" >&2 && exit 2; }
            peak=(--peak "$2" "$3")
            shift 3
            ;;
        *)
            echo "no option $1" >&2
            exit 2
            ;;
    esac
done
[ $# -eq 0 ] && set -- tests bench peers kernels sanitizer
mkdir -p results
export MOEPRESS_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
failed=0

# time_for SECONDS NAME: sets `limit` to so many seconds, or to what is left but for the packing; an error where that is
# nothing.
time_for() {
    local left=$((seconds - SECONDS - 15))
    limit=$(($1 < left ? $1 : left))
    [ "$limit" -gt 5 ] || { echo "no time for $2" && return 1; }
}

# ended STATUS WANTED STARTED LOG: says how a command ended that was given `limit` seconds of the WANTED ones. One that only the
# end of the time stopped is cut short, status 2, and has not failed, status 1.
ended() {
    local took=$((SECONDS - $3))
    case $1 in
        0) echo "done in $took s" ;;
        124 | 137)
            if [ "$limit" -lt "$2" ]; then
                echo "cut short after $took s: no time is left"
                return 2
            fi
            ;;&
        *)
            echo "FAILED with status $1 after $took s, see $4"
            tail -n 15 "$4"
            failed=1
            return 1
            ;;
    esac
}

# step SECONDS NAME COMMAND...: the command's whole output becomes NAME.log.
step() {
    local limit status wanted=$1 log="results/$2.log" started=$SECONDS
    time_for "$1" "$2" || return 0
    shift 2
    echo "== $*"
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    status=$?
    if [ "$status" -eq 0 ] && grep -q 'test result: ok. 0 passed' "$log"; then
        echo "no test has this name" >>"$log"
        status=1
    fi
    ended "$status" "$wanted" "$started" "$log"
}

# lines SECONDS NAME COMMAND...: measurements become NAME.jsonl, messages NAME.log; what an earlier run measured stays beside.
lines() {
    local limit wanted=$1 name=$2 started=$SECONDS
    time_for "$1" "$2" || return 0
    shift 2
    echo "== $*"
    [ ! -s "results/$name.jsonl" ] || mv "results/$name.jsonl" "results/$name-before-$(date +%s).jsonl"
    timeout -k 5 "$limit" "$@" >"results/$name.jsonl" 2>"results/$name.log"
    ended $? "$wanted" "$started" "results/$name.log"
    local how=$?
    if [ -s "results/$name.jsonl" ] || [ "$how" -eq 2 ]; then
        echo "$(wc -l <"results/$name.jsonl") measurements"
    else
        echo "FAILED: nothing was measured"
        failed=1
    fi
}

# sanitize SECONDS TOOL: compute-sanitizer on tests of whole layers.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "no compute-sanitizer: $2 is left out"
        return
    fi
    step "$1" "sanitizer-$2" compute-sanitizer --tool "$2" --error-exitcode 9 --report-api-errors no \
        ./test-cuda_layer device::every_form device::many_tokens --test-threads 1
}

pack() {
    python3 table.py results >results/results.md || failed=1
    tar -czf results.tar.gz results
    [ -z "${OUT:-}" ] || cp results/results.md results.tar.gz "$OUT" || failed=1
}

has_torch() {
    if [ -z "${torch:-}" ]; then
        torch=$(python3 -c 'import torch; print(torch.cuda.is_available())' 2>/dev/null) || torch=False
    fi
    [ "$torch" = True ] && return
    echo "no PyTorch with a GPU: $1"
    return 1
}

# What the device reaches, unless the caller has said it.
find_peak() {
    if [ ${#peak[@]} -gt 0 ] || ! has_torch "fractions of the floor are left out"; then return; fi
    lines 30 ceilings python3 gpu.py --ceilings
    [ -s results/ceilings.jsonl ] || return
    local found
    found=$(python3 -c 'import json; line = json.load(open("results/ceilings.jsonl")); print(line["tflops"], line["tbs"])') &&
        read -ra peak <<<"--peak $found"
}

{
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv
} >results/machine.txt 2>&1 || {
    echo "nvidia-smi failed: $(tail -n 1 results/machine.txt)"
    failed=1
}
nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu --format=csv -lms 500 \
    >results/clocks.csv 2>&1 &
clocks=$!
trap 'kill "$clocks" 2>/dev/null' EXIT

for what in "$@"; do
    case $what in
        tests)
            step 50 test-layer ./test-cuda_layer device:: --test-threads 1
            step 25 test-graph ./test-cuda_graph graph --test-threads 1
            step 20 test-ffi ./test-ffi layers_of_a_device --test-threads 1
            has_torch "the example in examples/pytorch is not run" &&
                step 30 test-pytorch python3 examples/pytorch/moepress_torch.py ./libmoepress.so
            if [ "$failed" -ne 0 ]; then
                sanitize 120 memcheck
                pack
                break
            fi
            ;;
        bench)
            find_peak
            lines 180 layer ./bench-cuda "${peak[@]}" --tokens 1,2,4,8,16,32,64,128,256,512,1024,4096,16384
            ;;
        peers)
            if has_torch "peers are not measured"; then
                step 30 peers-check python3 gpu.py --check
                lines 160 peers python3 gpu.py --tokens 1,8,32,128,512,4096,16384
            fi
            ;;
        kernels) lines 30 kernels ./bench-cuda --kernels --tokens 1,32,512,4096 ;;
        sanitizer)
            sanitize 60 memcheck
            # racecheck slows down most, and what it looks for the emulation has looked for.
            MOEPRESS_UNWRITTEN=1 sanitize 40 initcheck
            for tool in synccheck racecheck; do sanitize 40 "$tool"; done
            ;;
        *)
            echo "no step $what" >&2
            exit 2
            ;;
    esac
    pack
done
[ "$failed" -eq 0 ] && echo "all passed: results/results.md" || echo "something failed: see results/*.log"
exit "$failed"
