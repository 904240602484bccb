// A stand-in for the driver: a libcuda.so.1 with one GPU whose kernels run on the emulation. It has what
// src/backend/cuda/driver.rs, the tests and the benches call, and nothing else, and holds callers to what a driver would:
// a current context, shared memory asked for before a launch needs it, copies within what was allocated, no call in a
// capture that could wait or allocate, everything given back (at the end of the process a mistake in the books is an
// abort). Memory of the device is memory of the host, between guard pages.
//
// What is enqueued runs as late as it may: when somebody waits for its stream. So a parameter, a buffer or a workspace that
// does not live as long as it has to shows. Nothing here says anything about the speed or the arithmetic of a GPU.
// MOEPRESS_EMULATOR names the library of the emulated kernels.
#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_CONTEXT = 201,
    NO_BINARY = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

constexpr int MOST_SHARED = 99 << 10, SHARED_UNASKED = 48 << 10, MOST_THREADS = 1024;

struct Function {
    std::string name;
    size_t params_bytes;
    int shared = SHARED_UNASKED;
};

// Something enqueued; its error is the stream's.
using Work = std::function<int()>;

struct Stream {
    bool blocking;  // whether the default stream waits for it, and it for the default stream
    std::vector<Work> queue;
    std::mutex running;
    int error = SUCCESS;
    bool capturing = false, broken = false;
};

struct Event {
    Stream* stream = nullptr;
    std::chrono::steady_clock::time_point time;
    bool passed = false;
};

using Graph = std::vector<Work>;

// As the driver's header has them.
struct LaunchAttribute {
    int id;
    char pad[4];
    alignas(8) int value[16];
};

struct LaunchConfig {
    uint32_t grid[3], block[3];
    uint32_t shared;
    void* stream;
    const LaunchAttribute* attributes;
    uint32_t attribute_count;
};

// A loaded fat binary.
struct Module {
    const char* image;
    size_t bytes;

    // Whether it was compiled from the file at this path. A fat binary names its source as nvcc was given it.
    bool is_of(const std::string& path) const {
        const std::string name = "cuda" + path.substr(path.rfind('/'));
        return memmem(image, bytes, name.c_str(), name.size() + 1) != nullptr;
    }
};

int context_object;
thread_local std::vector<void*> current;
std::atomic<int> contexts{0}, modules{0}, captures{0};
std::atomic<uint64_t> overlapping{0};  // launches that may start while the kernel before them ends
std::mutex guard;  // of all that follows
std::map<uint64_t, size_t> blocks;
std::map<std::string, Function> functions;
std::set<Stream*> streams;
Stream default_stream{true, {}, {}};

struct Books {
    ~Books() {
        if (contexts == 0 && modules == 0 && blocks.empty() && streams.empty()) return;
        std::fprintf(stderr, "left: %d contexts, %d modules, %zu blocks, %zu streams\n", contexts.load(), modules.load(),
                     blocks.size(), streams.size());
        std::abort();
    }
} books;

template <class F>
F* emulator(const char* symbol) {
    static void* library = dlopen(std::getenv("MOEPRESS_EMULATOR"), RTLD_NOW);
    void* found = library ? dlsym(library, symbol) : nullptr;
    if (!found) std::fprintf(stderr, "emulator: %s\n", dlerror()), std::abort();
    return reinterpret_cast<F*>(found);
}

Stream* stream_of(void* handle) { return handle ? static_cast<Stream*>(handle) : &default_stream; }

// Runs what the stream holds; its first error stays with it.
int drain(Stream* stream) {
    const std::lock_guard<std::mutex> alone(stream->running);
    while (true) {
        std::vector<Work> work;
        {
            const std::lock_guard<std::mutex> lock(guard);
            work.swap(stream->queue);
        }
        if (work.empty()) return stream->error;
        for (const Work& item : work) {
            if (stream->error == SUCCESS) stream->error = item();
        }
    }
}

int drain_where(bool only_blocking) {
    std::vector<Stream*> waited{&default_stream};
    {
        const std::lock_guard<std::mutex> lock(guard);
        for (Stream* stream : streams) {
            if (!stream->capturing && (stream->blocking || !only_blocking)) waited.push_back(stream);
        }
    }
    int error = SUCCESS;
    for (Stream* stream : waited) {
        const int found = drain(stream);
        if (error == SUCCESS) error = found;
    }
    return error;
}

// A call that a global capture on any thread forbids; it breaks the capture.
bool forbidden() {
    if (captures == 0) return false;
    const std::lock_guard<std::mutex> lock(guard);
    for (Stream* stream : streams) stream->broken = stream->broken || stream->capturing;
    return true;
}

void enqueue(Stream* stream, Work work) {
    const std::lock_guard<std::mutex> lock(guard);
    stream->queue.push_back(std::move(work));
}

