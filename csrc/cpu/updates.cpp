#include "updates.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace gk::cpu {

namespace {

// Pieces of scratch memory; of none (null) it counts what they would take.
class Scratch {
 public:
    explicit Scratch(void* memory) : memory_(reinterpret_cast<std::uintptr_t>(memory)) {}

    template <class T>
    T* take(index_t n) {
        static_assert(alignof(T) <= kAlignment, "every piece begins at a multiple of it");
        const std::uintptr_t begin = memory_ + static_cast<std::uintptr_t>(bytes_);
        bytes_ += (n * static_cast<index_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
        return reinterpret_cast<T*>(begin);
    }

    index_t bytes() const { return bytes_; }

 private:
    static constexpr index_t kAlignment = 8;
    std::uintptr_t memory_;
    index_t bytes_ = 0;
};

template <class Scalars>
Scalars of_tensor(const TensorRow& row, Scalars scalars) {
    scalars.step = static_cast<index_t>(*row.step);
    return scalars;
}

// Of a gradient whose scale project() or scale_and_check() has applied.
AdamScalars unscaled(AdamScalars scalars) {
    scalars.inv_grad_scale = 1.0;
    return scalars;
}

Moments moments_of(const TensorRow& row) { return Moments{row.m, row.v, row.m_absmax, row.v_absmax}; }

AdafactorMoments adafactor_moments_of(const TensorRow& row) {
    return {static_cast<float*>(row.m), static_cast<float*>(row.v), row.m_absmax, row.v_absmax};
}

// Stochastic rounding draws its bits from the seed and the number of the step being taken. step: those before it.
Weight weight_of(const Batch& batch, const TensorRow& row, index_t step) {
    const WeightRounding rounding{batch.stochastic, row.seed, static_cast<std::uint64_t>(step) + 1};
    return Weight{row.param, batch.weight_dtype, rounding, row.weight_scale};
}

// Runs update(row, gradient, scalars) for each tensor, and counts what it returns: whether it has changed the tensor.
template <class Scalars, class Update>
void for_each_tensor(const Batch& batch, const Gradients& gradients, const Scalars& scalars, const Update& update) {
    for (std::size_t i = 0; i < batch.tensors.size(); ++i) {
        const TensorRow& row = batch.tensors[i];
        if (update(row, gradients.data[i], of_tensor(row, scalars))) {
            *row.step += 1.0f;
        } else {
            *row.skipped += 1;
        }
    }
}

// R and what the products need. Of a matrix both of whose sides are projected, R and the directions are (kept, rank),
// and only on their way to and from the matrix (long, rank).
class Subspace {
 public:
    Subspace(const Batch& batch, Scratch& scratch, int threads)
        : batch_(batch),
          threads_(threads),
          lowrank_(scratch.take<float>(batch.moments)),
          wide_(scratch.take<float>(batch.long_basis == nullptr ? 0 : batch.long_size() * batch.rank)) {
        index_t bytes = workspace_bytes(batch.short_size());
        if (batch.long_basis != nullptr) {
            bytes = std::max({bytes, workspace_bytes(batch.long_size()), workspace_bytes(batch.kept)});
        }
        workspace_ = scratch.take<char>(bytes);
    }

    float* lowrank() { return lowrank_; }

    // lowrank() = the projected gradient * scale. Returns whether it, and the squares if asked for, are representable.
    bool project(const void* gradient, DType dtype, const void* basis, const float* basis_scale, double scale,
                 float* squares) {
        const Projection p{batch_.rows, batch_.cols, batch_.side, basis, batch_.basis_dtype, batch_.rank, basis_scale};
        const auto factor = static_cast<float>(scale);
        if (batch_.long_basis == nullptr) return project(gradient, dtype, p, factor, lowrank(), squares);
        project(gradient, dtype, p, factor, wide_, nullptr);
        return project(batch_.long_basis, batch_.long_basis_dtype, of_long_side(Side::left, wide_), 1.0f, lowrank(),
                       nullptr);
    }

    // Adam on lowrank(), and the direction's way into the weight.
    void update(const TensorRow& row, const AdamScalars& scalars, double scale) {
        selected_kernels().lowrank_adam(lowrank(), batch_.moments, moments_of(row),
                                        adam_coefficients(unscaled(scalars), 1.0), threads_);
        back_project(row, scalars.step, adam_coefficients(scalars, scale));
    }

    // The way of the direction, which is in lowrank(), into the weight.
    void back_project(const TensorRow& row, index_t step, const AdamCoefficients& coefficients) {
        const float* direction = lowrank();
        if (batch_.long_basis != nullptr) {
            project(batch_.long_basis, batch_.long_basis_dtype, of_long_side(Side::right, lowrank()), 1.0f, wide_,
                    nullptr);
            direction = wide_;
        }
        const Projection p{batch_.rows,        batch_.cols, batch_.side,    row.basis,
                           batch_.basis_dtype, batch_.rank, row.basis_scale};
        selected_kernels().back_project_update(weight_of(batch_, row, step), p, direction, coefficients, workspace_,
                                               threads_);
    }

