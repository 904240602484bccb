// A libcuda.so.1 with one GPU whose kernels run on the emulation: what src/backend/cuda/driver.rs calls, and nothing else. It
// holds the caller to what a driver would: a current context, modules and memory given back. MOEPRESS_EMULATOR names the library
// of the emulated kernels. At the end of the process a mistake in the books is an abort.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_BINARY = 209, INVALID_CONTEXT = 201, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

int context_object, module_object;
thread_local std::vector<void*> current;
std::atomic<int> contexts{0}, modules{0};
std::mutex guard;
std::set<uint64_t> blocks;
std::set<std::string> names;

struct Books {
    ~Books() {
        if (contexts == 0 && modules == 0 && blocks.empty()) return;
        std::fprintf(stderr, "left: %d contexts, %d modules, %zu blocks\n", contexts.load(), modules.load(), blocks.size());
        std::abort();
    }
} books;

void* emulator(const char* symbol) {
    static void* library = dlopen(std::getenv("MOEPRESS_EMULATOR"), RTLD_NOW);
    void* found = library ? dlsym(library, symbol) : nullptr;
    if (!found) std::fprintf(stderr, "emulator: %s\n", dlerror()), std::abort();
    return found;
}

size_t params_bytes(const char* name) {
    return reinterpret_cast<size_t (*)(const char*)>(emulator("emu_params_bytes"))(name);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define NEED_CONTEXT \
    if (current.empty() || current.back() != &context_object) return INVALID_CONTEXT

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
        case 97: return *value = 99 << 10, SUCCESS;    // of a block, at most
        default: return INVALID_VALUE;
    }
}

API cuDevicePrimaryCtxRetain(void** context, int) { return ++contexts, *context = &context_object, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return --contexts, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current.empty() ? nullptr : current.back(), SUCCESS; }
API cuCtxPushCurrent_v2(void* context) { return current.push_back(context), SUCCESS; }

API cuCtxPopCurrent_v2(void** context) {
    if (current.empty()) return INVALID_CONTEXT;
    *context = current.back();
    current.pop_back();
    return SUCCESS;
}

// Fat binaries as nvcc makes them begin with a magic number.
API cuModuleLoadData(void** module, const void* image) {
    NEED_CONTEXT;
    uint32_t magic;
    std::memcpy(&magic, image, 4);
    if (magic != 0xba55ed50 || reinterpret_cast<uintptr_t>(image) % 16) return NO_BINARY;
    return ++modules, *module = &module_object, SUCCESS;
}

API cuModuleUnload(void*) {
    NEED_CONTEXT;
    return --modules, SUCCESS;
}

API cuModuleGetFunction(const void** function, void*, const char* name) {
    NEED_CONTEXT;
    if (!params_bytes(name)) return NOT_FOUND;
    const std::lock_guard<std::mutex> lock(guard);
    return *function = names.insert(name).first->c_str(), SUCCESS;
}

API cuFuncGetAttribute(int* value, int attribute, void*) {
    NEED_CONTEXT;
    return *value = attribute == 0 ? 1024 : 0, SUCCESS;
}

API cuFuncSetAttribute(void*, int attribute, int value) {
    NEED_CONTEXT;
    return attribute == 8 && value <= 99 << 10 ? SUCCESS : INVALID_VALUE;
}

API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    NEED_CONTEXT;
    void* data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!data || !bytes) return OUT_OF_MEMORY;
    const std::lock_guard<std::mutex> lock(guard);
    return *address = reinterpret_cast<uint64_t>(data), blocks.insert(*address), SUCCESS;
}

API cuMemFree_v2(uint64_t address) {
    NEED_CONTEXT;
    const std::lock_guard<std::mutex> lock(guard);
    if (!blocks.erase(address)) return INVALID_VALUE;
    return std::free(reinterpret_cast<void*>(address)), SUCCESS;
}

API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    NEED_CONTEXT;
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), SUCCESS;
}

API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    NEED_CONTEXT;
    return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), SUCCESS;
}

API cuStreamSynchronize(void*) {
    NEED_CONTEXT;
    return SUCCESS;
}

API cuGetErrorName(int code, const char** name) {
    return *name = code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR", SUCCESS;
}

API cuLaunchKernel(const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    NEED_CONTEXT;
    if (stream || extra) return INVALID_VALUE;
    using Launch = const char* (*)(const char*, const uint32_t*, const uint32_t*, uint32_t, const void*, size_t, int, uint64_t);
    const uint32_t grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    const auto launch = reinterpret_cast<Launch>(emulator("emu_launch"));
    const char* error = launch(name, grid, block, shared, params[0], params_bytes(name), 0, 0);
    if (error) std::fprintf(stderr, "%s\n", error);
    return error ? LAUNCH_FAILED : SUCCESS;
}
