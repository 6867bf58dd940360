// The host's side of the emulated runtime: a device of four multiprocessors with the shared memory of sm_89.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace {

constexpr int kMultiprocessors = 4;
constexpr std::size_t kSharedWithoutAsking = 48 * 1024, kSharedPerBlock = 99 * 1024;

std::map<const void*, std::size_t> allowed;

// The bindings launch without Python's lock, and one grid is executed at a time.
std::mutex one_at_a_time;

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorLaunchFailure:
            return "unspecified launch failure";
        case cudaErrorCooperativeLaunchTooLarge:
            return "too many blocks in cooperative launch";
    }
    return "unknown error";
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return cudaErrorInvalidDevice;
    *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : 1;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (static_cast<std::size_t>(value) > kSharedPerBlock) return cudaErrorInvalidValue;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    allowed[kernel] = static_cast<std::size_t>(value);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, std::size_t shared_bytes) {
    *blocks = shared_bytes <= kSharedPerBlock ? 1 : 0;
    return cudaSuccess;
}

cudaError_t simt_launch(const void* kernel, const std::function<void()>& body, const cudaLaunchConfig_t& config) {
    const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
    if (blocks == 0 || threads == 0 || threads > 1024 || threads % simt::kWarp != 0) {
        return cudaErrorInvalidConfiguration;
    }
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto limit = allowed.find(kernel);
    if (config.dynamicSmemBytes > (limit == allowed.end() ? kSharedWithoutAsking : limit->second)) {
        return cudaErrorInvalidValue;
    }
    const bool cooperative = config.numAttrs > 0 && config.attrs[0].val.cooperative != 0;
    if (cooperative && blocks > kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
    return simt::execute(body, {blocks, threads, config.dynamicSmemBytes, cooperative}) ? cudaSuccess
                                                                                        : cudaErrorLaunchFailure;
}
