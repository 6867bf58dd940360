#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;

namespace {

using gk::DType;
using gk::index_t;
using gk::TensorRow;
using gk::cuda::Batch;
using gk::cuda::Control;
using gk::cuda::MomentMatrix;
using gk::cuda::Queue;
using gk::cuda::Scalar;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

Queue queue_of(int device, Address stream) { return Queue{device, reinterpret_cast<cudaStream_t>(stream)}; }

// One of the dtypes up to `last`.
DType dtype_of(const char* name, int code, DType last = DType::float16) {
    static constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "int4"};
    if (code >= 0 && code <= static_cast<int>(last)) return static_cast<DType>(code);
    std::string legal;
    for (int i = 0; i <= static_cast<int>(last); ++i) {
        legal += (i == 0 ? "" : ", ") + std::to_string(i) + " (" + kNames[i] + ")";
    }
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(code) + ": expected one of " + legal);
}

void check(const char* stage, cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(stage) + ": CUDA error: " + cudaGetErrorString(error));
    }
}

Batch make_batch(Address table, const std::array<Address, gk::kTableColumns>& row, index_t count, index_t rows,
                 index_t cols, index_t moments, int rank, int side, int weight_dtype, int grad_dtype, int basis_dtype,
                 Address magnitudes, bool eight_bit, bool stochastic, bool aligned) {
    if (side != 0 && side != 1) throw std::invalid_argument("side: expected 0 (right) or 1 (left)");
    if (count < 1 || (count > 1 && table == 0)) throw std::invalid_argument("count: expected 1, or a table's rows");
    if (rows < 0 || cols < 0 || moments < 0 || rank < 0) throw std::invalid_argument("a size is negative");
    const DType weight = dtype_of("weight_dtype", weight_dtype, DType::int8);
    if (weight == DType::int8 && rows != 0 && cols != 0 && row[7] == 0) {
        throw std::invalid_argument("weight_dtype=3 (int8): expected the address of a weight_scale in the row, got 0");
    }
    if (weight == DType::int8 && !stochastic) {
        throw std::invalid_argument("weight_dtype=3 (int8): rounded stochastically; pass seeds, and stochastic=True");
    }
    return Batch{pointer<const TensorRow>(table),
                 gk::tensor_row(row.data()),
                 count,
                 rows,
                 cols,
                 moments,
                 rank,
                 static_cast<gk::Side>(side),
                 weight,
                 dtype_of("grad_dtype", grad_dtype),
                 dtype_of("basis_dtype", basis_dtype, DType::int4),
                 pointer<const std::uint16_t>(magnitudes),
                 eight_bit,
                 stochastic,
                 aligned};
}

MomentMatrix moments_of(const std::array<Address, 4>& a, index_t rows, int rank) {
    return MomentMatrix{
        pointer<void>(a[0]), pointer<void>(a[1]), pointer<float>(a[2]), pointer<float>(a[3]), rows, rank};
}

// Of the stages that take weights as numbers. back_project_update and scaled_gradient_update take codes.
void check_no_codes(const Batch& batch) {
    if (batch.weight_dtype == DType::int8) dtype_of("weight_dtype", static_cast<int>(DType::int8));
}

// Calls a launcher without the interpreter's lock: a launch waits where the stream's queue is full.
template <class Launch>
void run(const char* stage, const Launch& launch) {
    cudaError_t error;
    {
        const py::gil_scoped_release unlocked;
        error = launch();
    }
    check(stage, error);
}

