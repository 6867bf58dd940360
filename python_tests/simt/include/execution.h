// The execution of a grid by one CPU thread: a fiber for each CUDA thread, and what threads do together.
//
// Which fiber goes on next is drawn from a seeded generator. Mostly a warp goes on until it has to wait, so that warps
// run far ahead of one another, and a missing barrier shows; so does a missing wait for an asynchronous copy, which
// happens at a drawn moment between its start and the wait for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

struct Index {
    unsigned x, y, z;
};
extern Index thread_index, block_index, block_size, grid_size;

constexpr int kWarp = 32;

struct Grid {
    unsigned blocks, threads;
    std::size_t shared_bytes;
    bool all_at_once;
};

// Runs the grid. False, with the reason on stderr, if it can't go on: a deadlock, a barrier or a warp's instruction
// that not all of its threads reach, an address that an instruction may not have.
bool execute(const std::function<void()>& body, const Grid& grid);

void set_seed(std::uint64_t seed);

// ------------------------------------------------------------------ called by the fibers

unsigned char* shared_memory();

// Waits for all threads of the block; whether any of them brought a true predicate.
bool barrier(bool predicate);

// Lets others go on.
void yield();

// The same in a loop that waits for another block; without anyone's progress for long, the grid is given up.
void pause();
void note_progress();

std::uint32_t shuffle(std::uint32_t mask, std::uint32_t value, int lane);

// Asynchronous copies of 16 bytes, in groups.
void copy_async16(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(std::size_t pending);

// ldmatrix.x4 of 16-bit elements and mma.m16n8k16, in the layouts of the PTX ISA.
void load_matrices(std::uint32_t (&result)[4], const void* row, bool transposed);
void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, bool bfloat16);

}  // namespace simt
