"""MoE layers of moepress in PyTorch: include/moepress.h through ctypes, on the current CUDA stream.

    cargo rustc --release --lib --crate-type cdylib
    python examples/pytorch/moepress_torch.py target/release/libmoepress.so

runs a layer of dense and low-rank experts, captures it in a CUDA graph, and compares both with PyTorch. Without a GPU it
checks what can be checked: that the structures below are the header's, that the library loads, and that it says why there
is no GPU. `--structures` checks the structures alone and needs neither PyTorch nor the library.
"""

import ctypes
import pathlib
import re
import sys
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_size_t, c_void_p, sizeof

HEADER = pathlib.Path(__file__).resolve().parents[2] / "include" / "moepress.h"
ABI_VERSION = 1
EXPERT_MLP, DENSE, LOW_RANK, HOST = 1, 0, 1, 0


class Matrix(Structure):
    c_name = "moepress_matrix"
    _fields_ = [("form", c_int32), ("rank", c_int32), ("weight", c_void_p), ("weight_stride", c_int64),
                ("v", c_void_p), ("v_stride", c_int64), ("bias", c_void_p), ("sparse_rows", c_void_p),
                ("sparse", c_void_p), ("sparse_stride", c_int64), ("sparse_count", c_int32), ("reserved", c_int32)]


class Expert(Structure):
    c_name = "moepress_expert"
    _fields_ = [("form", c_int32), ("width", c_int32), ("alias_of", c_int32), ("reserved", c_int32),
                ("constant", c_void_p), ("gate", Matrix), ("up", Matrix), ("down", Matrix)]


class LayerSpec(Structure):
    c_name = "moepress_layer_spec"
    _fields_ = [("struct_size", c_size_t), ("hidden", c_int32), ("dtype", c_int32), ("location", c_int32),
                ("top_k", c_int32), ("experts_count", c_int32), ("activation", c_int32), ("limit", c_float),
                ("slope", c_float), ("weights_multiply_inputs", c_int32), ("expert_map_count", c_int32),
                ("expert_map", c_void_p), ("experts", POINTER(Expert)), ("shared", POINTER(Expert)),
                ("shared_gate", c_void_p), ("router", c_void_p), ("bases", POINTER(Matrix)), ("base_width", c_int32),
                ("reserved", c_int32)]


class ForwardArgs(Structure):
    c_name = "moepress_forward_args"
    _fields_ = [("struct_size", c_size_t), ("tokens", c_int64), ("x", c_void_p), ("x_stride", c_int64),
                ("out", c_void_p), ("out_stride", c_int64), ("residual", c_void_p), ("residual_stride", c_int64),
                ("routing", c_int32), ("reserved", c_int32), ("ids", c_void_p), ("weights", c_void_p),
                ("logits", c_void_p), ("logits_stride", c_int64), ("workspace", c_void_p),
                ("workspace_bytes", c_size_t)]


