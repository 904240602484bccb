#!/usr/bin/env bash
# Packs what a GPU machine without cargo needs into a folder: test and bench binaries with the kernels in them, the C library,
# the peers, and run.sh. Needs nvcc. Usage: benches/device/pack.sh FOLDER [MIB]
# Says how large the folder is; larger than MIB is an error. Kernels are compiled for sm_90a (H100, H200), and as PTX for other
# GPUs, unless MOEPRESS_CUDA_ARCHES says otherwise; in a target folder of their own, so that they are no business of other builds.
set -euo pipefail
out="$(mkdir -p "$1" && cd "$1" && pwd)"
cd "$(dirname "$0")/../.."
export MOEPRESS_REQUIRE_CUDA=1 MOEPRESS_CUDA_ARCHES="${MOEPRESS_CUDA_ARCHES:-90a,+80}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/device"

# The executables that cargo names, by target.
executables() {
    cargo "$@" --message-format=json | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line) if line.startswith("{") else {}
    if message.get("executable") and message["target"]["kind"] != ["bin"]:
        print(message["target"]["name"], message["executable"])'
}
executables test --release --no-run --test cuda_layer --test cuda_graph --test ffi | while read -r name path; do
    cp "$path" "$out/test-$name"
done
executables bench --no-run --bench cuda | while read -r _ path; do cp "$path" "$out/bench-cuda"; done
cargo rustc --release --lib --crate-type cdylib
cp "$CARGO_TARGET_DIR/release/libmoepress.so" "$out"
for file in "$out"/test-* "$out/bench-cuda"; do strip "$file"; done
strip --strip-unneeded "$out/libmoepress.so"
mkdir -p "$out/examples/pytorch" "$out/include"
cp examples/pytorch/moepress_torch.py "$out/examples/pytorch"
cp include/moepress.h "$out/include"
cp benches/peers/gpu.py benches/device/table.py benches/device/run.sh "$out"
git rev-parse HEAD > "$out/commit"
du -ab "$out" | sort -n | awk '{ printf "%9.2f MiB  %s\n", $1 / 2^20, $2 }'
bytes=$(du -sb "$out" | cut -f1)
if [ $# -gt 1 ] && [ "$bytes" -gt $(($2 << 20)) ]; then
    echo "larger than $2 MiB" >&2
    exit 1
fi
echo "packed into $out: copy it to the GPU machine and start run.sh there"
