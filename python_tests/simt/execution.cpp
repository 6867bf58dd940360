#include "execution.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "core/rounding.h"
#include "fiber.h"

namespace simt {

Index thread_index, block_index, block_size, grid_size;

namespace {

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

struct Block;

// What a warp's lanes do together, and in what they must agree.
enum class Collective { none, shuffle, load_matrices, multiply_accumulate };

struct Thread {
    Context context;
    Block* block = nullptr;
    unsigned index = 0;
    bool ended = false;
    std::deque<std::vector<Copy>> groups{1};  // of copies under way; the last is open
    // What this lane brings to a collective, and gets from it.
    std::uint32_t value = 0;
    int lane = 0;
    const void* row = nullptr;
    std::uint32_t* matrices = nullptr;
    bool variant = false;  // transposed, or bfloat16
    float* c = nullptr;
    const std::uint32_t* a = nullptr;
    std::uint32_t b[2] = {};
};

struct Warp {
    std::vector<Thread*> ready;
    Collective collective = Collective::none;
    int arrived = 0;
};

struct Block {
    unsigned index = 0;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    unsigned char* shared = nullptr;
    std::size_t shared_bytes = 0;
    unsigned arrived = 0, ended = 0;
    bool any = false, result = false;  // of the barrier's predicates

    ~Block() { std::free(shared); }
    Warp& warp_of(const Thread& thread) { return warps[thread.index / kWarp]; }
};

constexpr long kPausesWithoutProgress = 200000;
constexpr std::size_t kSharedAlignment = 128;

std::mt19937_64 generator;
std::vector<std::unique_ptr<Stack>> stacks;
const std::function<void()>* running_body;
Context scheduler;
Thread* current;
long pauses;
bool failed;

bool one_in(unsigned n) { return generator() % n == 0; }

void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char* format, ...) {
    std::fprintf(stderr, "simt: block %u, thread %u: ", current->block->index, current->index);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    failed = true;
}

void make_ready(Thread& thread) { thread.block->warp_of(thread).ready.push_back(&thread); }

// Back to the scheduler; returns once this thread has been made ready, or never.
void suspend() { switch_context(current->context, scheduler); }

void thread_entry() {
    arrive(scheduler);
    (*running_body)();
    current->ended = true;
    ++current->block->ended;
    note_progress();
    switch_context(current->context, scheduler, true);
}

// Waits until all lanes of the warp have come to this collective; the last of them calls `finish` with the 32 lanes.
void together(Collective collective, void (*finish)(const std::unique_ptr<Thread>* lanes)) {
    Block& block = *current->block;
    Warp& warp = block.warp_of(*current);
    if (warp.arrived > 0 && warp.collective != collective) {
        fail("the lanes of its warp are at different instructions");
        suspend();
    }
    warp.collective = collective;
    if (++warp.arrived < kWarp) {
        suspend();
        return;
    }
    warp.arrived = 0;
    const std::unique_ptr<Thread>* lanes = &block.threads[current->index / kWarp * kWarp];
    finish(lanes);
    note_progress();
    for (int i = 0; i < kWarp; ++i) {
        if (lanes[i].get() != current) make_ready(*lanes[i]);
    }
}

void run_copy(const Copy& copy) {
    if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
    } else {
        std::memset(copy.shared, 0, 16);
    }
}

