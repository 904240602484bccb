//! Times on the device: CUDA graphs between events, or events around each kernel.
//!
//! A long write of memory goes ahead of what is measured: it is enqueued while that runs, so that the host's time is not in the
//! numbers, and nothing of a run before is in the cache.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUevent_flags as EventFlags, CUstreamCaptureMode as CaptureMode};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};
use moepress::backend::cuda::{Block, Device, DeviceBlock, Error, Launch, Memory, Result, Stream};

/// Bytes of the write: more than any cache, and 60 µs or so on a fast GPU.
const WRITTEN: usize = 256 << 20;

/// Runs before any is measured: clocks rise, and what a driver does at first is done.
const WARM_UP: Duration = Duration::from_millis(50);

/// Fewest measurements of which a median is taken.
pub(crate) const FEWEST: usize = 20;

/// After the fewest, none begins later than this.
const LONGEST: Duration = Duration::from_millis(500);

/// A GPU with a stream.
pub(crate) struct Gpu {
    pub(crate) device: Arc<Device>,
    stream: Arc<CudaStream>,
    written: DeviceBlock,
}

/// A captured forward pass.
pub(crate) struct Graph(sys::CUgraphExec);

fn failed(what: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Driver { what: what.into(), code: format!("{:?}", error.0) }
}

fn event() -> Result<sys::CUevent> {
    result::event::create(EventFlags::CU_EVENT_DEFAULT).map_err(failed("an event"))
}

/// Calls `run` with its number until [`WARM_UP`] is over.
pub(crate) fn warm_up(mut run: impl FnMut(usize) -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let mut number = 0;
    while number == 0 || start.elapsed() < WARM_UP {
        run(number)?;
        number += 1;
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

impl Gpu {
    pub(crate) fn new(device: Arc<Device>) -> Result<Self> {
        let context = CudaContext::new(0).map_err(failed("the context"))?;
        let stream = context.new_stream().map_err(failed("a stream"))?;
        let written = device.allocate(WRITTEN)?;
        Ok(Gpu { device, stream, written })
    }

    fn launcher(&self) -> Stream {
        // SAFETY: a stream of the device's primary context; it lives as long as `self`.
        unsafe { self.device.stream(self.stream.cu_stream().cast()) }
    }

    /// Enqueues the long write.
    fn write(&self) -> Result<()> {
        let (address, stream) = (self.written.address(), self.stream.cu_stream());
        // SAFETY: within the block, which lives as long as `self`.
        unsafe { result::memset_d8_async(address, 0, WRITTEN, stream) }.map_err(failed("writing"))
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

    /// Microseconds of one replay: the median over `runs`, or over as many as there is time for, the graphs by turns.
    pub(crate) fn median(&self, graphs: &[Graph], runs: usize) -> Result<f64> {
        let stream = self.stream.cu_stream();
        let (start, end) = (event()?, event()?);
        let replay = |number: usize| {
            self.write()?;
            // SAFETY: events and stream live; the memory of the graphs does too.
            let elapsed = unsafe {
                result::event::record(start, stream)
                    .and_then(|()| result::graph::launch(graphs[number % graphs.len()].0, stream))
                    .and_then(|()| result::event::record(end, stream))
                    .and_then(|()| result::event::synchronize(end))
                    .and_then(|()| result::event::elapsed(start, end))
            };
            elapsed.map(|milliseconds| f64::from(milliseconds) * 1e3).map_err(failed("timing"))
        };
        warm_up(|number| replay(number).map(drop))?;
        let (mut times, begin) = (Vec::with_capacity(runs), Instant::now());
        while times.len() < runs && (times.len() < FEWEST || begin.elapsed() < LONGEST) {
            times.push(replay(times.len())?);
        }
        Ok(median(times))
    }
}

/// Launches of a pass that [`Timed`] can measure.
const MOST_LAUNCHES: usize = 32;

/// A stream that measures each kernel on its own.
pub(crate) struct Timed<'a> {
    gpu: &'a Gpu,
    /// Two for each launch.
    events: Vec<sys::CUevent>,
    launched: RefCell<Vec<&'static str>>,
    times: RefCell<BTreeMap<&'static str, Vec<f64>>>,
    passes: Cell<usize>,
}

impl<'a> Timed<'a> {
    pub(crate) fn new(gpu: &'a Gpu) -> Result<Self> {
        let events = (0..2 * MOST_LAUNCHES).map(|_| event()).collect::<Result<_>>()?;
        let (launched, times) = (RefCell::default(), RefCell::default());
        Ok(Timed { gpu, events, launched, times, passes: Cell::new(0) })
    }

    /// Forgets what was measured.
    pub(crate) fn clear(&self) {
        self.times.borrow_mut().clear();
        self.passes.set(0);
    }

    /// Passes that were measured.
    pub(crate) fn passes(&self) -> usize {
        self.passes.get()
    }

    /// Measures the pass that `enqueue` enqueues, and waits for it.
    pub(crate) fn pass(&self, enqueue: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.launched.borrow_mut().clear();
        // A pass takes the host longer than a graph.
        for _ in 0..4 {
            self.gpu.write()?;
        }
        enqueue(self)?;
        self.gpu.stream.synchronize().map_err(failed("waiting"))?;
        let mut times = self.times.borrow_mut();
        for (&kernel, events) in self.launched.borrow().iter().zip(self.events.chunks_exact(2)) {
            // SAFETY: recorded, and passed by the stream.
            let elapsed =
                unsafe { result::event::elapsed(events[0], events[1]) }.map_err(failed("timing"))?;
            times.entry(kernel).or_default().push(f64::from(elapsed) * 1e3);
        }
        self.passes.set(self.passes.get() + 1);
        Ok(())
    }

    /// Median time of each kernel.
    pub(crate) fn microseconds(&self) -> BTreeMap<&'static str, f64> {
        self.times.take().into_iter().map(|(kernel, times)| (kernel, median(times))).collect()
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
        let number = self.launched.borrow().len();
        let [start, end] = [0, 1].map(|i| self.events[2 * number + i]);
        // SAFETY: events and stream live.
        unsafe { result::event::record(start, stream) }.map_err(failed("timing"))?;
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launcher().launch(kernel, grid, block, shared, params, follows) }?;
        // SAFETY: as above.
        unsafe { result::event::record(end, stream) }.map_err(failed("timing"))?;
        self.launched.borrow_mut().push(kernel);
        Ok(())
    }

    fn multiprocessors(&self) -> u32 {
        self.gpu.launcher().multiprocessors()
    }

    fn shared_per_multiprocessor(&self) -> u32 {
        self.gpu.launcher().shared_per_multiprocessor()
    }
}
