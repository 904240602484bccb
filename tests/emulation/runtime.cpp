#include "runtime.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

// Under ThreadSanitizer the kernels are instrumented and this file is not (sanitize.sh): fibres are threads to it, ordered
// only by what orders the threads of a block.
#if defined(EMULATION_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#define EMULATION_ACQUIRE(object) __tsan_acquire(object)
#define EMULATION_RELEASE(object) __tsan_release(object)
#define EMULATION_IGNORE_BEGIN (AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__))
#define EMULATION_IGNORE_END (AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__))
#else
#define EMULATION_ACQUIRE(object) (void)(object)
#define EMULATION_RELEASE(object) (void)(object)
#define EMULATION_IGNORE_BEGIN (void)0
#define EMULATION_IGNORE_END (void)0
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 * 1024;  // frames have red zones
#else
constexpr size_t STACK = 64 * 1024;
#endif
constexpr uint32_t SHARED_LIMIT = 99 * 1024;  // what a block may have on every card since sm_80
constexpr size_t PAGE = 4096;
constexpr int GUARDS = 4;  // beside a Mode

thread_local Fibre* current = nullptr;

namespace {

struct KernelEntry {
    const char* source;  // path of its file
    size_t params_bytes;
    Kernel kernel;
};
std::map<std::string, KernelEntry>& kernels() {
    static std::map<std::string, KernelEntry> all;
    return all;
}

// Memory between two pages that must not be touched.
struct Guarded {
    unsigned char* start;  // of the mapping
    size_t length;
    unsigned char* data;
    size_t bytes;
    pthread_t owner;  // the thread that allocated it
    bool read_only = false;
};
std::mutex guarded_lock;
std::map<const void*, Guarded>& guarded() {
    static std::map<const void*, Guarded> all;
    return all;
}

Guarded map_guarded(size_t bytes, bool flush_left) {
    const size_t body = (bytes + PAGE - 1) / PAGE * PAGE + (bytes == 0 ? PAGE : 0);
    Guarded memory{nullptr, body + 2 * PAGE, nullptr, bytes, pthread_self()};
    void* start = mmap(nullptr, memory.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) abort();
    memory.start = static_cast<unsigned char*>(start);
    mprotect(memory.start + PAGE, body, PROT_READ | PROT_WRITE);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory.start + PAGE, body);  // stacks may have been there
#endif
    const size_t offset = flush_left ? 0 : (body - bytes) / 16 * 16;
    memory.data = memory.start + PAGE + offset;
    return memory;
}

// Everything that one OS thread needs to run blocks.
struct Worker {
    Block block;
    unsigned char* stacks = nullptr;
    size_t stack_count = 0;
    Guarded shared{};
    void* scheduler_stack = nullptr;  // saved stack pointer
    void* scheduler_sanitizer = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    sigjmp_buf abandoned;
    const KernelEntry* kernel = nullptr;
    const void* params = nullptr;
    bool guards = false;
    const char* name = "";
    std::string error;
    uint64_t conflicts = 0;
    bool running = false;

    ~Worker() {
        if (stacks) munmap(stacks, stack_count * STACK);
        if (shared.start) munmap(shared.start, shared.length);
    }
};
thread_local std::unique_ptr<Worker> worker_of_thread;

Worker& worker() {
    if (!worker_of_thread) worker_of_thread = std::make_unique<Worker>();
    return *worker_of_thread;
}

void fibre_main() {
    Worker& w = worker();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &w.scheduler_bottom, &w.scheduler_size);
#endif
    EMULATION_ACQUIRE(&w);
    w.kernel->kernel(w.params);
    EMULATION_RELEASE(&w);
    Fibre* self = current;
    if (!self->followed) fail("a thread ends without having waited for the previous kernel");
    if (!self->copies.empty()) fail("a thread ends with copies that were never waited for");
    self->state = State::Done;
    self->warp->exited |= 1u << self->lane;
    for (const Rendezvous& r : self->warp->pending) {
        if (r.what && (r.mask >> self->lane & 1)) {
            self->site = r.site;
            fail("lane %d ended while its warp waits for it in %s", self->lane, r.what);
        }
    }
    preempt();
    abort();
}

}  // namespace

// Switching stacks: saves the callee-saved registers on the old one and takes those of the new one.
#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

