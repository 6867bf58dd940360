// galore_kernels._native: addresses and sizes in, work done with the interpreter's lock released. Knows nothing of
// torch; what a tensor must be is checked in Python, once, before the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/absmax_block.h"
#include "core/adam.h"
#include "core/rotate_moments.h"
#include "cpu/arguments.h"
#include "cpu/kernels.h"
#include "cpu/update_bindings.h"
#if defined(GK_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using namespace gk::cpu;
using gk::index_t;
using Seed = std::optional<std::uint64_t>;

Moments moments_of(Address m, Address v, Address m_absmax, Address v_absmax) {
    check_absmax(pointer<void>(m_absmax), pointer<void>(v_absmax));
    return Moments{pointer<void>(m), pointer<void>(v), pointer<float>(m_absmax), pointer<float>(v_absmax)};
}

gk::AdamScalars scalars_of(double lr, double beta1, double beta2, double eps, double weight_decay, index_t step,
                           double inv_grad_scale, bool maximize) {
    return gk::AdamScalars{lr, beta1, beta2, eps, weight_decay, at_least("step", step, 0), inv_grad_scale, maximize};
}

// Stochastic rounding draws its bits from the seed and the number of the step being taken.
WeightRounding rounding_of(Seed seed, index_t step) {
    return WeightRounding{seed.has_value(), seed.value_or(0), static_cast<std::uint64_t>(step) + 1};
}

Weight weight_of(Address data, int dtype_code, Seed rounding_seed, index_t step) {
    const gk::DType dtype = dtype_of("param_dtype", dtype_code);
    if (rounding_seed && dtype != gk::DType::bfloat16) {
        throw std::invalid_argument(
            "rounding_seed: stochastic rounding is for bfloat16 parameters (param_dtype=1), got param_dtype=" +
            std::to_string(dtype_code) + "; pass None");
    }
    return Weight{pointer<void>(data), dtype, rounding_of(rounding_seed, step), nullptr};
}

// The same of a projected weight, which may be int8 codes.
Weight projected_weight_of(Address data, int dtype_code, Address scale, Seed rounding_seed, index_t step) {
    const gk::DType dtype = projected_dtype_of(dtype_code);
    check_weight_scale(dtype_code, scale);
    if (dtype != gk::DType::int8) return weight_of(data, dtype_code, rounding_seed, step);
    if (!rounding_seed) {
        throw std::invalid_argument("rounding_seed=None: expected a seed with int8 parameters (param_dtype=3)");
    }
    return Weight{pointer<void>(data), dtype, rounding_of(rounding_seed, step), pointer<float>(scale)};
}

Projection projection_of(index_t rows, index_t cols, int side, Address basis, int basis_dtype, Address basis_scale,
                         index_t rank) {
    return Projection{at_least("rows", rows, 0),
                      at_least("cols", cols, 0),
                      side_of(side),
                      pointer<const void>(basis),
                      basis_dtype_of(basis_dtype, basis_scale),
                      at_least("rank", rank, 1),
                      pointer<const float>(basis_scale)};
}

Rotation rotation_of(index_t rows, Address matrix, index_t rank, index_t new_rank) {
    return Rotation{at_least("rows", rows, 0), pointer<const float>(matrix), at_least("rank", rank, 1),
                    at_least("new_rank", new_rank, 1)};
}

void quantize_blockwise(Address x, int dtype, index_t n, bool is_signed, Address codes, Address absmax,
                        index_t threads) {
    const Kernels& kernels = selected_kernels();
    const gk::DType type = dtype_of("dtype", dtype);
    const int count = thread_count(threads);
    at_least("n", n, 0);
    const py::gil_scoped_release unlocked;
    kernels.quantize_blockwise(pointer<const void>(x), type, n, is_signed, pointer<std::uint8_t>(codes),
                               pointer<float>(absmax), count);
}

void dequantize_blockwise(Address codes, Address absmax, index_t n, bool is_signed, Address out, index_t threads) {
    const int count = thread_count(threads);
    at_least("n", n, 0);
    const py::gil_scoped_release unlocked;
    selected_kernels().dequantize_blockwise(pointer<const std::uint8_t>(codes), pointer<const float>(absmax), n,
                                            is_signed, pointer<float>(out), count);
}

