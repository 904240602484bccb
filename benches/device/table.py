"""Writes the measurements in a folder (layer.jsonl, kernels.jsonl, peers.jsonl) as Markdown tables.

    python table.py FOLDER
"""

import json
import pathlib
import sys


def lines(path):
    """The measurements in a file, if there is one; a run that was stopped may have left half a line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return found


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join("--" if i == 0 else "--:" for i in range(len(head))) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main(folder):
    layers, kernels, peers = (lines(folder / f"{name}.jsonl") for name in ("layer", "kernels", "peers"))
    if layers:
        print(f"# MoE layers on {layers[0]['device']}\n")
    commit = folder.parent / "commit"
    if layers and commit.exists():
        print(f"Commit {commit.read_text().strip()}.\n")
    for shape in dict.fromkeys(line["shape"] for line in layers):
        mine = [line for line in layers if line["shape"] == shape]
        print(f"## {shape}\n\nMedian time of a replayed graph in µs.\n")
        forms = list(dict.fromkeys(line["form"] for line in mine))
        others = list(dict.fromkeys(line["peer"] for line in peers if line["shape"] == shape))
        rows = []
        for tokens in dict.fromkeys(line["tokens"] for line in mine):
            found = {line["form"]: line["us"] for line in mine if line["tokens"] == tokens}
            found |= {line["peer"]: line["us"] for line in peers if (line["shape"], line["tokens"]) == (shape, tokens)}
            rows.append([str(tokens), *(f"{found[name]:.1f}" if name in found else "" for name in [*forms, *others])])
        table(["tokens", *forms, *others], rows)
        head = ["tokens, form", "µs", "TFLOP/s", "GB/s", "of the floor"]
        rows = [[f"{line['tokens']}, {line['form']}", f"{line['us']:.1f}", f"{line['tflops']:.1f}", f"{line['gbs']:.0f}",
                 f"{100 * line['of_floor']:.0f} %" if "of_floor" in line else ""] for line in mine]
        table(head, rows)
    if kernels:
        print("## Kernels, µs each\n")
    for line in kernels:
        parts = ", ".join(f"{name} {us:.1f}" for name, us in line["kernels"].items())
        print(f"* {line['shape']}, {line['form']}, {line['tokens']} tokens: {parts}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
