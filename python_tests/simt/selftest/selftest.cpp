// Kernels that are right, and the same with one thing left out, for the tests of the emulation itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda/instructions.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace {

using gk::DType;
using gk::cuda::Grid;
using gk::cuda::launch;
using gk::cuda::Queue;

constexpr int kThreads = 128;

// Each thread hands a number to the one half a block away.
void exchange_kernel(int* out, bool with_barrier) {
    int* shared = reinterpret_cast<int*>(gk::cuda::shared_memory());
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + kThreads / 2) % kThreads];
}

void copy_kernel(const int* in, int* out, bool with_wait) {
    int* shared = reinterpret_cast<int*>(gk::cuda::shared_memory());
    gk::cuda::copy_async16(shared + threadIdx.x * 4, in + threadIdx.x * 4, true);
    gk::cuda::commit_copies();
    if (with_wait) gk::cuda::wait_copies<0>();
    __syncthreads();
    for (unsigned i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = shared[(threadIdx.x * 4 + 100) % (kThreads * 4) + i];
}

// A second copy to a place that others may still be reading.
void reuse_kernel(const int* in, int* out, bool with_barrier) {
    int* shared = reinterpret_cast<int*>(gk::cuda::shared_memory());
    shared[threadIdx.x * 4] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + kThreads / 2) % kThreads * 4];
    if (with_barrier) __syncthreads();
    gk::cuda::copy_async16(shared + threadIdx.x * 4, in + threadIdx.x * 4, true);
    gk::cuda::commit_copies();
    gk::cuda::wait_copies<0>();
}

void divergent_kernel(int mode) {
    if (mode == 0 && threadIdx.x == 5) return;                  // a thread that the barrier waits for
    if (mode == 1 && threadIdx.x == 5) __shfl_sync(~0u, 1, 0);  // a lane at another instruction than the others
    __syncthreads();
}

void meet_kernel(std::uint32_t* counter, std::uint32_t expected, std::uint32_t* seen) {
    if (threadIdx.x == 0) {
        gk::cuda::publish_add(counter, 1);
        while (gk::cuda::observe(counter) < expected) gk::cuda::pause();
    }
    __syncthreads();
    seen[blockIdx.x] = *counter;
}

void overrun_kernel(unsigned words) { reinterpret_cast<int*>(gk::cuda::shared_memory())[words + threadIdx.x] = 1; }

void matrices_kernel(const std::uint16_t* in, std::uint32_t* out, bool transposed, int offset) {
    auto* shared = reinterpret_cast<std::uint16_t*>(gk::cuda::shared_memory());
    for (int i = 0; i < 8; ++i) shared[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i];
    __syncthreads();
    std::uint32_t r[4];
    const std::uint16_t* row = shared + threadIdx.x * 8 + offset;
    if (transposed) {
        gk::cuda::load_matrices_transposed(r, row);
    } else {
        gk::cuda::load_matrices(r, row);
    }
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

void multiply_kernel(const std::uint32_t* a, const std::uint32_t* b, float* c, bool bfloat16) {
    const unsigned lane = threadIdx.x;
    const std::uint32_t own_a[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
    float own_c[4] = {c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]};
    if (bfloat16) {
        gk::cuda::multiply_accumulate<DType::bfloat16>(own_c, own_a, b[lane * 2], b[lane * 2 + 1]);
    } else {
        gk::cuda::multiply_accumulate<DType::float16>(own_c, own_a, b[lane * 2], b[lane * 2 + 1]);
    }
    for (int i = 0; i < 4; ++i) c[lane * 4 + i] = own_c[i];
}

constexpr Queue kQueue{0, nullptr};

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
T* data(Array<T>& array) {
    return array.mutable_data();
}

}  // namespace

PYBIND11_MODULE(_simt_selftest, module) {
    module.def("set_seed", simt::set_seed);
    module.def("exchange", [](Array<int> out, bool right) {
        return int{launch(exchange_kernel, Grid{1, kThreads, kThreads * 4}, kQueue, data(out), right)};
    });
    module.def("copy", [](Array<int> in, Array<int> out, bool right) {
        return int{launch(copy_kernel, Grid{1, kThreads, kThreads * 16}, kQueue, data(in), data(out), right)};
    });
    module.def("reuse", [](Array<int> in, Array<int> out, bool right) {
        return int{launch(reuse_kernel, Grid{1, kThreads, kThreads * 16}, kQueue, data(in), data(out), right)};
    });
    module.def("divergent", [](int mode) { return int{launch(divergent_kernel, Grid{1, kThreads}, kQueue, mode)}; });
    module.def("meet", [](Array<std::uint32_t> counter, std::uint32_t expected, Array<std::uint32_t> seen, int blocks,
                          bool cooperative) {
        return int{
            launch(meet_kernel, Grid{blocks, kThreads, 0, cooperative}, kQueue, data(counter), expected, data(seen))};
    });
    module.def("overrun", [](std::size_t bytes, unsigned words) {
        return int{launch(overrun_kernel, Grid{1, 32, bytes}, kQueue, words)};
    });
    module.def("matrices", [](Array<std::uint16_t> in, Array<std::uint32_t> out, bool transposed, int offset) {
        return int{launch(matrices_kernel, Grid{1, 32, 512}, kQueue, data(in), data(out), transposed, offset)};
    });
    module.def("multiply", [](Array<std::uint32_t> a, Array<std::uint32_t> b, Array<float> c, bool bfloat16) {
        return int{launch(multiply_kernel, Grid{1, 32}, kQueue, data(a), data(b), data(c), bfloat16)};
    });
    module.def("launch_empty", [](int blocks, int threads, std::size_t bytes) {
        return int{launch(overrun_kernel, Grid{blocks, threads, bytes}, kQueue, 0u)};
    });
}