std::vector<float> dynamic_map(bool is_signed) {
    const gk::DynamicMap map = gk::make_dynamic_map(is_signed);
    return std::vector<float>(map.values, map.values + gk::kCodes);
}

py::bytes philox(std::uint64_t seed, std::uint64_t stream, index_t n) {
    std::vector<std::uint16_t> bits(static_cast<std::size_t>(at_least("n", n, 0)));
    selected_kernels().random_bits(seed, stream, n, bits.data());
    return py::bytes(reinterpret_cast<const char*>(bits.data()), bits.size() * sizeof(std::uint16_t));
}

bool all_representable(Address x, int dtype, index_t n, double inv_grad_scale, index_t threads) {
    const gk::DType type = dtype_of("dtype", dtype);
    const int count = thread_count(threads);
    at_least("n", n, 0);
    const py::gil_scoped_release unlocked;
    return selected_kernels().scale_and_check(pointer<const void>(x), type, n, static_cast<float>(inv_grad_scale),
                                              nullptr, count);
}

void adam_update(Address param, int param_dtype, Address grad, int grad_dtype, Address m, Address v, Address m_absmax,
                 Address v_absmax, index_t n, double lr, double beta1, double beta2, double eps, double weight_decay,
                 index_t step, double inv_grad_scale, bool maximize, Seed rounding_seed, index_t threads) {
    const auto scalars = scalars_of(lr, beta1, beta2, eps, weight_decay, step, inv_grad_scale, maximize);
    const Weight weight = weight_of(param, param_dtype, rounding_seed, step);
    const gk::DType grad_type = dtype_of("grad_dtype", grad_dtype);
    const Moments moments = moments_of(m, v, m_absmax, v_absmax);
    const int count = thread_count(threads);
    at_least("n", n, 0);
    const py::gil_scoped_release unlocked;
    selected_kernels().adam_update(weight, pointer<const void>(grad), grad_type, moments, n,
                                   gk::adam_coefficients(scalars, 1.0), count);
}

bool project(Address grad, int grad_dtype, index_t rows, index_t cols, int side, Address basis, int basis_dtype,
             Address basis_scale, index_t rank, Address lowrank_out, Address squares, double inv_grad_scale,
             Address workspace, index_t threads) {
    const Projection projection = projection_of(rows, cols, side, basis, basis_dtype, basis_scale, rank);
    const gk::DType grad_type = dtype_of("grad_dtype", grad_dtype);
    const int count = thread_count(threads);
    const py::gil_scoped_release unlocked;
    return selected_kernels().project(pointer<const void>(grad), grad_type, projection,
                                      static_cast<float>(inv_grad_scale), pointer<float>(lowrank_out),
                                      pointer<float>(squares), pointer<void>(workspace), count);
}

void lowrank_adam(Address lowrank_inout, index_t n, Address m, Address v, Address m_absmax, Address v_absmax, double lr,
                  double beta1, double beta2, double eps, double weight_decay, index_t step, double inv_grad_scale,
                  bool maximize, index_t threads) {
    (void)inv_grad_scale;  // project() has applied it
    const auto scalars = scalars_of(lr, beta1, beta2, eps, weight_decay, step, 1.0, maximize);
    const Moments moments = moments_of(m, v, m_absmax, v_absmax);
    const int count = thread_count(threads);
    at_least("n", n, 0);
    const py::gil_scoped_release unlocked;
    selected_kernels().lowrank_adam(pointer<float>(lowrank_inout), n, moments, gk::adam_coefficients(scalars, 1.0),
                                    count);
}

