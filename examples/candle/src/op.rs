//! A prepared layer as an operation on tensors.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, bail};
use moepress::backend::cuda::{Device, DeviceBlock, LayerSpec, Memory, MoeLayer};
use moepress::checkpoint::{Tensor, Weight};

/// (x [tokens, hidden] bf16, ids [tokens, top_k] u32, weights [tokens, top_k] f32) -> [tokens, hidden] bf16, enqueued on
/// candle's stream. There is one workspace: for one stream at a time.
pub struct MoeOp {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "used where candle has CUDA"))]
    inner: Inner,
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "used where candle has CUDA"))]
struct Inner {
    layer: MoeLayer<DeviceBlock>,
    workspace: DeviceBlock,
    device: Arc<Device>,
}

impl MoeOp {
    /// A layer on a GPU, for batches of up to `max_tokens`.
    pub fn new(
        device: &Arc<Device>,
        spec: &LayerSpec<'_, Weight, Tensor>,
        max_tokens: usize,
    ) -> Result<Self> {
        let layer = MoeLayer::new(device, spec)?;
        let workspace = device.allocate(layer.workspace_bytes(max_tokens)?)?;
        Ok(MoeOp { inner: Inner { layer, workspace, device: Arc::clone(device) } })
    }
}

impl CustomOp3 for MoeOp {
    fn name(&self) -> &'static str {
        "moepress layer"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!(
            "the layer was prepared on {}: expected CUDA tensors, found CPU tensors",
            self.inner.device.name()
        )
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        ids: &candle_core::CudaStorage,
        ids_layout: &Layout,
        weights: &candle_core::CudaStorage,
        weights_layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::CudaStorage;
        use candle_core::cuda_backend::WrapErr;
        use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
        use half::bf16;
        use moepress::backend::cuda::{Block, Forward, Routing, Rows};

        let Inner { layer, workspace, device } = &self.inner;
        let (tokens, hidden) = x_layout.shape().dims2()?;
        let slots = layer.slots();
        for (what, layout, expected) in [
            ("x", x_layout, [tokens, layer.hidden()]),
            ("ids", ids_layout, [tokens, slots]),
            ("weights", weights_layout, [tokens, slots]),
        ] {
            if layout.dims() != expected || !layout.is_contiguous() {
                bail!("{what}: {:?}, expected {expected:?} without gaps", layout.shape());
            }
        }
        let stream = x.device.cuda_stream();
        // SAFETY: the layer writes all of it.
        let mut out = unsafe { x.device.alloc::<bf16>(tokens * hidden) }?;
        {
            // The guards tell candle's driver wrapper that the stream reads and writes the memory.
            let (x_start, _x) = x.as_cuda_slice::<bf16>()?.device_ptr(&stream);
            let (ids_start, _ids) = ids.as_cuda_slice::<u32>()?.device_ptr(&stream);
            let (weights_start, _weights) = weights.as_cuda_slice::<f32>()?.device_ptr(&stream);
            let (out_start, _out) = out.device_ptr_mut(&stream);
            let at =
                |start: u64, layout: &Layout, bytes: usize| start + (layout.start_offset() * bytes) as u64;
            let args = Forward {
                tokens,
                x: Rows { address: at(x_start, x_layout, 2), stride: hidden },
                out: Rows { address: out_start, stride: hidden },
                routing: Routing::Given {
                    ids: at(ids_start, ids_layout, 4),
                    weights: at(weights_start, weights_layout, 4),
                },
                residual: None,
                workspace: workspace.address(),
                workspace_bytes: workspace.bytes(),
            };
            // SAFETY: candle's stream, in the primary context that both use; its memory, of the shapes checked above.
            unsafe { layer.forward(&device.stream(stream.cu_stream().cast()), &args) }
                .map_err(candle_core::Error::wrap)?;
        }
        stream.context().check_err().w()?;
        Ok((CudaStorage::wrap_cuda_slice(out, x.device.clone()), Shape::from((tokens, hidden))))
    }
}