 private:
    // The long basis as the matrix, and as its basis what it is multiplied by: its transpose from the left on, it
    // itself from the right.
    Projection of_long_side(Side side, const float* factor) const {
        return Projection{batch_.long_size(), batch_.kept, side, factor, DType::float32, batch_.rank, nullptr};
    }

    bool project(const void* matrix, DType dtype, const Projection& p, float scale, float* out, float* squares) {
        return selected_kernels().project(matrix, dtype, p, scale, out, squares, workspace_, threads_);
    }

    index_t workspace_bytes(index_t short_size) const {
        return selected_kernels().workspace_bytes(short_size, batch_.rank, batch_.weight_dtype, threads_);
    }

    const Batch& batch_;
    const int threads_;
    float* lowrank_;
    float* wide_;
    void* workspace_;
};

// What APOLLO's factors are made of, and the basis where it is drawn.
struct Sums {
    Sums(const Batch& batch, Scratch& scratch)
        : of_lowrank(scratch.take<double>(batch.long_size())),
          of_direction(scratch.take<double>(batch.long_size())),
          squares(scratch.take<float>(batch.long_size())),
          factors(scratch.take<float>(batch.long_size())),
          drawn(scratch.take<std::uint16_t>(batch.magnitudes == nullptr ? 0 : batch.short_size() * batch.rank)) {}

    double* of_lowrank;
    double* of_direction;
    float* squares;
    float* factors;
    std::uint16_t* drawn;
};

// What Adafactor's step takes beside the projected gradient; at full rank the gradient too.
struct AdafactorPieces : AdafactorScratch {
    AdafactorPieces(const Batch& batch, Scratch& scratch) {
        const Matrices& g = batch.gradient;
        const bool factored = !batch.tensors.empty() && batch.tensors.front().v == nullptr;
        const index_t columns = factored ? g.planes * g.cols : 0;
        gradient = scratch.take<float>(batch.rank == 0 ? batch.moments : 0);
        factors = scratch.take<float>(batch.rank == 0 ? g.planes * g.rows : 0);
        moment = scratch.take<float>(factored ? g.planes * g.rows + columns : batch.moments);
        this->columns = scratch.take<float>(columns * row_chunks(g));
        col_factors = scratch.take<float>(columns);
        row_means = scratch.take<float>(factored ? g.planes : 0);
        partial = scratch.take<double>(std::max(square_sums(DType::float32, batch.moments, 1),
                                                square_sums(batch.weight_dtype, batch.rows, batch.cols)));
    }

    float* gradient;
    float* factors;  // of the rows of all matrices
};

// The coefficients that the stages writing weights read.
AdamCoefficients coefficients_of(const AdafactorChange& change) {
    AdamCoefficients c{};
    c.gradient_scale = 1.0f;
    c.step_size = static_cast<float>(change.size);
    c.decay = static_cast<float>(change.decay);
    return c;
}

}  // namespace

index_t scratch_bytes(const Batch& batch, int threads) {
    Scratch scratch(nullptr);
    if (batch.gradient.planes != 0) AdafactorPieces(batch, scratch);
    if (batch.rank == 0) return scratch.bytes();
    Subspace(batch, scratch, threads);
    if (!batch.tensors.empty() && batch.tensors.front().scaled_norm != nullptr) Sums(batch, scratch);
    return scratch.bytes();
}

void adam_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, int threads) {
    const Kernels& kernels = selected_kernels();
    const auto factor = static_cast<float>(scalars.inv_grad_scale);
    for_each_tensor(batch, gradients, scalars, [&](const TensorRow& row, const void* gradient, const AdamScalars& own) {
        if (!kernels.scale_and_check(gradient, gradients.dtype, batch.moments, factor, nullptr, threads)) return false;
        kernels.adam_update(weight_of(batch, row, own.step), gradient, gradients.dtype, moments_of(row), batch.moments,
                            adam_coefficients(own, 1.0), threads);
        return true;
    });
}

void galore_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, double scale,
                   void* scratch, int threads) {
    Scratch pieces(scratch);
    Subspace subspace(batch, pieces, threads);
    for_each_tensor(batch, gradients, scalars, [&](const TensorRow& row, const void* gradient, const AdamScalars& own) {
        if (!subspace.project(gradient, gradients.dtype, row.basis, row.basis_scale, own.inv_grad_scale, nullptr)) {
            return false;
        }
        subspace.update(row, own, scale);
        return true;
    });
}