bool is_shared16(const void* pointer) {
    const Block& block = *current->block;
    const auto* byte = static_cast<const unsigned char*>(pointer);
    return byte >= block.shared && byte + 16 <= block.shared + block.shared_bytes &&
           reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

float element(std::uint32_t word, int half, bool bfloat16) {
    const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
    return bfloat16 ? gk::bf16_to_float(bits) : gk::fp16_to_float(bits);
}

void finish_shuffle(const std::unique_ptr<Thread>* lanes) {
    std::uint32_t values[kWarp];
    for (int i = 0; i < kWarp; ++i) values[i] = lanes[lanes[i]->lane]->value;
    for (int i = 0; i < kWarp; ++i) lanes[i]->value = values[i];
}

// PTX ISA, ldmatrix: lane 8 q + r names row r of matrix q; lane i gets elements 2 (i % 4) and the next of row i / 4.
void finish_load_matrices(const std::unique_ptr<Thread>* lanes) {
    for (int q = 0; q < 4; ++q) {
        for (int i = 0; i < kWarp; ++i) {
            std::uint16_t pair[2];
            for (int k = 0; k < 2; ++k) {
                const int row = i / 4, column = i % 4 * 2 + k;
                const bool transposed = lanes[i]->variant;
                const Thread& source = *lanes[q * 8 + (transposed ? column : row)];
                pair[k] = static_cast<const std::uint16_t*>(source.row)[transposed ? row : column];
            }
            lanes[i]->matrices[q] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
        }
    }
}

// PTX ISA, mma.m16n8k16 for 16-bit floating point: the fragments' layouts. Products are exact in double, and their sum
// is rounded once; a device rounds oftener.
// As matrix units do: towards zero.
float cut_off(double x) {
    const float nearest = static_cast<float>(x);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(x) && std::isfinite(nearest)
               ? std::nextafter(nearest, 0.0f)
               : nearest;
}

void finish_multiply_accumulate(const std::unique_ptr<Thread>* lanes) {
    float a[16][16], b[16][8];
    for (int i = 0; i < kWarp; ++i) {
        const Thread& lane = *lanes[i];
        const int group = i / 4, pair = i % 4 * 2;
        for (int k = 0; k < 2; ++k) {
            for (int word = 0; word < 4; ++word) {
                a[group + word % 2 * 8][pair + word / 2 * 8 + k] = element(lane.a[word], k, lane.variant);
            }
            for (int word = 0; word < 2; ++word) b[pair + word * 8 + k][group] = element(lane.b[word], k, lane.variant);
        }
    }
    for (int i = 0; i < kWarp; ++i) {
        for (int word = 0; word < 4; ++word) {
            const int row = i / 4 + word / 2 * 8, column = i % 4 * 2 + word % 2;
            double sum = static_cast<double>(lanes[i]->c[word]);
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
            lanes[i]->c[word] = cut_off(sum);
        }
    }
}

std::unique_ptr<Block> make_block(unsigned index, const Grid& grid, std::size_t& stacks_used) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->shared_bytes = grid.shared_bytes;
    void* shared = nullptr;  // of exactly this size: AddressSanitizer sees what lies beyond
    if (posix_memalign(&shared, kSharedAlignment, grid.shared_bytes == 0 ? 1 : grid.shared_bytes) != 0) std::abort();
    block->shared = static_cast<unsigned char*>(shared);
    std::memset(shared, 0xFF, grid.shared_bytes);  // NaN, in every format
    block->warps.resize(grid.threads / kWarp);
    for (unsigned i = 0; i < grid.threads; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->block = block.get();
        thread->index = i;
        if (stacks_used == stacks.size()) stacks.push_back(std::make_unique<Stack>());
        stacks[stacks_used++]->prepare(thread->context, thread_entry);
        make_ready(*thread);
        block->threads.push_back(std::move(thread));
    }
    return block;
}

void resume(Thread& thread) {
    current = &thread;
    thread_index = Index{thread.index, 0, 0};
    block_index = Index{thread.block->index, 0, 0};
    switch_context(scheduler, thread.context);
}

