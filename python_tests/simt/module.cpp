// The CUDA kernels as a Python module, executed by the CPU.
#include "cuda/bindings.h"
#include "execution.h"

PYBIND11_MODULE(_simt, module) {
    bind_cuda(module);
    module.def("set_seed", simt::set_seed, "Seeds the order in which threads go on and copies happen.");
    module.def("build_info", [] {
        pybind11::dict info;
        info["cuda_archs"] = pybind11::list();
        return info;
    });
}