void lowrank_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, double scale,
                    void* scratch, int threads) {
    Scratch pieces(scratch);
    Subspace subspace(batch, pieces, threads);
    const auto factor = static_cast<float>(scalars.inv_grad_scale);
    for_each_tensor(batch, gradients, scalars, [&](const TensorRow& row, const void* gradient, const AdamScalars& own) {
        const bool representable = selected_kernels().scale_and_check(gradient, gradients.dtype, batch.moments, factor,
                                                                      subspace.lowrank(), threads);
        if (representable) subspace.update(row, own, scale);
        return representable;
    });
}

void apollo_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, const FactorScalars& how,
                   void* scratch, int threads) {
    const Kernels& kernels = selected_kernels();
    const index_t long_size = batch.long_size(), short_size = batch.short_size(), rank = batch.rank;
    Scratch pieces(scratch);
    Subspace subspace(batch, pieces, threads);
    const Sums sums(batch, pieces);
    for_each_tensor(batch, gradients, scalars, [&](const TensorRow& row, const void* gradient, const AdamScalars& own) {
        const void* basis = row.basis;
        double divisor = 1.0;
        if (batch.magnitudes != nullptr) {
            kernels.random_basis(row.basis_seed, short_size, rank, batch.magnitudes, sums.drawn, threads);
            basis = sums.drawn;
            divisor = std::sqrt(static_cast<double>(rank));
        }
        if (!subspace.project(gradient, gradients.dtype, basis, nullptr, own.inv_grad_scale / divisor, sums.squares)) {
            return false;
        }
        kernels.row_squares(subspace.lowrank(), long_size, rank, sums.of_lowrank, threads);
        kernels.lowrank_adam(subspace.lowrank(), batch.moments, moments_of(row), adam_coefficients(unscaled(own), 1.0),
                             threads);
        kernels.row_squares(subspace.lowrank(), long_size, rank, sums.of_direction, threads);
        FactorScalars with_norm = how;
        with_norm.previous_norm = *row.scaled_norm;
        *row.scaled_norm = kernels.gradient_factors({sums.of_direction, sums.of_lowrank, sums.squares}, long_size,
                                                    with_norm, own, sums.factors);
        kernels.scaled_gradient_update(weight_of(batch, row, own.step), gradient, gradients.dtype, batch.rows,
                                       batch.cols, batch.side, sums.factors, adam_coefficients(own, 1.0), threads);
        return true;
    });
}

void adafactor_update(const Batch& batch, const Gradients& gradients, const AdafactorScalars& scalars, double scale,
                      bool is_projected, void* scratch, int threads) {
    const Kernels& kernels = selected_kernels();
    const index_t elements = batch.rows * batch.cols;
    const double factor = scalars.maximize ? -scalars.inv_grad_scale : scalars.inv_grad_scale;
    Scratch pieces(scratch);
    const AdafactorPieces own_pieces(batch, pieces);
    std::optional<Subspace> subspace;
    if (batch.rank != 0) subspace.emplace(batch, pieces, threads);
    float* g = subspace ? subspace->lowrank() : own_pieces.gradient;
    const auto update = [&](const TensorRow& row, const void* gradient, const AdafactorScalars& own) {
        if (elements == 0) return true;
        const bool representable =
            subspace && !is_projected
                ? subspace->project(gradient, gradients.dtype, row.basis, row.basis_scale, factor, nullptr)
                : kernels.scale_and_check(gradient, gradients.dtype, batch.moments, static_cast<float>(factor), g,
                                          threads);
        if (!representable) return false;
        double weight_size = 0.0;
        if (own.scale_parameter) {
            const double squares = kernels.sum_of_squares(row.param, batch.weight_dtype, row.weight_scale, batch.rows,
                                                          batch.cols, own_pieces.partial, threads);
            weight_size = std::sqrt(squares / static_cast<double>(elements));
        }
        const double alpha = adafactor_step_size(own, weight_size);
        double size = 0.0;
        if (!kernels.adafactor_direction(g, batch.gradient, adafactor_moments_of(row), own, alpha, own_pieces, &size,
                                         threads)) {
            return false;
        }
        const AdafactorChange change = adafactor_change(size * scale, 1.0 - alpha * own.weight_decay);
        const AdamCoefficients c = coefficients_of(change);
        if (subspace) {
            subspace->back_project(row, own.step, c);
        } else {
            const Matrices& shape = batch.gradient;
            const index_t rows = shape.planes * shape.rows;
            std::fill(own_pieces.factors, own_pieces.factors + rows, c.step_size);
            kernels.scaled_gradient_update(weight_of(batch, row, own.step), g, DType::float32, rows, shape.cols,
                                           Side::right, own_pieces.factors, c, threads);
        }
        return true;
    };
    for_each_tensor(batch, gradients, scalars, update);
}

}  // namespace gk::cpu
