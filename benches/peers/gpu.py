"""Other ways to run the experts of a MoE layer on a GPU, on the shapes of benches/cuda: bf16, uniform routing given as ids.

    python gpu.py [--shape NAME] [--tokens N,N]     one line of JSON per measurement
    python gpu.py --check                           compares each with float64 on a small layer; on the CPU too, where
                                                    Triton needs TRITON_INTERPRET=1
    python gpu.py --ceilings                        what the GPU reaches in a large bf16 GEMM and in a copy (bytes read and
                                                    written), as one line of JSON

Peers:
  loop          per expert two cuBLAS GEMMs (torch.mm), with counts read back to the host
  grouped       tokens sorted by expert, torch._grouped_mm
  grouped UV    the same with factors: four grouped GEMMs, ranks of 25, 50 and 75 % of full rank
  triton        two fused kernels: gather and GEMM with SwiGLU, GEMM and weighted scatter
  transformers  MixtralExperts with its `grouped_mm` implementation

Those without a read back are replayed as a CUDA graph, as ours is (where one cannot be captured, "graph" is false). "us" is
the time of all, as ours is; "us_sorted" that of the rest, where the order of the pairs (and the tiles) is there already. Times
are medians of up to 60 runs, each behind a write of 256 MiB: it empties the cache, and while it runs the rest is enqueued. A
peer whose packages are missing is left out, in one line on standard error; one that fails too, and at the end that is an error.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SHAPES = {
    "mixtral": dict(hidden=4096, width=14336, experts=8, top_k=2),
    "qwen1.5": dict(hidden=2048, width=1408, experts=60, top_k=4),
    "deepseek-v2-lite": dict(hidden=2048, width=1408, experts=64, top_k=6),
    "qwen3": dict(hidden=2048, width=768, experts=128, top_k=8),
}


def sort(ids, experts):
    """Pairs by expert: their order, their tokens, and where each expert's pairs end."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=experts) if flat.device.type == "cpu" else torch.histc(
        flat.float(), bins=experts, min=0, max=experts - 1)
    return order, order // ids.shape[1], ends.cumsum(0).to(torch.int32)


def places(order):
    """Where each pair has gone."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def combine(y, back, weights):
    """The weighted sum over a token's pairs."""
    return torch.bmm(weights[:, None].to(y.dtype), y[back].view(*weights.shape, -1)).squeeze(1)


class Peer:
    """`plan` is what routing alone decides, `run` the rest."""

    graph = True

    def __call__(self, x, ids, weights):
        return self.run(x, ids, weights, self.plan(ids))


class Loop(Peer):
    graph = False

    def __init__(self, gate_up, down):
        self.gate_up, self.down = gate_up, down

    def plan(self, ids):
        order, tokens, ends = sort(ids, len(self.down))
        return tokens, ends.tolist(), places(order)

    def run(self, x, ids, weights, plan):
        tokens, ends, back = plan
        y, start = torch.empty(len(tokens), x.shape[1], dtype=x.dtype, device=x.device), 0
        for e, end in enumerate(ends):
            if end > start:
                gate, up = (x[tokens[start:end]] @ self.gate_up[e].T).chunk(2, -1)
                y[start:end] = (F.silu(gate) * up) @ self.down[e].T
            start = end
        return combine(y, back, weights)


class Sorted(Peer):
    def plan(self, ids):
        order, tokens, ends = sort(ids, self.experts)
        return tokens, ends, places(order)


class Grouped(Sorted):
    def __init__(self, gate_up, down):
        self.experts, self.gate_up, self.down = len(down), gate_up.transpose(1, 2), down.transpose(1, 2)

    def run(self, x, ids, weights, plan):
        tokens, ends, back = plan
        gate, up = torch._grouped_mm(x[tokens], self.gate_up, ends).chunk(2, -1)
        return combine(torch._grouped_mm(F.silu(gate) * up, self.down, ends), back, weights)


class GroupedFactors(Sorted):
    """V of gate and up in one matrix; U of both as one block-diagonal product would double the work, so two calls."""

    def __init__(self, u, v, rank):
        (self.u_gate, self.u_up, self.u_down), (self.v_gate_up, self.v_down), self.rank = u, v, rank
        self.experts = len(self.u_down)

    def run(self, x, ids, weights, plan):
        tokens, ends, back = plan
        z = torch._grouped_mm(x[tokens], self.v_gate_up.transpose(1, 2), ends)
        gate = torch._grouped_mm(z[:, : self.rank], self.u_gate.transpose(1, 2), ends)
        up = torch._grouped_mm(z[:, self.rank :], self.u_up.transpose(1, 2), ends)
        z = torch._grouped_mm(F.silu(gate) * up, self.v_down.transpose(1, 2), ends)
        return combine(torch._grouped_mm(z, self.u_down.transpose(1, 2), ends), back, weights)