// Whether a range lies within one block.
bool allocated(uint64_t address, size_t bytes) {
    const std::lock_guard<std::mutex> lock(guard);
    auto block = blocks.upper_bound(address);
    if (block == blocks.begin()) return false;
    --block;
    return address + bytes <= block->first + block->second;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define NEED_CONTEXT \
    if (contexts == 0 || current.empty() || current.back() != &context_object) return INVALID_CONTEXT
#define NOT_IN_CAPTURE \
    NEED_CONTEXT;      \
    if (forbidden()) return CAPTURE_UNSUPPORTED

API cuInit(unsigned) { return SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
API cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_VALUE; }
API cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, length, "an emulated GPU"), SUCCESS; }

API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: return *value = 3, SUCCESS;           // multiprocessors
        case 75: return *value = 8, SUCCESS;           // compute capability
        case 76: return *value = 6, SUCCESS;
        case 81: return *value = 100 << 10, SUCCESS;   // shared memory of a multiprocessor
        case 97: return *value = MOST_SHARED, SUCCESS; // of a block, at most
        case 115: return *value = 0, SUCCESS;          // memory pools
        default: return INVALID_VALUE;
    }
}

API cuDevicePrimaryCtxRetain(void** context, int) { return ++contexts, *context = &context_object, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return --contexts, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current.empty() ? nullptr : current.back(), SUCCESS; }
API cuCtxPushCurrent_v2(void* context) { return current.push_back(context), SUCCESS; }

API cuCtxSetCurrent(void* context) {
    if (!current.empty()) current.pop_back();
    if (context) current.push_back(context);
    return SUCCESS;
}

API cuCtxPopCurrent_v2(void** context) {
    if (current.empty()) return INVALID_CONTEXT;
    *context = current.back();
    current.pop_back();
    return SUCCESS;
}

API cuCtxSynchronize() {
    NOT_IN_CAPTURE;
    return drain_where(false);
}

// Fat binaries as nvcc makes them begin with a magic number, a version, the length of this header and that of the rest.
API cuModuleLoadData(Module** module, const char* image) {
    NOT_IN_CAPTURE;
    struct {
        uint32_t magic;
        uint16_t version, bytes;
        uint64_t rest;
    } header;
    std::memcpy(&header, image, sizeof header);
    if (header.magic != 0xba55ed50 || reinterpret_cast<uintptr_t>(image) % 16) return NO_BINARY;
    return ++modules, *module = new Module{image, header.bytes + header.rest}, SUCCESS;
}

API cuModuleUnload(Module* module) {
    NEED_CONTEXT;
    delete module;
    return --modules, drain_where(false);
}

API cuModuleGetFunction(Function** function, const Module* module, const char* name) {
    NEED_CONTEXT;
    const char* const source = emulator<const char*(const char*)>("emu_source")(name);
    if (!source || !module->is_of(source)) return NOT_FOUND;
    const size_t bytes = emulator<size_t(const char*)>("emu_params_bytes")(name);
    const std::lock_guard<std::mutex> lock(guard);
    return *function = &functions.try_emplace(name, Function{name, bytes}).first->second, SUCCESS;
}

API cuFuncGetAttribute(int* value, int attribute, Function*) {
    NEED_CONTEXT;
    switch (attribute) {
        case 0: return *value = MOST_THREADS, SUCCESS;
        case 5: return *value = 90, SUCCESS;  // compiled for compute capability 9.0
        default: return *value = 0, SUCCESS;
    }
}

API cuFuncSetAttribute(Function* function, int attribute, int value) {
    NEED_CONTEXT;
    if (attribute == 9 && value >= 0 && value <= 100) return SUCCESS;  // share of shared memory
    if (attribute != 8 || value > MOST_SHARED) return INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(guard);
    return function->shared = value, SUCCESS;
}

API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    NOT_IN_CAPTURE;
    if (!bytes) return INVALID_VALUE;
    const size_t whole = (bytes + 255) / 256 * 256;
    *address = reinterpret_cast<uint64_t>(emulator<void*(size_t, int)>("emu_alloc")(whole, 0));
    const std::lock_guard<std::mutex> lock(guard);
    return blocks[*address] = bytes, SUCCESS;
}

API cuMemFree_v2(uint64_t address) {
    NOT_IN_CAPTURE;
    drain_where(false);
    {
        const std::lock_guard<std::mutex> lock(guard);
        if (!blocks.erase(address)) return INVALID_VALUE;
    }
    return emulator<void(void*)>("emu_free")(reinterpret_cast<void*>(address)), SUCCESS;
}

API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    NOT_IN_CAPTURE;
    if (!allocated(to, bytes)) return INVALID_VALUE;
    const int error = drain_where(true);
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), error;
}

API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    NOT_IN_CAPTURE;
    if (!allocated(from, bytes)) return INVALID_VALUE;
    const int error = drain_where(true);
    return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), error;
}

API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    NEED_CONTEXT;
    if (!allocated(to, bytes)) return INVALID_VALUE;
    return enqueue(stream_of(stream), [=] { return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS; }), SUCCESS;
}

