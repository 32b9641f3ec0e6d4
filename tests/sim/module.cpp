// The Python module: the simulator's options and what its launches did, its instructions one by one, planted faults.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "sim.h"

namespace py = pybind11;

PYBIND11_MODULE(fastformer_sim, m) {
  py::enum_<sim::Order>(m, "Order")
      .value("forward", sim::Order::forward)
      .value("reverse", sim::Order::reverse)
      .value("random", sim::Order::random);
  py::class_<sim::Options>(m, "Options")
      .def(py::init<>())
      .def_readwrite("threads", &sim::Options::threads)
      .def_readwrite("blocks", &sim::Options::blocks)
      .def_readwrite("seed", &sim::Options::seed)
      .def_readwrite("lazy_copies", &sim::Options::lazy_copies)
      .def_readwrite("hopper", &sim::Options::hopper)
      .def_readwrite("count_conflicts", &sim::Options::count_conflicts);
  m.def("options", &sim::options, py::return_value_policy::reference);
  m.def("set_options", [](const sim::Options& options) { sim::options() = options; });

  py::class_<sim::Launch>(m, "Launch")
      .def_readonly("kernel", &sim::Launch::kernel)
      .def_property_readonly("grid", [](const sim::Launch& l) { return std::tuple(l.grid.x, l.grid.y, l.grid.z); })
      .def_property_readonly("block", [](const sim::Launch& l) { return std::tuple(l.block.x, l.block.y, l.block.z); })
      .def_readonly("shared_bytes", &sim::Launch::shared_bytes)
      .def_readonly("mma", &sim::Launch::mma)
      .def_readonly("ldmatrix", &sim::Launch::ldmatrix)
      .def_readonly("wgmma", &sim::Launch::wgmma)
      .def_readonly("copied_bytes", &sim::Launch::copied_bytes)
      .def_readonly("shared_wavefronts", &sim::Launch::shared_wavefronts)
      .def_readonly("bank_conflicts", &sim::Launch::bank_conflicts);
  m.def("launches", [] { return sim::launches(); });
  m.def("clear_launches", [] { sim::launches().clear(); });

  kernels::bind_instructions(m);
  kernels::bind_faults(m);
  kernels::bind_hopper(m);
}
