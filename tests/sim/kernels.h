// The small kernels that test the simulator itself.
#pragma once

#include <pybind11/pybind11.h>

namespace kernels {

void bind_instructions(pybind11::module_& m);
void bind_faults(pybind11::module_& m);
void bind_hopper(pybind11::module_& m);

}  // namespace kernels
