// Launching a kernel on a given device and stream, with errors as return values.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "core/platform.h"

namespace gk::cuda {

// The static runtime has an idea of its own of the current device, and torch has another; so the caller says which
// device the pointers and the stream belong to, and what was current before is restored.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)) {
        if (error_ != cudaSuccess || device == previous_) return;
        error_ = cudaSetDevice(device);
        switched_ = true;
    }
    ~DeviceGuard() {
        if (switched_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t error() const { return error_; }

 private:
    int previous_ = 0;
    bool switched_ = false;
    cudaError_t error_;
};

// Where and how a launcher launches.
struct Queue {
    int device;
    cudaStream_t stream;
};

constexpr index_t kMostBlocks = 0x7fffffff;

struct Grid {
    index_t blocks;
    int threads;
    std::size_t shared_bytes = 0;
    bool cooperative = false;  // all blocks at once: they wait for one another
};

// More than 48 KB of shared memory has to be asked for, once per kernel and device; asking again costs little.
constexpr std::size_t kSharedBytesWithoutAsking = 48 * 1024;

template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), std::size_t bytes) {
    if (bytes <= kSharedBytesWithoutAsking) return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, const Queue& queue, Arguments... arguments) {
    // The kernels decode their block's number in 32 bits: a division in 64 is a subroutine.
    if (grid.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
    const DeviceGuard guard(queue.device);
    if (guard.error() != cudaSuccess) return guard.error();
    const cudaError_t allowed = allow_shared(kernel, grid.shared_bytes);
    if (allowed != cudaSuccess) return allowed;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = queue.stream;
    config.attrs = &attribute;
    config.numAttrs = grid.cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// What the device has, asked once per call of a launcher: the runtime keeps it.
inline int device_attribute(int device, cudaDeviceAttr attribute) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// What vector loads and stores need of an address.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

GK_HOST_DEVICE constexpr index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

}  // namespace gk::cuda
