// Which build of the kernels runs on this machine.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gk::cpu {

#define GK_DECLARE_KERNELS(isa)   \
    namespace isa {               \
    extern const Kernels kernels; \
    }
GK_DECLARE_KERNELS(generic)
#if defined(GK_HAVE_X86_ISAS)
GK_DECLARE_KERNELS(avx2)
GK_DECLARE_KERNELS(avx512)
GK_DECLARE_KERNELS(avx512_bf16)
#endif
#undef GK_DECLARE_KERNELS

namespace {

struct Choice {
    const Kernels* kernels;
    bool supported;
};

const Kernels& choose() {
#if defined(GK_HAVE_X86_ISAS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const Choice choices[] = {
        {&avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")},
        {&avx512::kernels, avx512},
        {&avx2::kernels, avx2},
        {&generic::kernels, true}};
#else
    const Choice choices[] = {{&generic::kernels, true}};
#endif
    const char* forced = std::getenv("GALORE_KERNELS_ISA");
    if (forced == nullptr || *forced == '\0') {
        for (const Choice& choice : choices) {
            if (choice.supported) return *choice.kernels;
        }
    }
    std::string supported;
    for (const Choice& choice : choices) {
        if (!choice.supported) continue;
        if (std::strcmp(forced, choice.kernels->isa) == 0) return *choice.kernels;
        supported += supported.empty() ? "" : ", ";
        supported += choice.kernels->isa;
    }
    throw std::runtime_error("environment variable GALORE_KERNELS_ISA=" + std::string(forced) +
                             ": expected one that this processor supports: " + supported +
                             "; unset it to use the fastest");
}

}  // namespace

const Kernels& selected_kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace gk::cpu
