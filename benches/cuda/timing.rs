//! Times on the device: CUDA graphs between events, or events around each kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent_flags as EventFlags, CUstreamCaptureMode as CaptureMode};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};
use moepress::backend::cuda::{Device, Error, Launch, Result, Stream};

/// A GPU with a stream.
pub(crate) struct Gpu {
    pub(crate) device: Arc<Device>,
    stream: Arc<CudaStream>,
}

/// A captured forward pass.
pub(crate) struct Graph(sys::CUgraphExec);

fn failed(what: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Driver { what: what.into(), code: format!("{:?}", error.0) }
}

fn event() -> Result<sys::CUevent> {
    result::event::create(EventFlags::CU_EVENT_DEFAULT).map_err(failed("an event"))
}

impl Gpu {
    pub(crate) fn new(device: Arc<Device>) -> Result<Self> {
        let context = CudaContext::new(0).map_err(failed("the context"))?;
        let stream = context.new_stream().map_err(failed("a stream"))?;
        Ok(Gpu { device, stream })
    }

    fn launcher(&self) -> Stream {
        // SAFETY: a stream of the device's primary context; it lives as long as `self`.
        unsafe { self.device.stream(self.stream.cu_stream().cast()) }
    }

    /// Runs what `enqueue` enqueues, and waits for it.
    pub(crate) fn run(&self, enqueue: impl FnOnce(&Stream) -> Result<()>) -> Result<()> {
        enqueue(&self.launcher())?;
        self.stream.synchronize().map_err(failed("waiting"))
    }

    /// Captures what `enqueue` enqueues. Graphs live until the program ends.
    pub(crate) fn capture(&self, enqueue: impl FnOnce(&Stream) -> Result<()>) -> Result<Graph> {
        let mode = CaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        self.stream.begin_capture(mode).map_err(failed("capturing"))?;
        enqueue(&self.launcher())?;
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: the stream is capturing; the graph comes from the capture.
        let graph = unsafe {
            result::stream::end_capture(self.stream.cu_stream())
                .and_then(|graph| result::graph::instantiate(graph, flags))
        };
        graph.map(Graph).map_err(failed("a graph"))
    }

    /// Microseconds of one replay: the median over `runs`, the graphs by turns.
    pub(crate) fn median(&self, graphs: &[Graph], runs: usize) -> Result<f64> {
        let stream = self.stream.cu_stream();
        let (start, end) = (event()?, event()?);
        let mut times = Vec::with_capacity(runs);
        for run in 0..runs + graphs.len() {
            // SAFETY: events and stream live; the memory of the graphs does too.
            let elapsed = unsafe {
                result::event::record(start, stream)
                    .and_then(|()| result::graph::launch(graphs[run % graphs.len()].0, stream))
                    .and_then(|()| result::event::record(end, stream))
                    .and_then(|()| result::event::synchronize(end))
                    .and_then(|()| result::event::elapsed(start, end))
            };
            times.push(f64::from(elapsed.map_err(failed("timing"))?) * 1e3);
        }
        // The first replays warm up.
        times.drain(..graphs.len());
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// A stream that measures each kernel on its own.
pub(crate) struct Timed<'a> {
    gpu: &'a Gpu,
    events: RefCell<Vec<(&'static str, sys::CUevent, sys::CUevent)>>,
}

impl<'a> Timed<'a> {
    pub(crate) fn new(gpu: &'a Gpu) -> Self {
        Timed { gpu, events: RefCell::default() }
    }

    /// Forgets what was measured.
    pub(crate) fn clear(&self) {
        self.events.borrow_mut().clear();
    }

    /// Mean time of each kernel.
    pub(crate) fn microseconds(&self) -> Result<BTreeMap<String, f64>> {
        self.gpu.stream.synchronize().map_err(failed("waiting"))?;
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for &(kernel, start, end) in self.events.borrow().iter() {
            // SAFETY: recorded, and passed by the stream.
            let elapsed = unsafe { result::event::elapsed(start, end) }.map_err(failed("timing"))?;
            let (sum, count) = sums.entry(kernel.into()).or_default();
            *sum += f64::from(elapsed) * 1e3;
            *count += 1.0;
        }
        Ok(sums.into_iter().map(|(kernel, (sum, count))| (kernel, sum / count)).collect())
    }
}

impl Launch for Timed<'_> {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &[u8],
        follows: bool,
    ) -> Result<()> {
        let stream = self.gpu.stream.cu_stream();
        let (start, end) = (event()?, event()?);
        // SAFETY: events and stream live.
        unsafe { result::event::record(start, stream) }.map_err(failed("timing"))?;
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launcher().launch(kernel, grid, block, shared, params, follows) }?;
        // SAFETY: as above.
        unsafe { result::event::record(end, stream) }.map_err(failed("timing"))?;
        self.events.borrow_mut().push((kernel, start, end));
        Ok(())
    }

    fn multiprocessors(&self) -> u32 {
        self.gpu.launcher().multiprocessors()
    }

    fn shared_per_multiprocessor(&self) -> u32 {
        self.gpu.launcher().shared_per_multiprocessor()
    }
}