// Runs blocks side by side until none of their threads can go on; whether all have ended.
bool run_blocks(const std::vector<std::unique_ptr<Block>>& blocks) {
    std::vector<Warp*> warps;
    for (const auto& block : blocks) {
        for (Warp& warp : block->warps) warps.push_back(&warp);
    }
    Warp* favoured = nullptr;
    while (!failed) {
        if (favoured == nullptr || favoured->ready.empty() || one_in(64)) {
            const std::size_t first = generator() % warps.size();
            favoured = nullptr;
            for (std::size_t i = 0; i < warps.size() && favoured == nullptr; ++i) {
                Warp* warp = warps[(first + i) % warps.size()];
                if (!warp->ready.empty()) favoured = warp;
            }
            if (favoured == nullptr) break;
        }
        std::swap(favoured->ready[generator() % favoured->ready.size()], favoured->ready.back());
        Thread* thread = favoured->ready.back();
        favoured->ready.pop_back();
        resume(*thread);
    }
    for (const auto& block : blocks) {
        for (const auto& thread : block->threads) {
            if (thread->ended || failed) continue;
            current = thread.get();
            fail("waits for ever: %u threads of its block are at a barrier, %u have ended", block->arrived,
                 block->ended);
        }
    }
    return !failed;
}

}  // namespace

void set_seed(std::uint64_t seed) { generator.seed(seed); }

bool execute(const std::function<void()>& body, const Grid& grid) {
    running_body = &body;
    block_size = Index{grid.threads, 1, 1};
    grid_size = Index{grid.blocks, 1, 1};
    failed = false;
    pauses = 0;
    for (unsigned first = 0; first < grid.blocks;) {
        const unsigned end = grid.all_at_once ? grid.blocks : first + 1;
        std::vector<std::unique_ptr<Block>> blocks;
        for (std::size_t stacks_used = 0; first < end; ++first) blocks.push_back(make_block(first, grid, stacks_used));
        if (!run_blocks(blocks)) return false;
    }
    return true;
}

unsigned char* shared_memory() { return current->block->shared; }

void note_progress() { pauses = 0; }

void yield() {
    if (!one_in(4)) return;
    make_ready(*current);
    suspend();
}

void pause() {
    if (++pauses > kPausesWithoutProgress) {
        fail("waits for another block, and nobody makes progress");
    } else {
        make_ready(*current);
    }
    suspend();
}

bool barrier(bool predicate) {
    Block& block = *current->block;
    block.any = block.any || predicate;
    if (++block.arrived < block.threads.size()) {
        suspend();
        return block.result;
    }
    block.arrived = 0;
    block.result = block.any;
    block.any = false;
    note_progress();
    for (const auto& thread : block.threads) make_ready(*thread);
    suspend();
    return block.result;
}

std::uint32_t shuffle(std::uint32_t mask, std::uint32_t value, int lane) {
    if (mask != 0xFFFFFFFFu) {
        fail("shuffles of part of a warp are not emulated");
        suspend();
    }
    current->value = value;
    current->lane = lane;
    Thread* own = current;
    together(Collective::shuffle, finish_shuffle);
    return own->value;
}

void copy_async16(void* shared, const void* global, bool valid) {
    if (!is_shared16(shared) || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
        fail("an asynchronous copy from %p to byte %td of %zu of shared memory", global,
             static_cast<unsigned char*>(shared) - current->block->shared, current->block->shared_bytes);
        suspend();
    }
    const Copy copy{shared, global, valid};
    if (one_in(3)) {
        run_copy(copy);  // an early one overwrites what others still read
    } else {
        current->groups.back().push_back(copy);
    }
}

void commit_copies() { current->groups.emplace_back(); }

void wait_copies(std::size_t pending) {
    while (current->groups.size() > pending + 1) {
        for (const Copy& copy : current->groups.front()) run_copy(copy);
        current->groups.pop_front();
    }
}

void load_matrices(std::uint32_t (&result)[4], const void* row, bool transposed) {
    if (!is_shared16(row)) {
        fail("ldmatrix of byte %td of %zu of shared memory",
             static_cast<const unsigned char*>(row) - current->block->shared, current->block->shared_bytes);
        suspend();
    }
    current->row = row;
    current->matrices = result;
    current->variant = transposed;
    together(Collective::load_matrices, finish_load_matrices);
}

void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                         bool bfloat16) {
    current->c = c;
    current->a = a;
    current->b[0] = b0;
    current->b[1] = b1;
    current->variant = bfloat16;
    together(Collective::multiply_accumulate, finish_multiply_accumulate);
}

}  // namespace simt
