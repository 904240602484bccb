"""Times one MoE layer in moepress and in PyTorch, interleaved, and prints a table of medians and ratios.

    cargo bench --bench layer --no-run
    python benches/peers/compare.py path/to/the/built/layer [--shapes qwen,mixtral] [--threads 2] [--json out.json]

Needs torch in the Python that runs it. PyTorch multiplies bf16 weights by bf16 activations. moepress keeps activations in f32,
and where the processor multiplies bf16 a second column rounds them too (`MOEPRESS_CPU_ISA=amxbf16` or `avx512bf16`).
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

PEERS = ["eager", "grouped", "batched"]
ROUNDED = "moepress, bf16 inputs"


class Runner:
    """A process that runs a layer when asked."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{command}: not ready")

    @staticmethod
    def rounded(command):
        """Ours with bf16 inputs, or None where the processor has no instructions for that."""
        for isa in ["amxbf16", "avx512bf16"]:
            probe = subprocess.run([*command, isa], input="", capture_output=True, text=True)
            if probe.returncode == 0:
                return Runner([*command, isa])
        return None

    def __call__(self, tokens, runs):
        # Threads of the process before this one may still spin in wait of work.
        time.sleep(0.3)
        self.process.stdin.write(f"{tokens} {runs}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def machine():
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def measure(runners, tokens, rounds):
    """Medians of `rounds` runs each, taken in turns; None where a runner cannot do it."""
    times = {name: [] for name in runners}
    # A processor and its memory need some milliseconds to reach their speed, and a system some more to place threads.
    runs = {1: 100, 16: 5}.get(tokens, 1)
    for round_ in range(rounds + 1):
        for name, runner in runners.items():
            if times[name] is None:
                continue
            seconds = runner(tokens, runs)
            if seconds is None:
                times[name] = None
            elif round_ > 0:  # The first warms up.
                times[name] += seconds
    return {name: t and statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ours")
    parser.add_argument("--shapes", default="qwen,mixtral")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--tokens", default="1,16,512")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    peer = os.path.join(os.path.dirname(__file__), "torch_moe.py")
    cells = []
    print(f"{machine()}, {args.threads} threads\n")
    print(f"| layer | tokens | moepress ms | {ROUNDED} ms | " + " | ".join(f"torch {p} ms" for p in PEERS)
          + " | best torch / moepress | / bf16 inputs |")
    print("|---|--:|--:|--:|" + "--:|" * (len(PEERS) + 2))
    for shape in args.shapes.split(","):
        for dtype in args.dtypes.split(","):
            command = [args.ours, shape, dtype, "dense", args.threads]
            runners = {"moepress": Runner(command)}
            if dtype == "bf16" and (rounded := Runner.rounded(command)):
                runners[ROUNDED] = rounded
            # One torch process at a time holds the weights; all of them would not fit into memory.
            results = {}
            for name in PEERS:
                runners[name] = Runner([sys.executable, peer, shape, dtype, name, args.threads])
                for tokens in map(int, args.tokens.split(",")):
                    found = measure(runners, tokens, args.rounds)
                    results.setdefault(tokens, []).append(found)
                runners.pop(name).close()
            ours = list(runners)
            for name in ours:
                runners.pop(name).close()
            for tokens, found in results.items():
                cell = {name: next(f[name] for f in found if name in f) for name in PEERS}
                cell |= {name: statistics.median(f[name] for f in found) for name in ours}
                # Every peer against the runs of ours that it was interleaved with.
                ratios = {o: min(f[p] / f[o] for f in found for p in PEERS if f.get(p)) for o in ours}
                ms = [f"{cell[n] * 1e3:.2f}" if cell.get(n) else "–" for n in ["moepress", ROUNDED, *PEERS]]
                shown = [f"{ratios[n]:.2f}" if n in ratios else "–" for n in ["moepress", ROUNDED]]
                print(f"| {shape} {dtype} | {tokens} | {' | '.join(ms)} | {' | '.join(shown)} |", flush=True)
                cells.append({"shape": shape, "dtype": dtype, "tokens": tokens, "seconds": cell, "ratios": ratios})
    def mean(ratio):
        return math.exp(statistics.mean(math.log(ratio(cell["ratios"])) for cell in cells))

    print(f"\nGeometric mean of best torch / moepress: {mean(lambda r: r['moepress']):.2f};"
          f" with bf16 inputs for bf16 weights: {mean(lambda r: r.get(ROUNDED, r['moepress'])):.2f}\n")
    low_rank(args)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"machine": machine(), "threads": args.threads, "cells": cells}, out, indent=1)


def low_rank(args):
    """Low rank against our own dense layer; the bound is what bytes and operations of the experts allow."""
    forms = ["dense", "25", "50"]
    sizes = {"qwen": (2048, 1408), "mixtral": (4096, 14336), "small": (512, 352)}
    print("| layer, routed experts only | tokens | dense ms | 25 % ms | 50 % ms | speed-up 25 % (bound) | 50 % (bound) |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for shape in args.shapes.split(","):
        for dtype in args.dtypes.split(","):
            runners = {f: Runner([args.ours, shape + "-routed", dtype, f, args.threads]) for f in forms}
            hidden, width = sizes[shape]
            for tokens in map(int, args.tokens.split(",")):
                found = measure(runners, tokens, args.rounds)
                row = [f"{found[f] * 1e3:.2f}" for f in forms]
                for form in forms[1:]:
                    rank = min(hidden, width) * int(form) // 100
                    bound = hidden * width / (rank * (hidden + width))
                    row.append(f"{found['dense'] / found[form]:.2f} ({bound:.2f})")
                print(f"| {shape} {dtype} | {tokens} | {' | '.join(row)} |", flush=True)
            for runner in runners.values():
                runner.close()


if __name__ == "__main__":
    main()
