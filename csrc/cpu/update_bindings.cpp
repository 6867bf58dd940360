#include "update_bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "arguments.h"
#include "updates.h"

namespace py = pybind11;

namespace {

using namespace gk::cpu;
using gk::AdafactorScalars;
using gk::AdamScalars;
using gk::DType;
using gk::index_t;
using gk::TensorRow;
using Row = std::array<Address, gk::kTableColumns>;

Batch make_batch(const std::vector<Row>& rows_of_table, index_t rows, index_t cols, index_t moments, index_t rank,
                 int side, int weight_dtype, int basis_dtype, Address magnitudes, bool stochastic, Address long_basis,
                 int long_basis_dtype, index_t kept, const std::array<index_t, 3>& gradient) {
    std::vector<TensorRow> tensors;
    const DType weight_type = projected_dtype_of(weight_dtype);
    DType basis_type = DType::float32;
    for (const Row& row : rows_of_table) {
        tensors.push_back(gk::tensor_row(row.data()));
        const TensorRow& own = tensors.back();
        basis_type = basis_dtype_of(basis_dtype, reinterpret_cast<Address>(own.basis_scale));
        check_weight_scale(weight_dtype, reinterpret_cast<Address>(own.weight_scale));
        if (gradient[0] == 0) check_absmax(own.m_absmax, own.v_absmax);
    }
    if (stochastic ? weight_type != DType::bfloat16 && weight_type != DType::int8 : weight_type == DType::int8) {
        throw std::invalid_argument(
            "stochastic: expected true with int8 weights, false with float32 and float16, got " +
            std::to_string(stochastic) + " with weight_dtype=" + std::to_string(weight_dtype));
    }
    return Batch{std::move(tensors),
                 at_least("rows", rows, 0),
                 at_least("cols", cols, 0),
                 at_least("moments", moments, 0),
                 at_least("rank", rank, 0),
                 side_of(side),
                 weight_type,
                 basis_type,
                 pointer<const std::uint16_t>(magnitudes),
                 stochastic,
                 pointer<const void>(long_basis),
                 dtype_of("long_basis_dtype", long_basis_dtype),
                 at_least("kept", kept, 0),
                 Matrices{at_least("gradient", gradient[0], 0), at_least("gradient", gradient[1], 0),
                          at_least("gradient", gradient[2], 0)}};
}

Gradients gradients_of(const Batch& batch, const std::vector<Address>& addresses, int dtype) {
    if (addresses.size() != batch.tensors.size()) {
        throw std::invalid_argument("gradients: expected " + std::to_string(batch.tensors.size()) + ", one of each " +
                                    "tensor, got " + std::to_string(addresses.size()));
    }
    Gradients gradients{{}, dtype_of("grad_dtype", dtype)};
    for (const Address address : addresses) gradients.data.push_back(pointer<const void>(address));
    return gradients;
}

// Of an update that projects.
const Batch& projected(const Batch& batch) {
    at_least("rank", batch.rank, 1);
    return batch;
}

const Batch& with_norms(const Batch& batch) {
    for (const TensorRow& row : batch.tensors) {
        if (row.scaled_norm == nullptr) throw std::invalid_argument("scaled_norm: expected an address, got 0");
    }
    return projected(batch);
}

const Batch& with_second_moments(const Batch& batch) {
    const Matrices& g = batch.gradient;
    if (g.planes * g.rows * g.cols != batch.moments) {
        throw std::invalid_argument("gradient: expected matrices of " + std::to_string(batch.moments) +
                                    " elements together, got " + std::to_string(g.planes * g.rows * g.cols));
    }
    for (const TensorRow& row : batch.tensors) {
        const bool means = row.m_absmax != nullptr && row.v_absmax != nullptr;
        if (batch.moments > 0 && means == (row.v != nullptr)) {
            throw std::invalid_argument(
                "exp_avg_sq: expected its address, or those of its means over rows and columns and 0 for itself");
        }
    }
    return batch;
}

AdamScalars scalars_of(double lr, double beta1, double beta2, double eps, double weight_decay, double inv_grad_scale,
                       bool maximize) {
    return AdamScalars{lr, beta1, beta2, eps, weight_decay, 0, inv_grad_scale, maximize};
}

AdafactorScalars adafactor_scalars_of(double lr, double eps1, double eps2, double clip_threshold, double decay_rate,
                                      double beta1, double weight_decay, bool scale_parameter, bool relative_step,
                                      bool warmup_init, double inv_grad_scale, bool maximize) {
    return AdafactorScalars{lr,   relative_step,  warmup_init, scale_parameter, eps1,
                            eps2, clip_threshold, decay_rate,  beta1,           weight_decay,
                            0,    inv_grad_scale, maximize};
}

}  // namespace

