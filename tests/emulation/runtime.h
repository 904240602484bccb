// Execution of a CUDA grid on the CPU: every thread of a block is a fibre, a block runs on one OS thread, blocks follow
// one another. Fibres switch only where threads of a GPU synchronise, so a kernel's result may depend on the schedule
// only if the kernel is wrong; the schedule and the moment at which asynchronous copies land are chosen by the test.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

// Where in the kernel something was called.
struct Site {
    const char* file;
    int line;
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

struct Dim3 {
    unsigned x, y, z;
};

// How copies land and who runs next.
enum class Mode : int {
    Late = 0,    // copies land when they are waited for; threads run in order
    Early = 1,   // copies land at once; threads and blocks run in reverse order
    Random = 2,  // both at random, with preemption at every synchronising operation
};

struct Fibre;
struct Warp;
struct Block;

constexpr int WARP = 32;

// A cp.async that has not landed yet.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    uint32_t bytes, valid;
};

// What a warp-wide operation collects before it happens.
struct Rendezvous {
    const char* what = nullptr;  // null: not in use
    Site site{};
    uint32_t mask = 0, arrived = 0;
    uint32_t in[WARP][12];
    uint32_t out[WARP][4];
};

enum class State { Ready, AtPreviousKernel, AtBarrier, AtCollective, Done };

struct Fibre {
    void* stack_pointer = nullptr;
    void* sanitizer = nullptr;  // TSan's handle
    Block* block = nullptr;
    Warp* warp = nullptr;
    Dim3 thread{};
    int lane = 0;
    bool followed = false;  // has waited for the previous kernel
    State state = State::Ready;
    Site site{};  // where it waits
    const char* waits_for = "";
    uint32_t result[4] = {};          // of the last collective
    std::vector<Copy> copies;         // in order of issue
    std::vector<size_t> group_ends;   // ends of the committed groups within `copies`
};

struct Warp {
    Fibre* lanes[WARP] = {};
    int count = 0;
    uint32_t exited = 0;
    Rendezvous pending[4];
};

struct Barrier {
    int arrived = 0;
    Site site{};
};

struct Block {
    Dim3 index{}, grid{}, size{};
    unsigned char* shared = nullptr;
    uint32_t shared_bytes = 0;
    Mode mode = Mode::Late;
    uint64_t random = 0;
    int threads = 0, done = 0;
    bool guarded = false;  // what earlier kernels may have written is out of reach until all threads have waited for them
    Barrier barrier;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    uint64_t next_random();
};

extern thread_local Fibre* current __attribute__((tls_model("initial-exec")));

// Reports a kernel's mistake and ends the launch; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Lets others run; a point of preemption in random mode.
void preempt();

// Waits for the previous kernel. Nothing that synchronises, and no access to memory that kernels write, may come before.
void follow_previous_kernel(Site site);
void sync_threads(Site site);
// Deposits this lane's operands; the last lane of `mask` runs `compute` for all. Returns this lane's results, valid until
// its next collective.
const uint32_t* collective(const char* what, uint32_t mask, const void* operands, size_t bytes,
                           void (*compute)(Rendezvous&), Site site);

void copy_async(void* to, const void* from, uint32_t bytes, uint32_t valid, Site site);
void commit_copies();
void wait_copies(unsigned newest_groups, Site site);

// Fails on an address that is in no memory.
void check_there(const void* address, Site site);

// Offset of a shared address; fails on any other.
uint32_t shared_offset(const void* address, Site site);
// The shared memory at an offset.
unsigned char* shared_at(uint32_t offset, uint32_t bytes, uint32_t alignment, Site site);
// Counts 8-row phases of ldmatrix in which rows share banks.
void count_conflicts(uint64_t phases);

using Kernel = void (*)(const void* params);
struct Registration {
    Registration(const char* name, const char* source, size_t params_bytes, Kernel kernel);
};

}  // namespace emulation