def check_structures():
    """The fields above are the header's, in its order and of its types."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    assert f"#define MOEPRESS_ABI_VERSION {ABI_VERSION}\n" in text
    types = {c_int32: "int32_t", c_int64: "int64_t", c_size_t: "size_t", c_float: "float", Matrix: "moepress_matrix"}
    for structure in (Matrix, Expert, LayerSpec, ForwardArgs):
        body = re.search(r"typedef struct " + structure.c_name + r" \{(.*?)\}", text, re.S).group(1)
        expected = []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            kind, names = re.match(r"(?:const )?(\w+)\s*(.*)", declaration, re.S).groups()
            for name in names.split(","):
                expected.append((name.strip(" *"), "pointer" if "*" in name else kind))
        found = [(name, types.get(kind, "pointer")) for name, kind in structure._fields_]
        assert found == expected, f"{structure.c_name}: {found}, the header has {expected}"


class Library:
    """The functions of the header; a status other than 0 becomes an exception."""

    def __init__(self, path):
        self.raw = ctypes.CDLL(str(path))
        self.raw.moepress_last_error.restype = ctypes.c_char_p
        if self.raw.moepress_abi_version() != ABI_VERSION:
            raise RuntimeError(f"{path} has another ABI version than {ABI_VERSION}")

    def __call__(self, name, *arguments):
        if getattr(self.raw, "moepress_" + name)(*arguments) != 0:
            raise RuntimeError(self.raw.moepress_last_error().decode())


class MoeLayer:
    """experts: a list of (gate, up, down), each a CPU tensor [out, in] or a pair (U [out, rank], V [rank, in])."""

    def __init__(self, library, experts, top_k, max_tokens, device=0):
        import torch

        self.library, self.torch, self.device, self.top_k = library, torch, device, top_k
        self.handle, gpu = c_void_p(), c_void_p()
        first = experts[0][2]
        first = first if torch.is_tensor(first) else first[0]
        self.hidden, self.dtype = first.shape[0], first.dtype
        kept = []

        def matrix(weight):
            factors = [weight] if torch.is_tensor(weight) else list(weight)
            kept.extend(factor.contiguous() for factor in factors)
            pointers = [factor.data_ptr() for factor in kept[-len(factors):]]
            if len(factors) == 1:
                return Matrix(form=DENSE, weight=pointers[0])
            return Matrix(form=LOW_RANK, rank=factors[1].shape[0], weight=pointers[0], v=pointers[1])

        def width(gate):
            return (gate if torch.is_tensor(gate) else gate[0]).shape[0]

        table = (Expert * len(experts))(*[
            Expert(form=EXPERT_MLP, width=width(gate), gate=matrix(gate), up=matrix(up), down=matrix(down))
            for gate, up, down in experts
        ])
        dtypes = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
        spec = LayerSpec(struct_size=sizeof(LayerSpec), hidden=self.hidden, dtype=dtypes[self.dtype], location=HOST,
                         top_k=top_k, experts_count=len(experts), experts=table)
        library("device_open", c_int32(device), byref(gpu))
        try:
            library("layer_create", gpu, byref(spec), byref(self.handle))
        finally:
            library.raw.moepress_device_close(gpu)
        needed = c_size_t()
        library("layer_workspace_bytes", self.handle, c_int64(max_tokens), byref(needed))
        self.workspace = torch.empty(needed.value, dtype=torch.uint8, device=f"cuda:{device}")

    def __call__(self, x, ids, weights, out=None):
        """x [tokens, hidden], ids int32 and weights float32 [tokens, top_k], all on the GPU and contiguous."""
        torch = self.torch
        assert x.dtype == self.dtype and ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert x.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()
        assert x.shape[1] == self.hidden and ids.shape == weights.shape == (x.shape[0], self.top_k)
        out = torch.empty_like(x) if out is None else out
        args = ForwardArgs(struct_size=sizeof(ForwardArgs), tokens=x.shape[0], x=x.data_ptr(), out=out.data_ptr(),
                           ids=ids.data_ptr(), weights=weights.data_ptr(), workspace=self.workspace.data_ptr(),
                           workspace_bytes=self.workspace.numel())
        stream = torch.cuda.current_stream(x.device).cuda_stream
        self.library("layer_forward", self.handle, byref(args), c_void_p(stream))
        return out

    def __del__(self):
        if getattr(self, "handle", None):
            self.torch.cuda.synchronize(self.device)
            self.library.raw.moepress_layer_destroy(self.handle)


def reference(experts, x, ids, weights):
    """What the layer computes, in float64."""
    import torch

    def dense(weight):
        return (weight if torch.is_tensor(weight) else weight[0].double() @ weight[1].double()).double().to(x.device)

    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e, matrices in enumerate(experts):
        gate, up, down = map(dense, matrices)
        factor = (weights.double() * (ids == e)).sum(1, keepdim=True)
        hidden = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
        out += factor * (hidden @ down.T)
    return out


def main():
    check_structures()
    if sys.argv[1:] == ["--structures"]:
        return print("the structures are the header's")
    library = Library(sys.argv[1])
    try:
        library("device_count", byref(c_int32()))
    except RuntimeError as why:
        return print(f"no layer is run: {why}")
    import torch

    torch.manual_seed(0)
    hidden, width, count, top_k, tokens = 256, 384, 8, 2, 100

    def noise(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()

    def matrix(e, rows, cols):
        return noise(rows, cols) if e % 2 == 0 else (noise(rows, 48), noise(48, cols))

    experts = [(matrix(e, width, hidden), matrix(e, width, hidden), matrix(e, hidden, width)) for e in range(count)]
    layer = MoeLayer(library, experts, top_k, max_tokens=tokens)

    def inputs():
        scores = torch.rand(tokens, count, device="cuda").topk(top_k)
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        return x, scores.indices.int().contiguous(), scores.values.float().contiguous()

    def check(name, found, given):
        expected = reference(experts, *given)
        error = ((found.double() - expected).norm() / expected.norm()).item()
        print(f"{name}: relative error {error:.1e}")
        assert error < 2e-2

    given = inputs()
    check("forward", layer(*given), given)
    # A graph holds addresses: new inputs are copied to where the old ones were.
    static, out = [tensor.clone() for tensor in given], torch.empty_like(given[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(*static, out=out)
    for replay in range(3):
        given = inputs()
        for old, new in zip(static, given):
            old.copy_(new)
        graph.replay()
        check(f"replay {replay}", out, given)


if __name__ == "__main__":
    main()
