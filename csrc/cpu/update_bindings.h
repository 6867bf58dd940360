// galore_kernels._native's whole updates on the CPU.
#pragma once

#include <pybind11/pybind11.h>

void bind_cpu_updates(pybind11::module_& module);