static void* prepare_stack(unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;  // keeps the ABI's alignment at entry
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
}
#else
struct Context {
    ucontext_t context;
};
static void emulation_switch(void** save, void* load) {
    Context self;
    *save = &self;
    swapcontext(&self.context, &static_cast<Context*>(load)->context);
}
static void* prepare_stack(unsigned char* stack, void (*entry)()) {
    Context* fibre = reinterpret_cast<Context*>(stack);
    getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = stack + sizeof(Context);
    fibre->context.uc_stack.ss_size = STACK - sizeof(Context);
    fibre->context.uc_link = nullptr;
    makecontext(&fibre->context, entry, 0);
    return fibre;
}
#endif

static void to_scheduler() {
    Worker& w = worker();
    Fibre* self = current;
#if defined(EMULATION_THREAD_SANITIZER)
    __tsan_switch_to_fiber(w.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(self->state == State::Done ? nullptr : &fake, w.scheduler_bottom, w.scheduler_size);
#endif
    emulation_switch(&self->stack_pointer, w.scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &w.scheduler_bottom, &w.scheduler_size);
#endif
}

static void to_fibre(Worker& w, Fibre& fibre) {
    current = &fibre;
#if defined(EMULATION_THREAD_SANITIZER)
    __tsan_switch_to_fiber(fibre.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    const size_t index = &fibre - w.block.fibres.data();
    __sanitizer_start_switch_fiber(&fake, w.stacks + index * STACK, STACK);
#endif
    emulation_switch(&w.scheduler_stack, fibre.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    current = nullptr;
}

uint64_t Block::next_random() {
    random += 0x9E3779B97F4A7C15u;  // SplitMix64
    uint64_t z = random;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

void fail(const char* format, ...) {
    Worker& w = worker();
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char where[512] = "";
    if (current) {
        const Fibre& f = *current;
        const char* file = f.site.file ? f.site.file : "?";
        snprintf(where, sizeof where, " [block (%u, %u, %u), thread %u, last synchronised at %s:%d]", f.block->index.x,
                 f.block->index.y, f.block->index.z, f.thread.x, file, f.site.line);
    }
    w.error = std::string(w.name) + ": " + text + where;
    siglongjmp(w.abandoned, 1);
}

static void land(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.valid);
    memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
}

// Some of this thread's copies arrive.
static void land_some(Fibre& f) {
    for (Copy& copy : f.copies) {
        if (copy.to && f.block->next_random() % 4 == 0) {
            land(copy);
            copy.to = nullptr;
        }
    }
}

void preempt() {
    if (current->state == State::Ready && current->block->mode == Mode::Random) land_some(*current);
    to_scheduler();
}

// A synchronising operation that need not wait.
static void maybe_preempt() {
    Block& block = *current->block;
    if (block.mode == Mode::Random && block.next_random() % 4 == 0) preempt();
}

static void wait(State state, const char* what, Site site) {
    Fibre* self = current;
    self->state = state;
    self->site = site;
    self->waits_for = what;
    to_scheduler();
}

void follow_previous_kernel(Site site) {
    if (!current->followed) wait(State::AtPreviousKernel, "follow_previous_kernel", site);
    current->followed = true;
}

static void check_followed(const char* what, Site site) {
    if (!current->followed) fail("%s at line %d before the previous kernel was waited for", what, site.line);
}

void sync_threads(Site site) {
    check_followed("__syncthreads", site);
    Block& block = *current->block;
    Barrier& barrier = block.barrier;
    if (barrier.arrived > 0 && !(barrier.site == site)) {
        current->site = site;
        fail("__syncthreads at line %d while other threads of the block wait in the one at line %d", site.line,
             barrier.site.line);
    }
    barrier.site = site;
    EMULATION_RELEASE(&barrier);
    if (++barrier.arrived == block.threads - block.done) {
        barrier.arrived = 0;
        for (Fibre& fibre : block.fibres) {
            if (fibre.state == State::AtBarrier) fibre.state = State::Ready;
        }
        current->site = site;
        maybe_preempt();
    } else {
        wait(State::AtBarrier, "__syncthreads", site);
    }
    EMULATION_ACQUIRE(&barrier);
}

const uint32_t* collective(const char* what, uint32_t mask, const void* operands, size_t bytes,
                           void (*compute)(Rendezvous&), Site site) {
    Fibre* self = current;
    Warp& warp = *self->warp;
    self->site = site;
    check_followed(what, site);
    const uint32_t own = 1u << self->lane;
    if (!(mask & own)) fail("%s at line %d: the calling lane %d is not in its mask %08x", what, site.line, self->lane, mask);
    if (mask & warp.exited) fail("%s at line %d: mask %08x has lanes that ended", what, site.line, mask);
    if (warp.count < WARP && mask >> warp.count) fail("%s at line %d: mask %08x has lanes that do not exist", what, site.line, mask);
    Rendezvous* meeting = nullptr;
    Rendezvous* free_slot = nullptr;
    for (Rendezvous& r : warp.pending) {
        if (!r.what) {
            free_slot = &r;
        } else if (r.mask == mask && r.site == site && !strcmp(r.what, what) && !(r.arrived & own)) {
            meeting = &r;
        } else if (r.mask & mask && r.arrived != r.mask) {
            fail("divergent warp: lane %d is in %s at line %d with mask %08x, others in %s at line %d with mask %08x",
                 self->lane, what, site.line, mask, r.what, r.site.line, r.mask);
        }
    }
    if (!meeting) {
        if (!free_slot) fail("%s at line %d: more meetings of one warp than it has parts", what, site.line);
        meeting = free_slot;
        meeting->what = what;
        meeting->site = site;
        meeting->mask = mask;
        meeting->arrived = 0;
    }
    // Only __syncwarp orders memory; the others move registers.
    const bool is_fence = !strcmp(what, "__syncwarp");
    EMULATION_IGNORE_BEGIN;
    memcpy(meeting->in[self->lane], operands, bytes);
    EMULATION_IGNORE_END;
    meeting->arrived |= own;
    if (is_fence) EMULATION_RELEASE(meeting);
    if (meeting->arrived == mask) {
        EMULATION_IGNORE_BEGIN;
        compute(*meeting);
        EMULATION_IGNORE_END;
        meeting->what = nullptr;
        for (int i = 0; i < warp.count; ++i) {
            if (!(mask >> i & 1)) continue;
            memcpy(warp.lanes[i]->result, meeting->out[i], sizeof meeting->out[i]);
            warp.lanes[i]->state = State::Ready;
        }
        maybe_preempt();
    } else {
        wait(State::AtCollective, what, site);
    }
    if (is_fence) EMULATION_ACQUIRE(meeting);
    return self->result;
}

void copy_async(void* to, const void* from, uint32_t bytes, uint32_t valid, Site site) {
    Fibre& f = *current;
    check_followed("cp.async", site);
    if (valid > bytes) fail("cp.async at line %d: %u valid bytes of %u", site.line, valid, bytes);
    if (reinterpret_cast<uintptr_t>(from) % bytes && valid) fail("cp.async at line %d: source is not %u-byte aligned", site.line, bytes);
    const uint32_t offset = shared_offset(to, site);
    shared_at(offset, bytes, bytes, site);
    const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, valid};
    const bool now = f.block->mode == Mode::Early || (f.block->mode == Mode::Random && f.block->next_random() % 4 == 0);
    f.copies.push_back(copy);
    if (now) {
        land(copy);
        f.copies.back().to = nullptr;
    }
}

void commit_copies() {
    Fibre& f = *current;
    f.group_ends.push_back(f.copies.size());
    maybe_preempt();
}

void wait_copies(unsigned newest_groups, Site site) {
    Fibre& f = *current;
    f.site = site;
    if (f.group_ends.size() > newest_groups) {
        const size_t groups = f.group_ends.size() - newest_groups;
        const size_t end = f.group_ends[groups - 1];
        for (size_t i = 0; i < end; ++i) {
            if (f.copies[i].to) land(f.copies[i]);
        }
        f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<ptrdiff_t>(end));
        f.group_ends.erase(f.group_ends.begin(), f.group_ends.begin() + static_cast<ptrdiff_t>(groups));
        for (size_t& e : f.group_ends) e -= end;
    }
    maybe_preempt();
}

void check_there(const void* address, Site site) {
    const auto* p = static_cast<const unsigned char*>(address);
    Guarded around{};
    {
        const std::lock_guard<std::mutex> lock(guarded_lock);
        for (const auto& [data, memory] : guarded()) {
            if (p >= memory.start && p < memory.start + memory.length) around = memory;
        }
    }
    if (!around.start) {
        (void)*static_cast<const volatile unsigned char*>(p);  // the test's own memory
    } else if (p < around.data || p >= around.data + around.bytes) {
        fail("access to global memory of %zu bytes at byte %td, line %d", around.bytes, p - around.data, site.line);
    }
}

uint32_t shared_offset(const void* address, Site site) {
    const Block& block = *current->block;
    const auto* p = static_cast<const unsigned char*>(address);
    if (p < block.shared || p >= block.shared + block.shared_bytes) {
        fail("line %d: the address is not in the %u bytes of shared memory", site.line, block.shared_bytes);
    }
    return static_cast<uint32_t>(p - block.shared);
}

unsigned char* shared_at(uint32_t offset, uint32_t bytes, uint32_t alignment, Site site) {
    const Block& block = *current->block;
    if (offset % alignment) fail("line %d: shared offset %u is not %u-byte aligned", site.line, offset, alignment);
    if (uint64_t{offset} + bytes > block.shared_bytes) {
        fail("line %d: shared offset %u is outside of %u bytes", site.line, offset, block.shared_bytes);
    }
    return block.shared + offset;
}

void count_conflicts(uint64_t phases) { worker().conflicts += phases; }

Registration::Registration(const char* name, const char* source, size_t params_bytes, Kernel kernel) {
    kernels()[name] = {source, params_bytes, kernel};
}

namespace {

// Who waits for what, by site.
std::string waiting(const Block& block) {
    std::map<std::string, int> sites;
    for (const Fibre& f : block.fibres) {
        if (f.state == State::Done) {
            ++sites["have ended"];
            continue;
        }
        const char* file = f.site.file ? strrchr(f.site.file, '/') : nullptr;
        file = file ? file + 1 : f.site.file ? f.site.file : "?";
        ++sites[std::string("at ") + f.waits_for + " " + file + ":" + std::to_string(f.site.line)];
    }
    std::string text;
    for (const auto& [site, count] : sites) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + site;
    return text;
}

void shuffle(Block& block, int* items, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(items[i], items[block.next_random() % (i + 1)]);
}

// Runs the lanes of a warp that can run; whether any did.
bool run_warp(Worker& w, Warp& warp) {
    int order[WARP];
    for (int i = 0; i < warp.count; ++i) order[i] = w.block.mode == Mode::Early ? warp.count - 1 - i : i;
    if (w.block.mode == Mode::Random) shuffle(w.block, order, warp.count);
    bool any = false;
    for (int i = 0; i < warp.count; ++i) {
        Fibre& fibre = *warp.lanes[order[i]];
        if (fibre.state != State::Ready) continue;
        any = true;
        to_fibre(w, fibre);
        if (fibre.state == State::Done) ++w.block.done;
    }
    return any;
}

// What kernels write, of this thread's memory, out of reach or back in it.
void guard_written(Block& block, bool guard) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(EMULATION_THREAD_SANITIZER)
    const std::lock_guard<std::mutex> lock(guarded_lock);
    for (const auto& [data, memory] : guarded()) {
        if (memory.read_only || !pthread_equal(memory.owner, pthread_self())) continue;
        mprotect(memory.start + PAGE, memory.length - 2 * PAGE, guard ? PROT_NONE : PROT_READ | PROT_WRITE);
    }
    block.guarded = guard;
#else
    (void)block, (void)guard;
#endif
}

// The previous kernel has ended: for all threads at once, when none can go on without it.
bool release_previous_kernel(Block& block) {
    bool any = false;
    for (Fibre& fibre : block.fibres) {
        if (fibre.state != State::AtPreviousKernel) continue;
        fibre.state = State::Ready;
        any = true;
    }
    if (any && block.guarded) guard_written(block, false);
    return any;
}

// Threads that ended count as arrived.
bool release_barrier(Block& block) {
    if (block.barrier.arrived == 0 || block.barrier.arrived != block.threads - block.done) return false;
    block.barrier.arrived = 0;
    for (Fibre& fibre : block.fibres) {
        if (fibre.state == State::AtBarrier) fibre.state = State::Ready;
    }
    return true;
}

void run_block(Worker& w) {
    Block& block = w.block;
    const int warps = static_cast<int>(block.warps.size());
    std::vector<int> order(warps);
    while (block.done < block.threads) {
        for (int i = 0; i < warps; ++i) order[i] = block.mode == Mode::Early ? warps - 1 - i : i;
        if (block.mode == Mode::Random) shuffle(block, order.data(), warps);
        bool any = false;
        for (int i : order) {
            // A warp runs as far ahead of the others as it can; at random, for a while.
            int passes = block.mode == Mode::Random ? 1 + static_cast<int>(block.next_random() % 64) : -1;
            while (passes-- != 0 && run_warp(w, block.warps[i])) any = true;
        }
        if (!any && !release_previous_kernel(block) && !release_barrier(block)) {
            current = nullptr;
            fail("deadlock in block (%u, %u, %u): %s", block.index.x, block.index.y, block.index.z, waiting(block).c_str());
        }
    }
}

void prepare_block(Worker& w) {
    Block& block = w.block;
    block.threads = static_cast<int>(block.size.x * block.size.y * block.size.z);
    block.done = 0;
    block.barrier = {};
    block.fibres.resize(block.threads);
    block.warps.resize((block.threads + WARP - 1) / WARP);
    if (w.stack_count < block.fibres.size()) {
        if (w.stacks) munmap(w.stacks, w.stack_count * STACK);
        w.stack_count = block.fibres.size();
        void* stacks = mmap(nullptr, w.stack_count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stacks == MAP_FAILED) abort();
        w.stacks = static_cast<unsigned char*>(stacks);
    }
    for (Warp& warp : block.warps) {
        warp.count = 0;
        warp.exited = 0;
        for (Rendezvous& r : warp.pending) r.what = nullptr;
    }
    for (int i = 0; i < block.threads; ++i) {
        Fibre& f = block.fibres[i];
        f.block = &block;
        f.warp = &block.warps[i / WARP];
        f.lane = i % WARP;
        f.warp->lanes[f.warp->count++] = &f;
        f.thread = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
        f.followed = false;
        f.state = State::Ready;
        f.site = {};
        f.waits_for = "";
        f.copies.clear();
        f.group_ends.clear();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(w.stacks + i * STACK, STACK);  // of the thread that had it before
#endif
        f.stack_pointer = prepare_stack(w.stacks + i * STACK, fibre_main);
#if defined(EMULATION_THREAD_SANITIZER)
        if (f.sanitizer) __tsan_destroy_fiber(f.sanitizer);
        f.sanitizer = __tsan_create_fiber(0);
#endif
    }
    memset(block.shared, 0xFF, block.shared_bytes);  // NaN
}

struct sigaction previous_action, previous_arithmetic;

// An access to a guard page (or a division by zero) ends the launch with a message; anything else is none of our
// business.
[[maybe_unused]] void on_fault(int signal, siginfo_t* info, void* context) {
    Worker* w = worker_of_thread.get();
    if (w && w->running && current) {
        if (signal == SIGFPE) fail("integer division by zero");
        const auto* address = static_cast<const unsigned char*>(info->si_addr);
        const auto describe = [&](const Guarded& g, const char* kind) {
            const char* early = w->block.guarded ? " before the previous kernel was waited for" : "";
            fail("access to %s memory of %zu bytes at byte %td%s", kind, g.bytes, address - g.data, early);
        };
        const auto inside = [&](const Guarded& g) { return address >= g.start && address < g.start + g.length; };
        if (inside(w->shared)) describe(w->shared, "shared");
        for (const auto& [data, g] : guarded()) {
            if (inside(g)) describe(g, "global");
        }
        fail("access to address %p, which is no memory of this launch", info->si_addr);
    }
    const struct sigaction& previous = signal == SIGFPE ? previous_arithmetic : previous_action;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else {
        sigaction(signal, &previous, nullptr);
    }
}

void install_fault_handler() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(EMULATION_THREAD_SANITIZER)
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &previous_action);
        sigaction(SIGFPE, &action, &previous_arithmetic);
    });
