"""Runs examples/pytorch/moepress_torch.py without a GPU: on the stand-in for the driver (tests/emulation/driver.cpp), whose
device memory is memory of the host, with CPU tensors and what of torch.cuda the example uses put in its place.

    python torch_stand_in.py libmoepress.so        with the stand-in's folder in LD_LIBRARY_PATH
"""

import contextlib
import ctypes
import pathlib
import sys
import types

import torch

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "pytorch"
sys.path.insert(0, str(EXAMPLE))
import moepress_torch

raw = ctypes.CDLL("libcuda.so.1")


def driver(name, *arguments):
    status = getattr(raw, name)(*arguments)
    assert status == 0, f"{name}: {status}"


class Graph:
    def replay(self):
        driver("cuGraphLaunch", self.runnable, stream)
        driver("stand_in_finish")


@contextlib.contextmanager
def capture(graph):
    captured, graph.runnable = ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=stream.value)
    driver("cuStreamBeginCapture_v2", stream, 0)
    yield
    driver("cuStreamEndCapture", stream, ctypes.byref(captured))
    driver("cuGraphInstantiateWithFlags", ctypes.byref(graph.runnable), captured, ctypes.c_uint64(0))
    driver("cuGraphDestroy", captured)


def on_cpu(make):
    def made(*shape, device="cpu", **options):
        if options.get("dtype") == torch.uint8:
            # A workspace begins at a multiple of 256 bytes, as all memory of a GPU does.
            block = make(shape[0] + 255, **options)
            return block[-block.data_ptr() % 256 :][: shape[0]]
        return make(*shape, **options)

    return made


def finished(call):
    """Outside of a capture the example's next line sees what the layer wrote."""
    def called(layer, *arguments, out=None):
        found = call(layer, *arguments, out=out)
        if out is None:
            driver("stand_in_finish")
        return found

    return called


context, stream = ctypes.c_void_p(), ctypes.c_void_p()
driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
driver("cuCtxSetCurrent", context)
driver("cuStreamCreate", ctypes.byref(stream), 1)
torch.empty, torch.rand, torch.randn = map(on_cpu, (torch.empty, torch.rand, torch.randn))
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=None)
torch.cuda.synchronize = lambda device=None: driver("stand_in_finish")
torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
moepress_torch.MoeLayer.__call__ = finished(moepress_torch.MoeLayer.__call__)
moepress_torch.main()
driver("cuStreamDestroy_v2", stream)
driver("cuDevicePrimaryCtxRelease_v2", 0)
