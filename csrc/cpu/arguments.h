// What the bindings make of Python's numbers. Each names the argument that it refuses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../core/platform.h"
#include "thread_pool.h"

namespace gk::cpu {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void refuse(const char* name, index_t value, const char* expected) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": expected " + expected);
}

inline index_t at_least(const char* name, index_t value, index_t least) {
    if (value < least) refuse(name, value, least == 0 ? "0 or more" : "1 or more");
    return value;
}

inline int thread_count(index_t threads) {
    at_least("threads", threads, 1);
    return static_cast<int>(std::min<index_t>(threads, kMaxThreads));
}

inline DType dtype_of(const char* name, int code) {
    if (code < 0 || code > 2) refuse(name, code, "0 (float32), 1 (bfloat16) or 2 (float16)");
    return static_cast<DType>(code);
}

inline DType projected_dtype_of(int code) {
    if (code < 0 || code > 3) refuse("param_dtype", code, "0 (float32), 1 (bfloat16), 2 (float16) or 3 (int8)");
    return static_cast<DType>(code);
}

inline DType basis_dtype_of(int code, Address basis_scale) {
    if (code < 0 || code > 4) {
        refuse("basis_dtype", code, "0 (float32), 1 (bfloat16), 2 (float16), 3 (int8) or 4 (int4)");
    }
    if ((code >= 3) != (basis_scale != 0)) {
        throw std::invalid_argument("basis_scale: expected an address with int8 or int4 codes and 0 without, got " +
                                    std::string(basis_scale != 0 ? "one" : "0") +
                                    " with basis_dtype=" + std::to_string(code));
    }
    return static_cast<DType>(code);
}

// weight_scale: of int8 codes, else 0.
inline void check_weight_scale(int param_dtype, Address weight_scale) {
    if ((static_cast<DType>(param_dtype) == DType::int8) != (weight_scale != 0)) {
        throw std::invalid_argument("weight_scale: expected an address with int8 codes and 0 without, got " +
                                    std::string(weight_scale != 0 ? "one" : "0") +
                                    " with param_dtype=" + std::to_string(param_dtype));
    }
}

inline void check_absmax(const void* m_absmax, const void* v_absmax) {
    if ((m_absmax == nullptr) != (v_absmax == nullptr)) {
        throw std::invalid_argument(
            "m_absmax, v_absmax: expected both addresses (8-bit moments) or both 0 (fp32 moments)");
    }
}

inline Side side_of(int code) {
    if (code != 0 && code != 1) refuse("side", code, "0 (right) or 1 (left)");
    return static_cast<Side>(code);
}

}  // namespace gk::cpu