class Transformers(Peer):
    plan = None  # its own business

    def __init__(self, gate_up, down):
        from transformers import MixtralConfig
        from transformers.integrations.moe import grouped_mm_experts_forward
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        experts, width = gate_up.shape[0], gate_up.shape[1] // 2
        config = MixtralConfig(hidden_size=down.shape[1], intermediate_size=width, num_local_experts=experts)
        with torch.device("meta"):
            self.experts = MixtralExperts(config)
        self.experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        self.experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        self.forward = grouped_mm_experts_forward

    def __call__(self, x, ids, weights):
        return self.forward(self.experts, x, ids, weights.to(x.dtype))


if triton:

    @triton.jit
    def _experts(x, w, out, tile_expert, tile_row, order, ends, factors, N, K, top_k, GATED: tl.constexpr,
                 M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        """One tile of M pairs of one expert times BN rows of its weight; gated: of gate and of up, and SwiGLU."""
        expert = tl.load(tile_expert + tl.program_id(0))
        if expert < 0:
            return
        rows = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, M)
        real = rows < tl.load(ends + expert)
        pair = tl.load(order + rows, mask=real, other=0)
        source = pair // top_k if GATED else rows
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inner = tl.arange(0, BK)
        weight = w + expert.to(tl.int64) * N * K * (2 if GATED else 1) + columns[None, :] * K
        first = tl.zeros((M, BN), dtype=tl.float32)
        second = tl.zeros((M, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            inside = k + inner < K
            a = tl.load(x + source.to(tl.int64)[:, None] * K + k + inner[None, :],
                        mask=real[:, None] & inside[None, :], other=0.0)
            b_mask = inside[:, None] & (columns < N)[None, :]
            first += tl.dot(a, tl.load(weight + k + inner[:, None], mask=b_mask, other=0.0))
            if GATED:
                second += tl.dot(a, tl.load(weight + N * K + k + inner[:, None], mask=b_mask, other=0.0))
        mask = real[:, None] & (columns < N)[None, :]
        if GATED:
            first = first * tl.sigmoid(first) * second
            target = rows
        else:
            first *= tl.load(factors + pair, mask=real, other=0.0)[:, None]
            target = pair
        tl.store(out + target.to(tl.int64)[:, None] * N + columns[None, :], first.to(out.dtype.element_ty), mask=mask)


class Triton(Peer):
    # By pairs of a tile: weight rows, columns per step, warps.
    TILES = {16: (32, 64, 4), 32: (64, 64, 4), 64: (64, 32, 4), 128: (128, 64, 8)}

    def __init__(self, gate_up, down):
        if triton is None:
            raise ImportError("no module named triton")
        self.gate_up, self.down = gate_up, down

    def plan(self, ids):
        pairs, experts = ids.numel(), len(self.down)
        order, _, ends = sort(ids, experts)
        # Tiles per expert, made on the device: as many as there can be, those without work have expert -1.
        tile = next((m for m in (16, 32, 64) if m * experts >= 2 * pairs), 128)
        starts = F.pad(ends, (1, 0))[:-1]
        tiles = (ends - starts + tile - 1) // tile
        tile_ends = tiles.cumsum(0)
        number = torch.arange(pairs // tile + min(pairs, experts), device=ids.device)
        expert = torch.searchsorted(tile_ends, number, right=True)
        there = expert < experts
        safe = expert.clamp(max=experts - 1)
        row = starts[safe] + (number - (tile_ends - tiles)[safe]) * tile
        return tile, torch.where(there, expert, -1).to(torch.int32), row, order, ends

    def run(self, x, ids, weights, plan):
        tile, expert, row, order, ends = plan
        _, hidden, width = self.down.shape
        pairs, top_k = ids.numel(), ids.shape[1]
        columns, step, warps = self.TILES[tile]
        h = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
        y = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
        factors = weights.reshape(-1)
        common = dict(M=tile, BN=columns, BK=step, num_warps=warps)
        grid = lambda n: (len(expert), triton.cdiv(n, columns))
        _experts[grid(width)](x, self.gate_up, h, expert, row, order, ends, factors, width, hidden, top_k, GATED=True,
                              **common)
        _experts[grid(hidden)](h, self.down, y, expert, row, order, ends, factors, hidden, width, top_k, GATED=False,
                               **common)
        return y.view(*ids.shape, hidden).sum(1, dtype=torch.float32).to(x.dtype)


FAILURES = []


def failed(what, error):
    FAILURES.append(what)
    print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)


def noise(*shape, device):
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * shape[-1] ** -0.5


def peers(hidden, width, experts, device):
    """Name and implementation, one after the other, so that only one holds memory of its own."""
    gate_up, down = noise(experts, 2 * width, hidden, device=device), noise(experts, hidden, width, device=device)
    for name, kind in {"loop": Loop, "grouped": Grouped, "triton": Triton, "transformers": Transformers}.items():
        try:
            layer = kind(gate_up, down)
        except ImportError as error:
            print(f"skipped: {name}: {error}", file=sys.stderr)
            continue
        except Exception as error:
            failed(name, error)
            continue
        yield name, layer, (gate_up, down)
    del gate_up, down, layer
    for percent in (25, 50, 75):
        rank = (min(hidden, width) * percent // 100 + 15) // 16 * 16
        u = [noise(experts, rows, rank, device=device) for rows in (width, width, hidden)]
        v = noise(experts, 2 * rank, hidden, device=device), noise(experts, rank, width, device=device)
        products = torch.cat([u[0] @ v[0][:, :rank], u[1] @ v[0][:, rank:]], 1), u[2] @ v[1]
        yield f"grouped UV {percent} %", GroupedFactors(u, v, rank), products


def routing(tokens, experts, top_k, device):
    scores = torch.rand(tokens, experts, device=device).topk(top_k)
    return scores.indices, torch.full((tokens, top_k), 1 / top_k, device=device)


def check(device):
    torch.manual_seed(0)
    hidden, width, experts, top_k, tokens = 64, 96, 5, 2, 37
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    ids, weights = routing(tokens, experts, top_k, device)
    for name, layer, (gate_up, down) in peers(hidden, width, experts, device):
        expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
        for e in range(experts):
            gate, up = (x.double() @ gate_up[e].double().T).chunk(2, -1)
            factor = (weights.double() * (ids == e)).sum(1, keepdim=True)
            expected += factor * ((F.silu(gate) * up) @ down[e].double().T)
        given = x
        if name == "triton" and device == "cpu":
            # Triton's interpreter multiplies bf16 wrongly.
            given, layer = x.float(), Triton(gate_up.float(), down.float())
        try:
            error = ((layer(given, ids, weights).double() - expected).norm() / expected.norm()).item()
            assert error < 2e-2, f"relative error {error:.1e}"
            print(f"{name}: relative error {error:.1e}")
        except Exception as error:
            failed(name, error)


def timed(run, inputs=1):
    """Median microseconds of `run`, which is given 0 up to `inputs` by turns; as benches/cuda/timing.rs measures."""
    written = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def one(i):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        written.zero_()
        start.record()
        run(i % inputs)
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    begin, i, times = time.monotonic(), 0, []
    while i == 0 or time.monotonic() < begin + 0.05:
        one(i)
        i += 1
    begin = time.monotonic()
    while len(times) < 60 and (len(times) < 20 or time.monotonic() < begin + 0.5):
        times.append(one(len(times)))
    return statistics.median(times)


def measure(layer, runs):
    """Median microseconds, and whether a graph was replayed; `runs` are functions without arguments."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graphs = []
    try:
        for run in runs if layer.graph else ():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
    except Exception as error:
        print(f"no graph of {type(layer).__name__}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
        graphs = []
    if graphs:
        return timed(lambda i: graphs[i].replay(), len(graphs)), True
    return timed(lambda i: runs[i](), len(runs)), False


def measure_peer(layer, inputs):
    """What a line says; several inputs, so that a run does not find its experts in the cache."""
    us, graph = measure(layer, [lambda given=given: layer(*given) for given in inputs])
    line = dict(us=us, graph=graph)
    if layer.plan:
        plans = [layer.plan(ids) for _, ids, _ in inputs]
        runs = [lambda given=given, plan=plan: layer.run(*given, plan) for given, plan in zip(inputs, plans)]
        line["us_sorted"], _ = measure(layer, runs)
    return line


def ceilings():
    n, size = 4 << 30, 8192
    source, target = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    tbs = 2 * n / timed(lambda _: target.copy_(source)) / 1e6
    tflops = 2 * size**3 / timed(lambda _: a @ b) / 1e6
    print(json.dumps(dict(device=torch.cuda.get_device_name(), tflops=round(tflops, 1), tbs=round(tbs, 3))))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ceilings", action="store_true")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokens", default=",".join(str(1 << i) for i in range(15)))
    args = parser.parse_args()
    if args.check:
        return check("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        if os.environ.get("MOEPRESS_REQUIRE_GPU") == "1":
            sys.exit("MOEPRESS_REQUIRE_GPU=1: no GPU")
        return print("skipped: no GPU", file=sys.stderr)
    if args.ceilings:
        return ceilings()
    device = torch.cuda.get_device_name()
    for name, shape in SHAPES.items():
        if args.shape not in (None, name):
            continue
        top_k = shape["top_k"]
        for peer, layer, _ in peers(shape["hidden"], shape["width"], shape["experts"], "cuda"):
            for tokens in map(int, args.tokens.split(",")):
                inputs = [(noise(tokens, shape["hidden"], device="cuda"),
                           *routing(tokens, shape["experts"], top_k, "cuda")) for _ in range(3)]
                line = dict(device=device, shape=name, peer=peer, tokens=tokens)
                try:
                    line |= measure_peer(layer, inputs)
                except Exception as error:
                    failed(f"{peer}, {name}, {tokens} tokens", error)
                    continue
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
    if FAILURES:
        sys.exit(f"failed: {'; '.join(FAILURES)}")
