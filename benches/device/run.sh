#!/usr/bin/env bash
# On a machine with a GPU, from the folder that pack.sh made: tests, compute-sanitizer where it is installed, benches, and the
# peers where PyTorch is. Writes results/: logs, JSON lines, and results.md. Ends with an error if a test failed.
# Usage: run.sh [TFLOP/s TB/s], what the device reaches in a large bf16 GEMM and in a copy, for the fractions of the floor.
set -uo pipefail
cd "$(dirname "$0")"
mkdir -p results
export MOEPRESS_REQUIRE_GPU=1
failed=0
step() {
    local log="results/$1.log"
    shift
    echo "== $*"
    "$@" >"$log" 2>&1 || { failed=1; echo "FAILED, see $log"; tail -n 5 "$log"; }
}

nvidia-smi >results/machine.txt
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv >>results/machine.txt

step layer ./test-cuda_layer device:: --test-threads 1
step graph ./test-cuda_graph --test-threads 1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 ./test-cuda_layer device:: --test-threads 1
    done
else
    echo "no compute-sanitizer: memory and races are not checked"
fi
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    step pytorch python3 examples/pytorch/moepress_torch.py ./libmoepress.so
    step peers-check python3 gpu.py --check
fi

peak=()
[ $# -eq 2 ] && peak=(--peak "$1" "$2")
echo "== benches"
./bench-cuda "${peak[@]}" >results/layer.jsonl 2>results/bench.log || failed=1
./bench-cuda --kernels --tokens 1,32,512,4096 >results/kernels.jsonl 2>>results/bench.log || failed=1
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    python3 gpu.py >results/peers.jsonl 2>results/peers.log || failed=1
fi
python3 table.py results >results/results.md || failed=1
[ "$failed" -eq 0 ] && echo "all passed: results/results.md" || echo "something failed: see results/*.log"
exit "$failed"
