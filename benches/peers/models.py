"""Times whole checkpoints in moepress and in transformers, interleaved, and prints a table of medians and ratios.

    cargo bench --bench model --no-run
    python benches/peers/models.py path/to/the/built/model MODEL... [--threads 2]

Needs torch and transformers in the Python that runs it. transformers runs every model in f32 and in bf16, with each of its
implementations of experts; the best of them counts. Attention is torch's `sdpa`; tokens one by one go through the model
and its cache without `generate`, which would add to their time.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time

from compare import ROUNDED, Runner, machine

PEERS = [f"{dtype} {experts}" for dtype in ["f32", "bf16"] for experts in ["eager", "grouped_mm", "batched_mm"]]
# Prompt and new tokens: a whole prompt of one, 16 or 512 tokens, and tokens one by one after a short and a long prompt.
CASES = [(1, 0), (16, 0), (512, 0), (16, 32), (448, 32)]


def serve(folder, kind, threads):
    """transformers' side: runs a model as asked on standard input."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype, experts = kind.split()
    torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts).eval()
    vocabulary = model.config.vocab_size
    ids = torch.tensor([[(i * 2654435761 % 2**32 >> 12) % vocabulary for i in range(512)]])
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            prompt, new, runs = map(int, line.split())
            seconds = []
            for _ in range(runs):
                cache = model(ids[:, :prompt], use_cache=True).past_key_values if new else None
                start = time.perf_counter()
                if new == 0:
                    model(ids[:, :prompt], use_cache=True)
                for i in range(prompt, prompt + new):
                    cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
                seconds.append(time.perf_counter() - start)
            print(json.dumps(seconds), flush=True)


def measure(runners, case, rounds):
    """Medians of `rounds` runs each, taken in turns after one to warm up."""
    times = {name: [] for name in runners}
    for round_ in range(rounds + 1):
        for name, runner in runners.items():
            seconds = runner(f"{case[0]} {case[1]}", 1 if case[1] else 5)
            if round_ > 0:
                times[name] += seconds
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ours")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{machine()}, {args.threads} threads\n")
    print(f"| model | tokens | moepress ms | {ROUNDED} ms | best transformers ms | which | ratio | with bf16 inputs |")
    print("|---|---|--:|--:|--:|---|--:|--:|")
    ratios = []
    for folder in args.models:
        command = [args.ours, folder, args.threads]
        runners = {"moepress": Runner(command)}
        if rounded := Runner.rounded(command):
            runners[ROUNDED] = rounded
        for kind in PEERS:
            command = [sys.executable, __file__, "--serve", folder, kind, args.threads]
            runners[kind] = Runner(command)
        for case in CASES:
            found = measure(runners, case, args.rounds)
            best = min(PEERS, key=found.get)
            tokens = f"{case[1]} one by one after {case[0]}" if case[1] else f"{case[0]}"
            times = [found.get(o) for o in ["moepress", ROUNDED]]
            ms = [f"{t * 1e3:.2f}" if t else "–" for t in [*times, found[best]]]
            shown = [f"{found[best] / t:.2f}" if t else "–" for t in times]
            ratios.append([found[best] / (t or times[0]) for t in times])
            name = os.path.basename(os.path.normpath(folder))
            print(f"| {name} | {tokens} | {' | '.join(ms)} | {best} | {' | '.join(shown)} |", flush=True)
        for runner in runners.values():
            runner.close()
    means = [math.exp(statistics.mean(map(math.log, column))) for column in zip(*ratios)]
    print(f"\nGeometric mean: {means[0]:.2f}; with bf16 inputs: {means[1]:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