#endif
}

// Runs all blocks; the error is in the worker.
void run_grid(Worker& w, Dim3 grid, uint64_t seed) {
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = w.block.mode == Mode::Early ? blocks - 1 - i : i;
    w.block.random = seed;
    if (w.block.mode == Mode::Random) {
        for (uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[w.block.next_random() % (i + 1)]);
    }
    w.running = true;
    bool is_first = true;
    if (sigsetjmp(w.abandoned, 1) == 0) {
        for (uint64_t i : order) {
            w.block.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                             static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
            prepare_block(w);
            if (is_first && w.guards) guard_written(w.block, true);
            is_first = false;
            EMULATION_RELEASE(&w);
            run_block(w);
            EMULATION_ACQUIRE(&w);
        }
    }
    if (w.block.guarded) guard_written(w.block, false);
    w.running = false;
    current = nullptr;
}

}  // namespace
}  // namespace emulation

using namespace emulation;

// Size of a kernel's parameters; 0 where there is no such kernel.
extern "C" size_t emu_params_bytes(const char* name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? 0 : found->second.params_bytes;
}

// Path of the file that a kernel is in; null where there is no such kernel.
extern "C" const char* emu_source(const char* name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : found->second.source;
}

// Launches a kernel and waits for it. With GUARDS in `mode`, memory that other launches of this thread may have written is
// out of reach of the first block until it waits for them. Returns null, or what is wrong with it: valid until the thread's
// next launch.
extern "C" const char* emu_launch(const char* name, const uint32_t* grid, const uint32_t* block, uint32_t shared,
                                  const void* params, size_t params_bytes, int mode, uint64_t seed) {
    Worker& w = worker();
    w.error.clear();
    w.name = name;
    const auto found = kernels().find(name);
    const auto refuse = [&](const std::string& text) {
        w.error = std::string(name) + ": " + text;
        return w.error.c_str();
    };
    if (found == kernels().end()) return refuse("no such kernel");
    if (found->second.params_bytes != params_bytes) return refuse("parameters have another size");
    if (shared > SHARED_LIMIT) return refuse("too much shared memory");
    if (uint64_t{block[0]} * block[1] * block[2] > 1024 || !block[0] || !block[1] || !block[2]) return refuse("block size");
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return refuse("grid size");
    install_fault_handler();
    if (w.shared.start) munmap(w.shared.start, w.shared.length);
    w.shared = map_guarded(shared, false);
    // A multiple of 16 bytes reaches to the guard page.
    w.block.shared = w.shared.data;
    w.block.shared_bytes = shared;
    w.block.mode = static_cast<Mode>(mode & ~GUARDS);
    w.guards = (mode & GUARDS) != 0;
    w.block.grid = {grid[0], grid[1], grid[2]};
    w.block.size = {block[0], block[1], block[2]};
    w.kernel = &found->second;
    w.params = params;
#if defined(EMULATION_THREAD_SANITIZER)
    w.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
    run_grid(w, w.block.grid, seed);
    return w.error.empty() ? nullptr : w.error.c_str();
}

// Memory that ends (or begins) at a page that must not be touched; filled with 0xFF, which is NaN in every format.
extern "C" void* emu_alloc(size_t bytes, int flush_left) {
    const Guarded memory = map_guarded(bytes, flush_left != 0);
    memset(memory.data, 0xFF, bytes);
    const std::lock_guard<std::mutex> lock(guarded_lock);
    guarded()[memory.data] = memory;
    return memory.data;
}

extern "C" void emu_free(void* data) {
    const std::lock_guard<std::mutex> lock(guarded_lock);
    const auto found = guarded().find(data);
    if (found == guarded().end()) abort();
    munmap(found->second.start, found->second.length);
    guarded().erase(found);
}

// From now on memory of emu_alloc can only be read.
extern "C" void emu_protect(void* data) {
    const std::lock_guard<std::mutex> lock(guarded_lock);
    Guarded& memory = guarded().at(data);
    memory.read_only = true;
    mprotect(memory.start + PAGE, memory.length - 2 * PAGE, PROT_READ);
}

// ldmatrix phases with bank conflicts in this thread's launches since the last call.
extern "C" uint64_t emu_take_conflicts() {
    const uint64_t conflicts = worker().conflicts;
    worker().conflicts = 0;
    return conflicts;
}