void back_project_update(Address param, int param_dtype, Address weight_scale, index_t rows, index_t cols, int side,
                         Address update, Address basis, int basis_dtype, Address basis_scale, index_t rank,
                         double scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                         index_t step, double inv_grad_scale, bool maximize, Seed rounding_seed, Address workspace,
                         index_t threads) {
    const auto scalars = scalars_of(lr, beta1, beta2, eps, weight_decay, step, inv_grad_scale, maximize);
    const Weight weight = projected_weight_of(param, param_dtype, weight_scale, rounding_seed, step);
    const Projection projection = projection_of(rows, cols, side, basis, basis_dtype, basis_scale, rank);
    const int count = thread_count(threads);
    const py::gil_scoped_release unlocked;
    selected_kernels().back_project_update(weight, projection, pointer<const float>(update),
                                           gk::adam_coefficients(scalars, scale), pointer<void>(workspace), count);
}

void random_basis(std::uint64_t seed, index_t rows, index_t rank, Address magnitudes, Address out, index_t threads) {
    const int count = thread_count(threads);
    at_least("rows", rows, 0);
    at_least("rank", rank, 1);
    const py::gil_scoped_release unlocked;
    selected_kernels().random_basis(seed, rows, rank, pointer<const std::uint16_t>(magnitudes),
                                    pointer<std::uint16_t>(out), count);
}

index_t workspace_bytes(index_t rows, index_t cols, index_t rank, int side, int param_dtype, index_t threads) {
    const Projection p = projection_of(rows, cols, side, 0, 0, 0, rank);
    return selected_kernels().workspace_bytes(p.short_size(), p.rank, projected_dtype_of(param_dtype),
                                              thread_count(threads));
}

void rotate_moments(index_t rows, Address rotation, index_t rank, index_t new_rank, Address m, Address v,
                    Address m_absmax, Address v_absmax, Address new_m, Address new_v, Address new_m_absmax,
                    Address new_v_absmax, double beta1, double beta2, index_t step, Address workspace,
                    index_t threads) {
    const Rotation turn = rotation_of(rows, rotation, rank, new_rank);
    const Moments source = moments_of(m, v, m_absmax, v_absmax);
    if ((m_absmax == 0) != (new_m_absmax == 0) || (m_absmax == 0) != (new_v_absmax == 0)) {
        throw std::invalid_argument("new_m_absmax, new_v_absmax: expected both addresses with 8-bit moments, else 0");
    }
    const Moments target = moments_of(new_m, new_v, new_m_absmax, new_v_absmax);
    const float c = gk::squared_mean_factor(beta1, beta2, at_least("step", step, 0));
    const int count = thread_count(threads);
    const py::gil_scoped_release unlocked;
    selected_kernels().rotate_moments(source, target, turn, c, pointer<void>(workspace), count);
}

index_t rotate_workspace_bytes(index_t rank, index_t new_rank, index_t threads) {
    return selected_kernels().rotate_workspace_bytes(rotation_of(0, 0, rank, new_rank), thread_count(threads));
}

