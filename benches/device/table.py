"""Writes the measurements in a folder (layer.jsonl, kernels.jsonl, peers.jsonl, ceilings.jsonl) as Markdown tables.

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


def peer_cell(line):
    """µs; without the sort in brackets, where that was measured; a star where no graph was replayed."""
    without_sort = f" ({line['us_sorted']:.1f})" if "us_sorted" in line else ""
    return f"{line['us']:.1f}{'' if line['graph'] else '*'}{without_sort}"


def main(folder):
    names = "layer", "kernels", "peers", "ceilings"
    layers, kernels, peers, ceilings = (lines(folder / f"{name}.jsonl") for name in names)
    if layers:
        print(f"# MoE layers on {layers[0]['device']}\n")
    commit = folder.parent / "commit"
    if layers and commit.exists():
        print(f"Commit {commit.read_text().strip()}.\n")
    for line in ceilings:
        print(f"A large bf16 GEMM reaches {line['tflops']} TFLOP/s, a copy {line['tbs']} TB/s.\n")
    if layers:
        overlap = "start" if all(line["overlap"] for line in layers) else "do not start"
        print(f"Kernels of a pass {overlap} while those before them end.\n")
    for shape in dict.fromkeys(line["shape"] for line in layers):
        mine = [line for line in layers if line["shape"] == shape]
        print(f"## {shape}\n\nMedian time in µs, of a replayed graph but where there is a star; in brackets that of a peer whose pairs "
              "are sorted already.\n")
        forms = list(dict.fromkeys(line["form"] for line in mine))
        others = list(dict.fromkeys(line["peer"] for line in peers if line["shape"] == shape))
        rows = []
        for tokens in dict.fromkeys(line["tokens"] for line in mine):
            found = {line["form"]: f"{line['us']:.1f}" for line in mine if line["tokens"] == tokens}
            found |= {line["peer"]: peer_cell(line) for line in peers
                      if (line["shape"], line["tokens"]) == (shape, tokens)}
            rows.append([str(tokens), *(found.get(name, "") for name in [*forms, *others])])
        table(["tokens", *forms, *others], rows)
        head = ["tokens, form", "µs", "TFLOP/s", "GB/s", "of the floor"]
        rows = [[f"{line['tokens']}, {line['form']}", f"{line['us']:.1f}", f"{line['tflops']:.1f}", f"{line['gbs']:.0f}",
                 f"{100 * line['of_floor']:.0f} %" if "of_floor" in line else ""] for line in mine]
        table(head, rows)
    if kernels:
        print("## Kernels, median µs each\n")
    for line in kernels:
        parts = ", ".join(f"{name} {us:.1f}" for name, us in line["kernels"].items())
        print(f"* {line['shape']}, {line['form']}, {line['tokens']} tokens: {parts}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