void bind_cpu_updates(py::module_& module) {
    using namespace pybind11::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    py::class_<Batch>(module, "CpuBatch", "Tensors of one shape; see galore_kernels/backends/batch.py.")
        .def(py::init(&make_batch), "rows_of_table"_a, "rows"_a, "cols"_a, "moments"_a, "rank"_a, "side"_a,
             "weight_dtype"_a, "basis_dtype"_a, "magnitudes"_a, "stochastic"_a, "long_basis"_a, "long_basis_dtype"_a,
             "kept"_a, "gradient"_a)
        .def(
            "scratch_bytes",
            [](const Batch& batch, index_t threads) { return scratch_bytes(batch, thread_count(threads)); },
            "threads"_a, "Bytes of scratch memory that its update needs; at any multiple of 8.");
    py::class_<AdamScalars>(module, "CpuScalars", "What the updates of a step share.")
        .def(py::init(&scalars_of), "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "inv_grad_scale"_a,
             "maximize"_a);
    py::class_<AdafactorScalars>(module, "CpuAdafactorScalars", "What Adafactor's updates of a step share.")
        .def(py::init(&adafactor_scalars_of), "lr"_a, "eps1"_a, "eps2"_a, "clip_threshold"_a, "decay_rate"_a, "beta1"_a,
             "weight_decay"_a, "scale_parameter"_a, "relative_step"_a, "warmup_init"_a, "inv_grad_scale"_a,
             "maximize"_a);
    module.def(
        "cpu_adam_update",
        [](const Batch& batch, const std::vector<Address>& gradients, int grad_dtype, const AdamScalars& scalars,
           index_t threads) {
            adam_update(batch, gradients_of(batch, gradients, grad_dtype), scalars, thread_count(threads));
        },
        unlocked, "batch"_a, "gradients"_a, "grad_dtype"_a, "scalars"_a, "threads"_a, "Adam at full rank.");
    const auto through_subspace = [&](const char* name, auto update, const char* what) {
        module.def(
            name,
            [update](const Batch& batch, const std::vector<Address>& gradients, int grad_dtype,
                     const AdamScalars& scalars, double scale, Address scratch, index_t threads) {
                update(projected(batch), gradients_of(batch, gradients, grad_dtype), scalars, scale,
                       pointer<void>(scratch), thread_count(threads));
            },
            unlocked, "batch"_a, "gradients"_a, "grad_dtype"_a, "scalars"_a, "scale"_a, "scratch"_a, "threads"_a, what);
    };
    through_subspace("cpu_galore_update", galore_update, "From gradient to weight through the subspace.");
    through_subspace("cpu_lowrank_update", lowrank_update, "From low-rank gradient to weight.");
    module.def(
        "cpu_apollo_update",
        [](const Batch& batch, const std::vector<Address>& gradients, int grad_dtype, const AdamScalars& scalars,
           bool per_tensor, double scale, bool scale_front, double norm_growth_limit, Address scratch,
           index_t threads) {
            const FactorScalars how{per_tensor, scale, scale_front, norm_growth_limit, 0.0f};
            apollo_update(with_norms(batch), gradients_of(batch, gradients, grad_dtype), scalars, how,
                          pointer<void>(scratch), thread_count(threads));
        },
        unlocked, "batch"_a, "gradients"_a, "grad_dtype"_a, "scalars"_a, "per_tensor"_a, "scale"_a, "scale_front"_a,
        "norm_growth_limit"_a, "scratch"_a, "threads"_a,
        "From gradient to weight, scaled by what the subspace's moments say.");
    module.def(
        "cpu_adafactor_update",
        [](const Batch& batch, const std::vector<Address>& gradients, int grad_dtype, const AdafactorScalars& scalars,
           double scale, bool is_projected, Address scratch, index_t threads) {
            adafactor_update(with_second_moments(batch), gradients_of(batch, gradients, grad_dtype), scalars, scale,
                             is_projected, pointer<void>(scratch), thread_count(threads));
        },
        unlocked, "batch"_a, "gradients"_a, "grad_dtype"_a, "scalars"_a, "scale"_a, "is_projected"_a, "scratch"_a,
        "threads"_a, "Adafactor, at full rank or through the subspace.");
}