void bind_stages(py::module_& module) {
    using namespace pybind11::literals;
    namespace cuda = gk::cuda;
    module.def(
        "cuda_write_column",
        [](Address table, index_t columns, index_t column, const std::vector<std::uint64_t>& values, int device,
           Address stream) {
            run("write_column", [&] {
                return cuda::write_column(pointer<std::uint64_t>(table), columns, column, values.data(),
                                          static_cast<index_t>(values.size()), queue_of(device, stream));
            });
        },
        "table"_a, "columns"_a, "column"_a, "values"_a, "device"_a, "stream"_a, "table[:, column] = values.");
    module.def(
        "cuda_prepare",
        [](const Batch& batch, Address control, Address lr, bool lr_is_double, Address grad_scale,
           bool grad_scale_is_double, Address found_inf, bool found_inf_is_double, double beta1, double beta2,
           double eps, double weight_decay, bool maximize, double scale, int device, Address stream) {
            const cuda::StepScalars scalars{gk::AdamScalars{0.0, beta1, beta2, eps, weight_decay, 0, 1.0, maximize},
                                            Scalar{pointer<const void>(lr), lr_is_double},
                                            Scalar{pointer<const void>(grad_scale), grad_scale_is_double},
                                            Scalar{pointer<const void>(found_inf), found_inf_is_double}, scale};
            run("prepare",
                [&] { return cuda::prepare(batch, scalars, pointer<Control>(control), queue_of(device, stream)); });
        },
        "batch"_a, "control"_a, "lr"_a, "lr_is_double"_a, "grad_scale"_a, "grad_scale_is_double"_a, "found_inf"_a,
        "found_inf_is_double"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "maximize"_a, "scale"_a, "device"_a,
        "stream"_a, "Fills the control rows. grad_scale, found_inf: 0 where there is none.");
    module.def("cuda_project_splits", cuda::project_splits, "batch"_a, "device"_a,
               "Parts that project() cuts the short dimension into; above 1 it needs partial sums.");
    module.def(
        "cuda_project",
        [](const Batch& batch, Address control, Address lowrank, Address squares, bool final, int splits,
           Address partial, Address partial_squares, int device, Address stream) {
            const cuda::Projected to{pointer<float>(lowrank), pointer<float>(squares)};
            const cuda::Projected parts{pointer<float>(partial), pointer<float>(partial_squares)};
            run("project", [&] {
                return cuda::project(batch, pointer<Control>(control), to, final, splits, parts,
                                     queue_of(device, stream));
            });
        },
        "batch"_a, "control"_a, "lowrank"_a, "squares"_a, "final"_a, "splits"_a, "partial"_a, "partial_squares"_a,
        "device"_a, "stream"_a,
        "lowrank (count, long * rank) and squares (count, long) fp32, or 0; final: scaled, signed and checked. "
        "partial, partial_squares: (splits, ...) of both.");
    module.def(
        "cuda_scale_and_check",
        [](Address source, int dtype, index_t count, index_t elements, Address control, Address lowrank, int device,
           Address stream) {
            run("scale_and_check", [&] {
                return cuda::scale_and_check(pointer<const void>(source), dtype_of("dtype", dtype), 1, count, elements,
                                             cuda::SumOf::gradients, pointer<Control>(control), pointer<float>(lowrank),
                                             queue_of(device, stream));
            });
        },
        "source"_a, "dtype"_a, "count"_a, "elements"_a, "control"_a, "lowrank"_a, "device"_a, "stream"_a,
        "lowrank = source scaled and signed; sets the skip flags.");
    module.def(
        "cuda_lowrank_adam",
        [](const Batch& batch, Address control, Address lowrank, Address direction, int direction_dtype, int device,
           Address stream) {
            run("lowrank_adam", [&] {
                return cuda::lowrank_adam(batch, pointer<const Control>(control), pointer<const float>(lowrank),
                                          pointer<void>(direction), dtype_of("direction_dtype", direction_dtype),
                                          queue_of(device, stream));
            });
        },
        "batch"_a, "control"_a, "lowrank"_a, "direction"_a, "direction_dtype"_a, "device"_a, "stream"_a,
        "Moments, step and skipped; direction may be lowrank.");
    module.def(
        "cuda_back_project_update",
        [](const Batch& batch, Address control, Address direction, int direction_dtype, int device, Address stream) {
            run("back_project_update", [&] {
                return cuda::back_project_update(batch, pointer<const Control>(control), pointer<const void>(direction),
                                                 dtype_of("direction_dtype", direction_dtype),
                                                 queue_of(device, stream));
            });
        },
        "batch"_a, "control"_a, "direction"_a, "direction_dtype"_a, "device"_a, "stream"_a,
        "The weights, int8 ones with their scales, from direction (count, long * rank).");
    module.def(
        "cuda_adam_update",
        [](const Batch& batch, Address control, int device, Address stream) {
            check_no_codes(batch);
            run("adam_update",
                [&] { return cuda::adam_update(batch, pointer<Control>(control), queue_of(device, stream)); });
        },
        "batch"_a, "control"_a, "device"_a, "stream"_a, "Full rank: checks, then updates everything.");
    module.def(
        "cuda_gradient_factors",
        [](const Batch& batch, Address control, Address lowrank, Address direction, Address squares, Address norms,
           Address factors, bool one_factor, double norm_scale, double limit, int device, Address stream) {
            const cuda::ApolloScalars apollo{one_factor, norm_scale, limit};
            run("gradient_factors", [&] {
                return cuda::gradient_factors(batch, pointer<const Control>(control), pointer<const float>(lowrank),
                                              pointer<const float>(direction), pointer<const float>(squares),
                                              pointer<float>(norms), pointer<float>(factors), apollo,
                                              queue_of(device, stream));
            });
        },
        "batch"_a, "control"_a, "lowrank"_a, "direction"_a, "squares"_a, "norms"_a, "factors"_a, "one_factor"_a,
        "norm_scale"_a, "limit"_a, "device"_a, "stream"_a,
        "factors (count, long) fp32 and scaled_norm; norms: as many floats in between. limit: 0 for none.");
    module.def(
        "cuda_scaled_gradient_update",
        [](const Batch& batch, Address control, Address factors, int device, Address stream) {
            run("scaled_gradient_update", [&] {
                return cuda::scaled_gradient_update(batch, pointer<const Control>(control),
                                                    pointer<const float>(factors), queue_of(device, stream));
            });
        },
        "batch"_a, "control"_a, "factors"_a, "device"_a, "stream"_a,
        "The weights, int8 ones with their scales, from the gradients and factors (count, long).");
    module.def(
        "cuda_random_basis",
        [](Address entries, index_t rows, index_t rank, std::uint64_t seed, Address magnitudes, int device,
           Address stream) {
            if (rows < 0 || rank < 1) throw std::invalid_argument("rows, rank: too small");
            run("random_basis", [&] {
                return cuda::random_basis(pointer<std::uint16_t>(entries), rows, rank, seed,
                                          pointer<const std::uint16_t>(magnitudes), queue_of(device, stream));
            });
        },
        "entries"_a, "rows"_a, "rank"_a, "seed"_a, "magnitudes"_a, "device"_a, "stream"_a,
        "entries (rows, rank) bf16, times sqrt(rank). magnitudes: the family's 2048, bf16.");
    module.def("cuda_in_one_pass", cuda::in_one_pass, "batch"_a, "device"_a,
               "Whether cuda_galore_update takes the batch and fills the device with it.");
    module.def(
        "cuda_galore_update",
        [](const Batch& batch, Address control, int device, Address stream) {
            check_no_codes(batch);
            run("galore_update",
                [&] { return cuda::galore_update(batch, pointer<Control>(control), queue_of(device, stream)); });
        },
        "batch"_a, "control"_a, "device"_a, "stream"_a, "The whole update in one pass.");
}

}  // namespace