py::dict build_info() {
    py::list archs;
#if defined(GK_WITH_CUDA)
    std::string all = GK_CUDA_ARCHS;
    for (std::size_t begin = 0, end; begin < all.size(); begin = end + 1) {
        end = std::min(all.find(';', begin), all.size());
        archs.append(all.substr(begin, end - begin));
    }
#endif
    py::dict info;
    info["cuda_archs"] = archs;
    info["isa"] = selected_kernels().isa;
    info["compiler"] = "g++ " __VERSION__;
    info["version"] = GK_VERSION;
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    using namespace pybind11::literals;
    module.doc() =
        "Torch-free kernels. Buffers are addresses of contiguous row-major memory; dtype codes: 0 float32, 1 "
        "bfloat16,\n"
        "2 float16; for a projected weight 3 int8, with weight_scale; for a basis 3 int8 or 4 int4, with basis_scale;\n"
        "side: 0 right, 1 left. Results do not depend on `threads`. Updates are the functions cpu_*; their stages "
        "stand here\n"
        "by themselves for tests.";
    selected_kernels();  // an unusable GALORE_KERNELS_ISA is reported by the import, not by the first step

    module.def("quantize_blockwise", quantize_blockwise, "x"_a, "dtype"_a, "n"_a, "signed"_a, "codes"_a, "absmax"_a,
               "threads"_a, "n elements to 8-bit codes, with one fp32 absmax for each 256.");
    module.def("dequantize_blockwise", dequantize_blockwise, "codes"_a, "absmax"_a, "n"_a, "signed"_a, "out"_a,
               "threads"_a, "n 8-bit codes to fp32.");
    module.def("dynamic_map", dynamic_map, "signed"_a, "The 256 values of the 8-bit code.");
    module.def("philox", philox, "seed"_a, "stream"_a, "n"_a, "The random bits of elements 0..n-1: n uint16.");
    module.def("all_representable", all_representable, "x"_a, "dtype"_a, "n"_a, "inv_grad_scale"_a, "threads"_a,
               "Whether the square of every x * inv_grad_scale is finite.");
    module.def("adam_update", adam_update, "param"_a, "param_dtype"_a, "grad"_a, "grad_dtype"_a, "m"_a, "v"_a,
               "m_absmax"_a, "v_absmax"_a, "n"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "step"_a,
               "inv_grad_scale"_a, "maximize"_a, "rounding_seed"_a, "threads"_a,
               "One step of Adam at full rank. Both absmax 0: m and v are fp32.");
    module.def("project", project, "grad"_a, "grad_dtype"_a, "rows"_a, "cols"_a, "side"_a, "basis"_a, "basis_dtype"_a,
               "basis_scale"_a, "rank"_a, "lowrank_out"_a, "squares"_a, "inv_grad_scale"_a, "workspace"_a, "threads"_a,
               "R (long, rank) fp32 = the projected gradient * inv_grad_scale. squares: 0, or for the fp32 sums of "
               "squares of\n"
               "the gradient's long indices. Returns whether all of R is representable, and the squares finite.");
    module.def("lowrank_adam", lowrank_adam, "lowrank_inout"_a, "n"_a, "m"_a, "v"_a, "m_absmax"_a, "v_absmax"_a, "lr"_a,
               "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "step"_a, "inv_grad_scale"_a, "maximize"_a, "threads"_a,
               "Updates the moments with R, which project() has scaled, and turns R into the direction U in place.");
    module.def("back_project_update", back_project_update, "param"_a, "param_dtype"_a, "weight_scale"_a, "rows"_a,
               "cols"_a, "side"_a, "update"_a, "basis"_a, "basis_dtype"_a, "basis_scale"_a, "rank"_a, "scale"_a, "lr"_a,
               "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "step"_a, "inv_grad_scale"_a, "maximize"_a,
               "rounding_seed"_a, "workspace"_a, "threads"_a,
               "W <- (W - step_size * scale * X) * (1 - lr * weight_decay), X = U @ P.T (right) or P @ U.T (left).");
    module.def("random_basis", random_basis, "seed"_a, "rows"_a, "rank"_a, "magnitudes"_a, "out"_a, "threads"_a,
               "A random basis (rows, rank) times sqrt(rank), bf16; magnitudes: 2048 positive bf16.");
    module.def("workspace_bytes", workspace_bytes, "rows"_a, "cols"_a, "rank"_a, "side"_a, "param_dtype"_a, "threads"_a,
               "Bytes of scratch memory that project() and back_project_update() need; of any alignment to 4.");
    module.def("rotate_moments", rotate_moments, "rows"_a, "rotation"_a, "rank"_a, "new_rank"_a, "m"_a, "v"_a,
               "m_absmax"_a, "v_absmax"_a, "new_m"_a, "new_v"_a, "new_m_absmax"_a, "new_v_absmax"_a, "beta1"_a,
               "beta2"_a, "step"_a, "workspace"_a, "threads"_a,
               "Writes the moments (rows, rank) as they are in another basis, (rows, new_rank), to new_m and new_v.");
    module.def("rotate_workspace_bytes", rotate_workspace_bytes, "rank"_a, "new_rank"_a, "threads"_a,
               "Bytes of scratch memory that rotate_moments() needs; of any alignment to 4.");
    module.def("build_info", build_info, "Instruction set in use, CUDA architectures built, compiler, version.");

    bind_cpu_updates(module);
#if defined(GK_WITH_CUDA)
    bind_cuda(module);
#endif
}
