"""Times factorisations of one expert weight in moepress and in LAPACK, interleaved, and prints medians and ratios.

    cargo bench --bench factorise --no-run
    python benches/peers/lapack_svd.py path/to/the/built/factorise [--threads 2] [--shape 1408,2048] [--json out.json]

Needs numpy and scipy in the Python that runs it. The peer is the divide-and-conquer SVD (`gesdd`) of the LAPACK that scipy
comes with. *plain*: the best approximation of rank r in f32, U sqrt(S) and sqrt(S) Vᵀ. *whitened*: SVD-LLM in f64,
Cholesky factor of the second moment, SVD of the product, triangular solve. *experts*: eight plain ones, per matrix; ours
works on two at a time, LAPACK with both threads on one after the other. Random weights, whose spectra are the flattest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

KINDS = ["plain", "whitened", "experts"]


def serve(kind, rows, cols):
    """The peer: answers each line `percent runs` with a list of seconds."""
    import numpy as np
    from scipy import linalg

    random = np.random.default_rng(1)
    weight = random.standard_normal((rows, cols))
    if kind == "whitened":
        inputs = random.standard_normal((2 * cols, cols))
        gram = inputs.T @ inputs
    else:
        weight = weight.astype(np.float32)

    def svd(matrix):
        return linalg.svd(matrix, full_matrices=False, lapack_driver="gesdd", check_finite=False)

    def factors(rank):
        if kind != "whitened":
            u, s, v = svd(weight)
            root = np.sqrt(s[:rank])
            return u[:, :rank] * root, root[:, None] * v[:rank]
        factor = linalg.cholesky(gram, lower=True, check_finite=False)
        u, s, v = svd(weight @ factor)
        right = linalg.solve_triangular(factor, v[:rank].T, trans="T", lower=True, check_finite=False)
        return u[:, :rank] * s[:rank], right.T

    print("ready", flush=True)
    for line in sys.stdin:
        percent, runs = map(int, line.split())
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            factors(min(rows, cols) * percent // 100)
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def main():
    from compare import Runner, machine

    parser = argparse.ArgumentParser()
    parser.add_argument("ours")
    parser.add_argument("--shape", default="1408,2048")
    parser.add_argument("--percents", default="10,20,50")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows, cols = args.shape.split(",")
    os.environ.update(OPENBLAS_NUM_THREADS=args.threads, OMP_NUM_THREADS=args.threads)
    print(f"{machine()}, {args.threads} threads, {rows} x {cols}\n")
    print("| factors | rank | moepress ms | gesdd ms | gesdd / ours | quartiles of the ratio | loss above the optimum |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    cells = []
    for kind in KINDS:
        ours = Runner([args.ours, kind, rows, cols, args.threads])
        peer = Runner([sys.executable, __file__, "--serve", kind, rows, cols])
        for percent in map(int, args.percents.split(",")):
            pairs = []
            for round_ in range(args.rounds + 1):
                pair = ours(percent, 1)[0], peer(percent, 1)[0]
                if round_ > 0:  # The first warms up.
                    pairs.append(pair)
            mine, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
            # Pairs of runs next to each other, because other work on the machine comes and goes.
            low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            excess = ours(percent, 0)
            print(
                f"| {kind} | {percent} % | {mine * 1e3:.0f} | {theirs * 1e3:.0f} | {ratio:.2f} | {low:.2f} to {high:.2f} "
                f"| {max(excess, 0):.0e} |",
                flush=True,
            )
            cells.append({"kind": kind, "percent": percent, "ours": mine, "gesdd": theirs, "ratio": ratio, "excess": excess})
        ours.close()
        peer.close()
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"machine": machine(), "threads": args.threads, "shape": args.shape, "cells": cells}, out, indent=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
