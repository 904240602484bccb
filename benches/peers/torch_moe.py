"""PyTorch's side of compare.py: one MoE layer on the CPU with synthetic weights, run as asked on standard input.

Arguments: shape, dtype (f32 or bf16), implementation, threads. Each input line `tokens runs` is answered by a JSON list
of seconds, or null where the implementation cannot do it.

Implementations, all with the gate and up projections of an expert in one matrix, as transformers 5 stores them:
  eager    a loop over the experts that were hit (transformers' default on the CPU)
  grouped  tokens sorted by expert and torch._grouped_mm (transformers' `grouped_mm`)
  batched  the weights of every token's experts gathered, then torch.bmm (transformers' `batched_mm`)
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

SHAPES = {
    "qwen": dict(hidden=2048, width=1408, experts=60, top_k=4, shared=5632),
    "mixtral": dict(hidden=4096, width=14336, experts=4, top_k=2, shared=0),
    "small": dict(hidden=512, width=352, experts=16, top_k=4, shared=1408),
}
GATHER_LIMIT = 6 << 30


class Layer:
    def __init__(self, hidden, width, experts, top_k, shared, dtype):
        def weight(*shape):
            scale = (3.0 / shape[-1]) ** 0.5
            return torch.empty(shape, dtype=dtype).uniform_(-scale, scale)

        self.top_k, self.experts = top_k, experts
        self.router = weight(experts, hidden)
        self.gate_up, self.down = weight(experts, 2 * width, hidden), weight(experts, hidden, width)
        self.shared = None
        if shared:
            self.shared = weight(shared, hidden), weight(shared, hidden), weight(hidden, shared), weight(1, hidden)

    def route(self, x):
        probabilities = F.softmax(F.linear(x, self.router), dim=-1, dtype=torch.float)
        weights, ids = torch.topk(probabilities, self.top_k, dim=-1)
        return ids, (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)

    def eager(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.experts).permute(2, 1, 0)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            expert = expert[0]
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[expert])
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out

    def grouped(self, x, ids, weights):
        tokens = torch.arange(len(x)).repeat_interleave(self.top_k)
        flat = ids.reshape(-1)
        order = torch.argsort(flat)
        back = torch.argsort(order)
        counts = torch.histc(flat.float(), bins=self.experts, min=0, max=self.experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = x[tokens[order]]
        gate, up = torch._grouped_mm(rows, self.gate_up.transpose(-2, -1), offs=offsets).chunk(2, dim=-1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(-2, -1), offs=offsets)
        y = y * weights.reshape(-1)[order, None]
        return y[back].view(len(x), self.top_k, -1).sum(dim=1).to(x.dtype)

    def batched(self, x, ids, weights):
        flat = ids.reshape(-1)
        gate_up, down = self.gate_up[flat], self.down[flat]
        rows = x.repeat_interleave(self.top_k, dim=0)
        gate, up = torch.bmm(gate_up, rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        y = torch.bmm(down, (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(len(x), self.top_k, -1).sum(dim=1).to(x.dtype)

    def run(self, implementation, x):
        out = getattr(self, implementation)(x, *self.route(x))
        if self.shared:
            gate, up, down, scalar = self.shared
            y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            out = out + torch.sigmoid(F.linear(x, scalar)) * y
        return out


def main():
    shape, dtype, implementation, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(1)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    sizes = SHAPES[shape]
    layer = Layer(**sizes, dtype=dtype)
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            tokens, runs = map(int, line.split())
            expert_bytes = 3 * sizes["hidden"] * sizes["width"] * dtype.itemsize
            if implementation == "batched" and tokens * sizes["top_k"] * expert_bytes > GATHER_LIMIT:
                print("null", flush=True)
                continue
            x = torch.randn(tokens, sizes["hidden"]).to(dtype)
            seconds = []
            try:
                for _ in range(runs):
                    start = time.perf_counter()
                    layer.run(implementation, x)
                    seconds.append(time.perf_counter() - start)
            except RuntimeError as error:
                print(f"{implementation} {dtype}: {error}", file=sys.stderr)
                seconds = None
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