void bind_cuda(py::module_& module) {
    using namespace pybind11::literals;
    // Local: the tests load the kernels a second time, compiled for the CPU.
    py::class_<Batch>(module, "CudaBatch", py::module_local(),
                      "Tensors of one shape; see galore_kernels/backends/batch.py.")
        .def(py::init(&make_batch), "table"_a, "row"_a, "count"_a, "rows"_a, "cols"_a, "moments"_a, "rank"_a, "side"_a,
             "weight_dtype"_a, "grad_dtype"_a, "basis_dtype"_a, "magnitudes"_a, "eight_bit"_a, "stochastic"_a,
             "aligned"_a);
    bind_stages(module);
    module.def(
        "cuda_device_error",
        [](int device) {
            const cudaError_t error = gk::cuda::usable(device);
            return std::string(error == cudaSuccess ? "" : cudaGetErrorString(error));
        },
        "device"_a, "Why the kernels can't run on the device; empty if they can.");
    module.def(
        "cuda_launch_shapes",
        [] {
            namespace cuda = gk::cuda;
            py::dict shapes;
            for (const cuda::LaunchShape* shape :
                 {&cuda::kWriteColumnShape, &cuda::kPrepareShape, &cuda::kProjectShape, &cuda::kProjectWithSquaresShape,
                  &cuda::kScaleAndCheckShape, &cuda::kLowrankAdamShape, &cuda::kBackProjectUpdateShape,
                  &cuda::kBackProjectUpdateInt8Shape, &cuda::kAdamUpdateShape, &cuda::kGaloreUpdateShape,
                  &cuda::kRowNormsShape, &cuda::kGradientFactorsShape, &cuda::kScaledGradientUpdateShape,
                  &cuda::kScaledGradientUpdateInt8Shape, &cuda::kRandomBasisShape, &cuda::kQuantizeBlockwiseShape,
                  &cuda::kRotateMomentsShape}) {
                shapes[shape->stage] = py::make_tuple(shape->threads, shape->shared_bytes);
            }
            return shapes;
        },
        "Stage -> threads in a block, bytes of dynamic shared memory.");
    module.def(
        "cuda_quantize_blockwise",
        [](Address x, int dtype, index_t n, bool is_signed, Address codes, Address absmax, int device, Address stream) {
            run("quantize_blockwise", [&] {
                return gk::cuda::quantize_blockwise(pointer<const void>(x), dtype_of("dtype", dtype), n, is_signed,
                                                    pointer<std::uint8_t>(codes), pointer<float>(absmax),
                                                    queue_of(device, stream));
            });
        },
        "x"_a, "dtype"_a, "n"_a, "signed"_a, "codes"_a, "absmax"_a, "device"_a, "stream"_a,
        "quantize_blockwise on the GPU, asynchronous on the stream.");
    module.def(
        "cuda_dequantize_blockwise",
        [](Address codes, Address absmax, index_t n, bool is_signed, Address out, int device, Address stream) {
            run("dequantize_blockwise", [&] {
                return gk::cuda::dequantize_blockwise(pointer<const std::uint8_t>(codes), pointer<const float>(absmax),
                                                      n, is_signed, pointer<float>(out), queue_of(device, stream));
            });
        },
        "codes"_a, "absmax"_a, "n"_a, "signed"_a, "out"_a, "device"_a, "stream"_a,
        "dequantize_blockwise on the GPU, asynchronous on the stream.");
    module.def(
        "cuda_rotate_moments",
        [](const std::array<Address, 4>& source, const std::array<Address, 4>& target, index_t rows, int rank,
           int new_rank, Address rotation, Address step, double beta1, double beta2, int device, Address stream) {
            if (rows < 0 || rank < 1 || new_rank < 1) throw std::invalid_argument("rows, rank, new_rank: too small");
            run("rotate_moments", [&] {
                return gk::cuda::rotate_moments(moments_of(source, rows, rank), moments_of(target, rows, new_rank),
                                                pointer<const float>(rotation), pointer<const float>(step), beta1,
                                                beta2, queue_of(device, stream));
            });
        },
        "source"_a, "target"_a, "rows"_a, "rank"_a, "new_rank"_a, "rotation"_a, "step"_a, "beta1"_a, "beta2"_a,
        "device"_a, "stream"_a, "source, target: m, v and their absmax, 0 for fp32; rotation (rank, new_rank).");
}
