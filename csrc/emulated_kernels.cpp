// The Python module mgt_fast._emulated: the CUDA kernels, compiled for the host by cuda_emulation.hpp. It is
// built for tests and not shipped.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda_emulation.hpp"
// After the emulation, which defines what the kernels are written in.
#include "lattice_frame.cu"
#include "neighbor_list.cu"

namespace py = pybind11;

// For the tests of the emulation itself; all but the last must be refused.
extern "C" __global__ void odd_lanes_alone() {
  if (threadIdx.x % 2) __syncwarp();
}
extern "C" __global__ void lanes_at_two_sites() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __syncwarp();
  }
}
extern "C" __global__ void warps_at_two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
extern "C" __global__ void square_root(double square, double* root) { *root = std::sqrt(square); }

namespace {

// A launch on a GPU does not know what the kernel declares: it hands over an int as int64 and a float as
// double. Anything else must not pass here.
template <class T>
T from_python(const py::handle& value) {
  constexpr bool is_real = std::is_same_v<T, double>;
  static_assert(is_real || std::is_same_v<T, std::int64_t> || std::is_pointer_v<T>);
  if (!(is_real ? PyFloat_CheckExact(value.ptr()) : PyLong_CheckExact(value.ptr()))) {
    throw py::type_error("a kernel's parameter is " + std::string(is_real ? "a float" : "an int") + ", not " +
                         py::repr(value).cast<std::string>());
  }
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value.cast<std::uintptr_t>());
  } else {
    return value.cast<T>();
  }
}

using Launch = std::function<void(unsigned, unsigned, const py::args&)>;

template <class... Parameters, std::size_t... Index>
Launch launcher(void (*kernel)(Parameters...), std::index_sequence<Index...>) {
  return [kernel](unsigned blocks, unsigned threads, const py::args& args) {
    if (args.size() != sizeof...(Parameters)) {
      throw py::type_error("the kernel takes " + std::to_string(sizeof...(Parameters)) + " arguments, not " +
                           std::to_string(args.size()));
    }
    const std::tuple<Parameters...> values{from_python<Parameters>(args[Index])...};
    mgt::emulation::launch(blocks, threads, [&] { std::apply(kernel, values); });
  };
}
template <class... Parameters>
Launch launcher(void (*kernel)(Parameters...)) {
  return launcher(kernel, std::index_sequence_for<Parameters...>{});
}

#define KERNEL(name) {#name, launcher(&name)}
const std::map<std::string, Launch> kKernels = {
    KERNEL(prepare_crystals),   KERNEL(find_shells),           KERNEL(count_edges),
    KERNEL(fill_edges),         KERNEL(choose_frames),         KERNEL(odd_lanes_alone),
    KERNEL(lanes_at_two_sites), KERNEL(warps_at_two_barriers), KERNEL(square_root)};
#undef KERNEL

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels on the host, for tests.";
  m.def("launch", [](const std::string& kernel, unsigned blocks, unsigned threads, const py::args& args) {
    kKernels.at(kernel)(blocks, threads, args);
  });
}