API cuStreamCreate(Stream** stream, unsigned flags) {
    NOT_IN_CAPTURE;
    const std::lock_guard<std::mutex> lock(guard);
    *stream = new Stream{flags == 0, {}, {}};
    return streams.insert(*stream), SUCCESS;
}

API cuStreamDestroy_v2(Stream* stream) {
    NEED_CONTEXT;
    const int error = drain(stream);
    {
        const std::lock_guard<std::mutex> lock(guard);
        if (!streams.erase(stream)) return INVALID_HANDLE;
    }
    return delete stream, error;
}

API cuStreamSynchronize(void* handle) {
    NOT_IN_CAPTURE;
    return handle ? drain(stream_of(handle)) : drain_where(true);
}

API cuStreamBeginCapture_v2(Stream* stream, int) {
    NEED_CONTEXT;
    const std::lock_guard<std::mutex> lock(guard);
    if (!stream || stream->capturing) return INVALID_VALUE;
    return ++captures, stream->broken = false, stream->capturing = true, SUCCESS;
}

API cuStreamEndCapture(Stream* stream, Graph** graph) {
    NEED_CONTEXT;
    const std::lock_guard<std::mutex> lock(guard);
    if (!stream || !stream->capturing) return INVALID_VALUE;
    --captures, stream->capturing = false;
    *graph = stream->broken ? nullptr : new Graph(std::move(stream->queue));
    stream->queue.clear();
    return *graph ? SUCCESS : CAPTURE_INVALIDATED;
}

API cuGraphInstantiateWithFlags(Graph** runnable, const Graph* graph, uint64_t) {
    NOT_IN_CAPTURE;
    return *runnable = new Graph(*graph), SUCCESS;
}

API cuGraphLaunch(const Graph* runnable, void* handle) {
    NEED_CONTEXT;
    for (const Work& work : *runnable) enqueue(stream_of(handle), work);
    return SUCCESS;
}

API cuGraphExecDestroy(Graph* runnable) { return delete runnable, SUCCESS; }
API cuGraphDestroy(Graph* graph) { return delete graph, SUCCESS; }
API cuEventCreate(Event** event, unsigned) { return *event = new Event, SUCCESS; }
API cuEventDestroy_v2(Event* event) { return delete event, SUCCESS; }

API cuEventRecord(Event* event, void* handle) {
    NEED_CONTEXT;
    event->stream = stream_of(handle);
    event->passed = false;
    return enqueue(event->stream,
                   [event] {
                       event->time = std::chrono::steady_clock::now();
                       return event->passed = true, SUCCESS;
                   }),
           SUCCESS;
}

API cuEventSynchronize(Event* event) {
    NOT_IN_CAPTURE;
    return event->stream ? drain(event->stream) : SUCCESS;
}

API cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    if (!start->passed || !end->passed) return NOT_READY;
    return *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count(), SUCCESS;
}

API cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

API cuGetErrorName(int code, const char** name) {
    static const std::map<int, const char*> names{
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
        {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    };
    const auto found = names.find(code);
    return *name = found == names.end() ? "CUDA_ERROR" : found->second, SUCCESS;
}

API cuLaunchKernelEx(const LaunchConfig* config, const Function* function, void** params, void** extra) {
    NEED_CONTEXT;
    const LaunchConfig launch = *config;
    const unsigned threads = launch.block[0] * launch.block[1] * launch.block[2];
    if (extra || static_cast<int>(launch.shared) > function->shared || threads > MOST_THREADS) return INVALID_VALUE;
    if (launch.attribute_count > 1) return INVALID_VALUE;
    if (launch.attribute_count == 1) {
        const LaunchAttribute& overlap = *launch.attributes;
        if (overlap.id != 6 || overlap.value[0] != 1) return INVALID_VALUE;
        ++overlapping;
    }
    if (!launch.stream && forbidden()) return CAPTURE_UNSUPPORTED;
    const auto* const first = static_cast<const unsigned char*>(params[0]);
    const std::vector<unsigned char> copy(first, first + function->params_bytes);
    enqueue(stream_of(launch.stream), [=] {
        using Launch = const char*(const char*, const uint32_t*, const uint32_t*, uint32_t, const void*, size_t, int, uint64_t);
        const char* error = emulator<Launch>("emu_launch")(function->name.c_str(), launch.grid, launch.block, launch.shared,
                                                           copy.data(), copy.size(), 0, 0);
        if (error) std::fprintf(stderr, "%s\n", error);
        return error ? LAUNCH_FAILED : SUCCESS;
    });
    return SUCCESS;
}

// Launches so far that may start while the kernel before them ends.
API stand_in_overlapping() { return static_cast<int>(overlapping.load()); }

// For callers whose own memory this GPU's is (tests/ffi/torch_stand_in.py): runs all that is enqueued.
API stand_in_finish() { return drain_where(false); }
