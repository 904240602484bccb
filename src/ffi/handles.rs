//! What the handles of the header stand for.

use std::ffi::c_void;
use std::sync::Arc;

use super::convert::{self, Source, count, wrong};
use super::router::OwnedRouter;
use super::types::{ForwardArgs, LayerSpec};
use crate::architecture::WeightTarget;
use crate::backend::cuda::{
    self, Block, Error, Forward, Launch, LayerMatrix, LayerVector, Memory, MoeLayer, Result, Routing, Rows,
    SharedExpert,
};

/// What a device handle stands for: a GPU, or the emulation of one in the tests.
#[doc(hidden)]
pub trait Gpu: Send + Sync {
    /// Device memory.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>>;

    /// Calls `enqueue` with a stream.
    ///
    /// # Safety
    /// `raw` is a stream of the device.
    unsafe fn on_stream(
        &self,
        raw: *mut c_void,
        enqueue: &mut dyn FnMut(&dyn Launch) -> Result<()>,
    ) -> Result<()>;
}

impl Gpu for Arc<cuda::Device> {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>> {
        Ok(Box::new(Memory::allocate(self, bytes)?))
    }

    unsafe fn on_stream(
        &self,
        raw: *mut c_void,
        enqueue: &mut dyn FnMut(&dyn Launch) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        enqueue(&unsafe { self.stream(raw) })
    }
}

/// `moepress_device`.
pub struct Device(Arc<dyn Gpu>);

impl Memory for Device {
    type Block = Box<dyn Block>;

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>> {
        self.0.allocate(bytes)
    }
}

/// A handle of a device of any kind, for `moepress_device_close` to close.
#[doc(hidden)]
pub fn device_handle(gpu: impl Gpu + 'static) -> *mut Device {
    Box::into_raw(Box::new(Device(Arc::new(gpu))))
}

/// `moepress_layer`.
pub struct Layer {
    // Dropped before the device that its memory belongs to.
    pub(super) layer: MoeLayer<Box<dyn Block>>,
    device: Arc<dyn Gpu>,
}

impl Layer {
    /// # Safety
    /// All pointers of `spec` are null or what the header says.
    pub(super) unsafe fn new(device: &Device, spec: &LayerSpec) -> Result<Self> {
        let layer = match spec.location {
            // SAFETY: the caller's promise.
            0 => unsafe { create::<convert::Host>(device, spec) },
            // SAFETY: as above.
            1 => unsafe { create::<convert::Device>(device, spec) },
            other => Err(wrong("location", other.to_string(), "a moepress_location")),
        };
        Ok(Layer { layer: layer?, device: Arc::clone(&device.0) })
    }

    /// # Safety
    /// All pointers of `args` are what the header says, `stream` is a stream of the device.
    pub(super) unsafe fn forward(&self, args: &ForwardArgs, stream: *mut c_void) -> Result<()> {
        let Layer { layer, device } = self;
        let args = forward_args(layer, args)?;
        // SAFETY: the caller's promise.
        unsafe { device.on_stream(stream, &mut |launch| layer.forward(launch, &args)) }
    }
}

/// # Safety
/// As for [`Layer::new`].
unsafe fn create<S: Source>(device: &Device, spec: &LayerSpec) -> Result<MoeLayer<Box<dyn Block>>>
where
    for<'a> LayerMatrix<'a>: From<&'a S::Matrix>,
    for<'a> LayerVector<'a>: From<&'a S::Vector>,
{
    let hidden = count(spec.hidden, "hidden")?;
    let top_k = count(spec.top_k, "top_k")?;
    let element = convert::element(spec.dtype)?;
    let common = convert::Common { hidden, element, activation: convert::activation(spec)? };
    let target = match spec.weights_multiply_inputs {
        0 => WeightTarget::Output,
        _ => WeightTarget::Input,
    };
    let experts_count = count(spec.experts_count, "experts_count")?;
    let mapped = count(spec.expert_map_count, "expert_map_count")?;
    let rows = if mapped > 0 { mapped } else { experts_count };
    // SAFETY: the caller's promise, for everything that is read here.
    let (experts, base, map, shared, gate, router) = unsafe {
        let given = convert::list(spec.experts, experts_count, "experts")?.iter().enumerate();
        let experts = given.map(|(e, expert)| convert::expert::<S>(expert, common, &format!("experts[{e}]")));
        let experts = experts.collect::<Result<Vec<_>>>()?;
        let base = convert::bases::<S>(spec, hidden, element)?;
        let map = convert::list(spec.expert_map, mapped, "expert_map")?;
        let shared = spec.shared.as_ref().map(|shared| convert::expert::<S>(shared, common, "shared"));
        let gate = convert::tensor(spec.shared_gate, &[hidden], "shared_gate")?;
        let router = if spec.router.is_null() {
            None
        } else {
            let router = convert::sized(spec.router, "router")?;
            Some(OwnedRouter::new(&router, [rows, hidden, top_k], target)?)
        };
        (experts, base, map, shared.transpose()?, gate, router)
    };
    let map: Vec<Option<usize>> = map.iter().map(|&e| usize::try_from(e).ok()).collect();
    MoeLayer::new(
        device,
        &cuda::LayerSpec {
            hidden,
            element,
            top_k,
            experts: &experts,
            base: &base,
            expert_map: (mapped > 0).then_some(&map[..]),
            shared: shared.as_ref().map(|expert| SharedExpert { expert, gate: gate.as_ref() }),
            router: router.as_ref().map(OwnedRouter::borrow),
            target,
        },
    )
}

fn forward_args<B>(layer: &MoeLayer<B>, args: &ForwardArgs) -> Result<Forward> {
    let stride = |stride: i64, default: usize, what: &str| {
        count(stride, what).map(|stride| if stride == 0 { default } else { stride })
    };
    let rows = |address: *const c_void, given: i64, what: &str| {
        Ok::<_, Error>(Rows { address: address as u64, stride: stride(given, layer.hidden(), what)? })
    };
    let residual = rows(args.residual, args.residual_stride, "residual_stride")?;
    Ok(Forward {
        tokens: count(args.tokens, "tokens")?,
        x: rows(args.x, args.x_stride, "x_stride")?,
        out: rows(args.out, args.out_stride, "out_stride")?,
        residual: (residual.address != 0).then_some(residual),
        routing: match args.routing {
            0 => Routing::Given { ids: args.ids as u64, weights: args.weights as u64 },
            1 => Routing::Logits {
                address: args.logits as u64,
                stride: stride(args.logits_stride, layer.logits().unwrap_or(0), "logits_stride")?,
            },
            2 => Routing::Router,
            other => return Err(wrong("routing", other.to_string(), "a moepress_routing")),
        },
        workspace: args.workspace as u64,
        workspace_bytes: args.workspace_bytes,
    })
}
