#!/usr/bin/env bash
# On a machine with a GPU, from the folder that pack.sh made: tests, compute-sanitizer where it is installed, benches, and the
# peers where PyTorch is. Writes results/: logs, JSON lines, results.md, and all of it as results.tar.gz. Ends with an error
# if something failed.
#
# Usage: run.sh [--peak TFLOP/s TB/s] [STEP...]
# Steps, all of them without one: tests sanitizer bench kernels peers. Each ends within 9 minutes. --peak is what the device
# reaches in a large bf16 GEMM and in a copy, for the fractions of the floor.
set -uo pipefail
cd "$(dirname "$0")"
peak=()
if [ "${1:-}" = --peak ]; then
    [ $# -ge 3 ] || { echo "--peak needs two numbers: TFLOP/s and TB/s" >&2 && exit 2; }
    peak=(--peak "$2" "$3")
    shift 3
fi
[ $# -eq 0 ] && set -- tests sanitizer bench kernels peers
mkdir -p results
export MOEPRESS_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
failed=0

# step SECONDS NAME COMMAND...: the command's whole output becomes NAME.log.
step() {
    local limit=$1 log="results/$2.log" started=$SECONDS
    shift 2
    echo "== $*"
    if timeout -k 10 "$limit" "$@" >"$log" 2>&1 && ! grep -q 'test result: ok. 0 passed' "$log"; then
        echo "passed in $((SECONDS - started)) s"
    else
        echo "FAILED with status $? after $((SECONDS - started)) s, see $log"
        tail -n 15 "$log"
        failed=1
    fi
}

# lines SECONDS NAME COMMAND...: measurements become NAME.jsonl, messages NAME.log; what an earlier run measured stays beside.
lines() {
    local limit=$1 name=$2 started=$SECONDS
    shift 2
    echo "== $*"
    [ ! -s "results/$name.jsonl" ] || mv "results/$name.jsonl" "results/$name-before-$(date +%s).jsonl"
    timeout -k 10 "$limit" "$@" >"results/$name.jsonl" 2>"results/$name.log" || {
        echo "FAILED with status $?"
        tail -n 15 "results/$name.log"
        failed=1
    }
    echo "$(wc -l <"results/$name.jsonl") measurements in $((SECONDS - started)) s"
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
            step 150 test-layer ./test-cuda_layer device:: --test-threads 1
            step 100 test-graph ./test-cuda_graph graph --test-threads 1
            step 60 test-ffi ./test-ffi layers_of_a_device --test-threads 1
            has_torch "the example in examples/pytorch is not run" &&
                step 120 test-pytorch python3 examples/pytorch/moepress_torch.py ./libmoepress.so
            ;;
        sanitizer)
            if ! command -v compute-sanitizer >/dev/null; then
                echo "no compute-sanitizer: memory and races are not checked"
                continue
            fi
            for tool in memcheck racecheck initcheck synccheck; do
                step 130 "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                    ./test-cuda_layer device::every_form device::deltas device::routers device::two_matrices --test-threads 1
            done
            ;;
        bench) lines 540 layer ./bench-cuda "${peak[@]}" ;;
        kernels) lines 300 kernels ./bench-cuda --kernels --tokens 1,32,512,4096 ;;
        peers)
            if has_torch "peers are not measured"; then
                step 100 peers-check python3 gpu.py --check
                lines 440 peers python3 gpu.py
            fi
            ;;
        *)
            echo "no step $what" >&2
            exit 2
            ;;
    esac
done
python3 table.py results >results/results.md || failed=1
tar -czf results.tar.gz results
[ "$failed" -eq 0 ] && echo "all passed: results/results.md" || echo "something failed: see results/*.log"
exit "$failed"
