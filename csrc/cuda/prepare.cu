// write_column: the addresses of a batch's tensors. prepare: what a step's launches share, from scalars that lie on the
// device. One thread for each tensor.
#include <algorithm>

#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = 128;

// As many as a kernel's parameters have room for (4 KB on every architecture and driver), with the others beside them.
constexpr int kValuesInLaunch = 480;
struct Values {
    std::uint64_t value[kValuesInLaunch];
};

__global__ void __launch_bounds__(kThreads)
    write_column_kernel(std::uint64_t* first, index_t columns, int count, Values values) {
    for (int i = threadIdx.x; i < count; i += kThreads) first[i * columns] = values.value[i];
}

__device__ double read_scalar(const Scalar& scalar) {
    return scalar.is_double ? *static_cast<const double*>(scalar.data)
                            : static_cast<double>(*static_cast<const float*>(scalar.data));
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(Batch batch, StepScalars scalars, Control* control) {
    const index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= batch.count) return;
    const TensorRow row = batch.row(i);
    AdamScalars adam = scalars.adam;
    adam.lr = read_scalar(scalars.lr);
    adam.step = static_cast<index_t>(*row.step);
    adam.inv_grad_scale = scalars.grad_scale.data != nullptr ? 1.0 / read_scalar(scalars.grad_scale) : 1.0;
    Control result{};
    result.coefficients = adam_coefficients(adam, scalars.scale);
    result.step_size = adam_step_size(adam, scalars.scale);
    result.skip = scalars.found_inf.data != nullptr && read_scalar(scalars.found_inf) != 0.0 ? kSkipFoundInf : 0;
    result.step = static_cast<std::uint64_t>(adam.step) + 1;
    control[i] = result;
}

}  // namespace

const LaunchShape kWriteColumnShape{"write_column", kThreads, 0};
const LaunchShape kPrepareShape{"prepare", kThreads, 0};

cudaError_t write_column(std::uint64_t* table, index_t columns, index_t column, const std::uint64_t* values,
                         index_t count, const Queue& queue) {
    for (index_t done = 0; done < count; done += kValuesInLaunch) {
        const int now = static_cast<int>(count - done < kValuesInLaunch ? count - done : kValuesInLaunch);
        Values some{};
        std::copy_n(values + done, now, some.value);
        const cudaError_t error =
            launch(write_column_kernel, Grid{1, kThreads}, queue, table + done * columns + column, columns, now, some);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t usable(int device) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return guard.error();
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, prepare_kernel);
}

cudaError_t prepare(const Batch& batch, const StepScalars& scalars, Control* control, const Queue& queue) {
    return launch(prepare_kernel, Grid{divide_up(batch.count, kThreads), kThreads}, queue, batch, scalars, control);
}

}  // namespace gk::cuda
