#!/usr/bin/env bash
# Runs the emulated kernels under a sanitizer of the C++ compiler: `sanitize.sh address` or `sanitize.sh thread`.
#
# ThreadSanitizer sees the threads of a block as threads of their own, ordered only by the barriers and warp operations of
# the kernel, and so finds races in shared and global memory whose numbers come out right. Slow: a tier of its own,
# beside the ordinary tests. Further arguments go to the test runner, such as the name of a test.
set -euo pipefail
cd "$(dirname "$0")/../.."

kind=${1:-}
case $kind in
    address) library=libasan.so ;;
    thread) library=libtsan.so ;;
    *) echo "usage: $0 address|thread [test...]" >&2 && exit 2 ;;
esac
shift
preload=$("${CXX:-c++}" -print-file-name=$library)
if [[ $preload != /* ]]; then
    echo "skipped: ${CXX:-c++} has no $library"
    exit 0
fi

binary=$(cargo test --release --test emulation --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"name":"emulation".*"executable":"\([^"]*\)".*/\1/p')
export MOEPRESS_EMULATION_FLAGS="-fsanitize=$kind"
if [[ $kind == thread ]]; then
    export MOEPRESS_EMULATION_RUNTIME_FLAGS=-DEMULATION_THREAD_SANITIZER
else
    export MOEPRESS_EMULATION_RUNTIME_FLAGS=$MOEPRESS_EMULATION_FLAGS
fi
export ASAN_OPTIONS=detect_leaks=0:handle_segv=0:detect_stack_use_after_return=0
export TSAN_OPTIONS=halt_on_error=1:exitcode=66:report_thread_leaks=0:history_size=2:ignore_noninstrumented_modules=1
# The faults are there to be caught by the ordinary tests. A guard page ends the process under a sanitizer.
setarch "$(uname -m)" -R env LD_PRELOAD="$preload" "$binary" --test-threads=1 \
    --skip faults_of --skip launches_are_checked "$@"
