// The lattice frames of a batch of crystals, on a GPU: bit for bit those of lattice_frame.cpp.
//
//   choose_frames   one block a crystal
//
// Nothing comes back to the host. `first_fault` is the number of crystals as long as all is well; otherwise
// the batch is left alone. Compile without contraction to fused multiply-adds.
#include "frame_signature.hpp"
#include "neighbor_device.hpp"

namespace mgt {
namespace {

constexpr int kFrameThreads = 128;
constexpr int kFrameBlocks = 4;  // a multiprocessor: a batch of some 500 crystals at once

// Thread groups, see thread_group.hpp: a block. Between two calls threads read what they share; what a call
// writes must not be among it.
struct ThreadBlock {
  template <class Body>
  __device__ void for_each(std::int64_t count, const Body& body) const {
    for (std::int64_t i = threadIdx.x; i < count; i += kFrameThreads) body(i);
    __syncthreads();
  }
  template <class T, class Value>
  __device__ T greatest(std::int64_t count, T start, const Value& value) const {
    for (std::int64_t i = threadIdx.x; i < count; i += kFrameThreads) {
      const T candidate = value(i, start);
      if (candidate > start) start = candidate;
    }
    return reduce(start, [](T a, T b) { return a > b ? a : b; });
  }
  template <class Test>
  __device__ std::int64_t count(std::int64_t count, const Test& test) const {
    std::int64_t passed = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kFrameThreads) passed += test(i);
    return reduce(passed, [](std::int64_t a, std::int64_t b) { return a + b; });
  }
  template <class Test>
  __device__ std::int64_t first(std::int64_t begin, std::int64_t end, const Test& test) const {
    for (; begin < end; begin += kFrameThreads) {
      const std::int64_t i = begin + threadIdx.x;
      const std::int64_t found =
          reduce(i < end && test(i) ? i : end, [](std::int64_t a, std::int64_t b) { return a < b ? a : b; });
      if (found < end) return found;
    }
    return end;
  }
  __device__ static std::int32_t exchange(std::int32_t& shared, std::int32_t value) {
    return atomicExch(&shared, value);
  }
  __device__ static std::int32_t increment(std::int32_t& shared) { return atomicAdd(&shared, 1); }

 private:
  template <class T, class Combine>
  __device__ static T reduce(T value, const Combine& combine) {
    __shared__ T of_warp[kFrameThreads / kWarp];
    value = warp_reduce(value, combine);
    if (lane_index() == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int w = 1; w < kFrameThreads / kWarp; ++w) value = combine(value, of_warp[w]);
    __syncthreads();
    return value;
  }
};

__device__ inline Vec3 vector_at(const double* values, std::int64_t index) {
  return {values[3 * index], values[3 * index + 1], values[3 * index + 2]};
}

}  // namespace
}  // namespace mgt

// Grid: one block a crystal. The edges are those of row_ptr (N + 1), `source` and `target` their atoms.
// Workspace: coordinates (N), bins (2 N), looks (E), messages (2 kMaxBases N). `first_fault` may be absent.
extern "C" __global__ void __launch_bounds__(mgt::kFrameThreads, mgt::kFrameBlocks)
    choose_frames(std::int64_t n_crystals, const std::int64_t* batch_ptr, const double* frac_coords,
                  const double* cells, const bool* pbc_flags, const std::int64_t* numbers,
                  const std::int64_t* source, const std::int64_t* target, const double* edge_vec,
                  const std::int64_t* row_ptr, mgt::Vec3* coordinates, std::int32_t* bins,
                  mgt::EdgeLook* looks, double* messages, mgt::Mat3* frames, const long long* first_fault) {
  using namespace mgt;
  __shared__ bool refused;
  __shared__ CrystalView crystal;
  __shared__ ReducedCell cell;
  __shared__ PrimitiveLattice lattice;
  __shared__ LatticeBases bases;
  __shared__ double signature[kMaxBases];
  const ThreadBlock group;
  const std::int64_t b = blockIdx.x;
  if (threadIdx.x == 0) refused = first_fault && *first_fault < n_crystals;
  __syncthreads();
  if (refused) return;

  const std::int64_t first = batch_ptr[b], num_atoms = batch_ptr[b + 1] - first;
  group.for_each(1, [&](std::int64_t) {
    crystal = {num_atoms,
               numbers + first,
               frac_coords + 3 * first,
               {{vector_at(cells, 3 * b), vector_at(cells, 3 * b + 1), vector_at(cells, 3 * b + 2)}},
               pbc_flags + 3 * b};
    reduce_cell(crystal.cell, crystal.pbc, cell);
  });
  const PlaceWorkspace workspace = {coordinates + first, bins + 2 * first, bins + 2 * first + num_atoms};
  primitive_lattice(group, crystal, cell, workspace, lattice);
  preferred_bases(group, lattice, crystal.cell, crystal.pbc, bases);
  const int count = bases.count;
  if (count > 1) {
    const std::int64_t first_edge = row_ptr[first], last_edge = row_ptr[first + num_atoms];
    group.for_each(last_edge - first_edge, [&](std::int64_t n) {
      const std::int64_t e = first_edge + n;
      EdgeLook edge = look_at(vector_at(edge_vec, e));
      edge.weight = start_weight(numbers[source[e]]) * end_weight(numbers[target[e]]) * edge.weight;
      looks[e] = edge;
    });
    // What atom i receives from its edges, seen from the n-th basis; the same sum as on the host.
    const auto received = [&](std::int64_t i, int n, const auto& sent) {
      const int* row = bases.basis[n].row;
      double sum = 0;
      for (std::int64_t e = row_ptr[first + i]; e < row_ptr[first + i + 1]; ++e) {
        const EdgeLook edge = looks[e];
        sum += edge.weight * profile(0, dot(edge.unit, bases.unit[row[0]])) *
               profile(1, dot(edge.unit, bases.unit[row[1]])) *
               profile(2, dot(edge.unit, bases.unit[row[2]])) * sent(target[e] - first);
      }
      return sum;
    };
    double* once = messages + 2 * kMaxBases * first;
    double* twice = once + kMaxBases * num_atoms;
    group.for_each(num_atoms * count, [&](std::int64_t item) {
      once[item] = received(item / count, static_cast<int>(item % count), [](std::int64_t) { return 1.0; });
    });
    group.for_each(num_atoms * count, [&](std::int64_t item) {
      const int n = static_cast<int>(item % count);
      twice[item] = received(item / count, n, [&](std::int64_t j) { return once[j * count + n]; });
    });
    group.for_each(count, [&](std::int64_t n) {
      double sum = 0;
      for (std::int64_t i = 0; i < num_atoms; ++i) sum += twice[i * count + n] * twice[i * count + n];
      signature[n] = sum;
    });
  }
  if (threadIdx.x == 0) {
    const Basis& basis = bases.basis[count > 1 ? greatest_signature(signature, count) : 0];
    frames[b] = {{bases.vector[basis.row[0]], bases.vector[basis.row[1]], bases.vector[basis.row[2]]}};
  }
}
