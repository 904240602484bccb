#!/usr/bin/env bash
# On a machine with a GPU, from the folder that pack.sh made: tests, benches, the peers where PyTorch is, and compute-sanitizer
# where it is installed. Writes results/: logs, JSON lines, results.md, and all of it as results.tar.gz, anew after every
# step. Ends with an error if something failed.
#
# Usage: run.sh [--seconds N] [--peak TFLOP/s TB/s] [STEP...]
# Steps, all of them without one, what is worth most first: tests bench peers kernels sanitizer. Together they end within N
# seconds, 570 without that; what there is no time for is left out. --peak is what the device reaches in a large bf16 GEMM
# and in a copy, for the fractions of the floor.
set -uo pipefail
cd "$(dirname "$0")"
seconds=570
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

# step SECONDS NAME COMMAND...: the command's whole output becomes NAME.log.
step() {
    local limit log="results/$2.log" started=$SECONDS
    time_for "$1" "$2" || return 0
    shift 2
    echo "== $*"
    if timeout -k 5 "$limit" "$@" >"$log" 2>&1 && ! grep -q 'test result: ok. 0 passed' "$log"; then
        echo "passed in $((SECONDS - started)) s"
    else
        echo "FAILED with status $? after $((SECONDS - started)) s, see $log"
        tail -n 15 "$log"
        failed=1
    fi
}

# lines SECONDS NAME COMMAND...: measurements become NAME.jsonl, messages NAME.log; what an earlier run measured stays beside.
lines() {
    local limit name=$2 started=$SECONDS
    time_for "$1" "$2" || return 0
    shift 2
    echo "== $*"
    [ ! -s "results/$name.jsonl" ] || mv "results/$name.jsonl" "results/$name-before-$(date +%s).jsonl"
    timeout -k 5 "$limit" "$@" >"results/$name.jsonl" 2>"results/$name.log" || {
        echo "FAILED with status $?"
        tail -n 15 "results/$name.log"
        failed=1
    }
    echo "$(wc -l <"results/$name.jsonl") measurements in $((SECONDS - started)) s"
}

pack() {
    python3 table.py results >results/results.md || failed=1
    tar -czf results.tar.gz results
}

has_torch() {
    python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && return
    echo "no PyTorch with a GPU: $1"
    return 1
}

{
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv
} >results/machine.txt 2>&1 || {
    echo "nvidia-smi failed: $(tail -n 1 results/machine.txt)"
    failed=1
}

for what in "$@"; do
    case $what in
        tests)
            step 100 test-layer ./test-cuda_layer device:: --test-threads 1
            step 60 test-graph ./test-cuda_graph graph --test-threads 1
            step 40 test-ffi ./test-ffi layers_of_a_device --test-threads 1
            has_torch "the example in examples/pytorch is not run" &&
                step 40 test-pytorch python3 examples/pytorch/moepress_torch.py ./libmoepress.so
            ;;
        bench) lines 180 layer ./bench-cuda "${peak[@]}" ;;
        peers)
            if has_torch "peers are not measured"; then
                step 40 peers-check python3 gpu.py --check
                lines 170 peers python3 gpu.py --tokens 1,4,16,64,256,1024,4096,16384
            fi
            ;;
        kernels) lines 60 kernels ./bench-cuda --kernels --tokens 1,32,512,4096 ;;
        sanitizer)
            if ! command -v compute-sanitizer >/dev/null; then
                echo "no compute-sanitizer: memory and races are not checked"
                continue
            fi
            # racecheck slows down most, and what it looks for the emulation has looked for.
            for tool in memcheck initcheck synccheck racecheck; do
                step 60 "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                    ./test-cuda_layer device::every_form device::many_tokens --test-threads 1
            done
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
