// Periodic neighbour lists of a batch of crystals, on a GPU: pair for pair and in the order of
// neighbor_list.cpp.
//
//   prepare_crystals   one block a crystal: reduce the cell, wrap the atoms, sort them into bins
//   find_shells        one warp an atom: squared radius of its k nearest neighbours' whole shells
//   count_edges        one warp an atom: length of its row
//                      (the caller sums the lengths up)
//   fill_edges         one warp an atom: write its row, sorted
//
// Nothing comes back to the host on the way. `first_fault` is the number of crystals as long as all is well;
// a kernel that meets a crystal it must refuse lowers it to that crystal's index, and later kernels then
// leave the batch alone. Why the crystal is refused the host's list says in full, from the same checks.
//
// Membership, shells and vectors are decided on the float64 arithmetic of geometry.hpp alone; compile without
// contraction to fused multiply-adds.
#include "neighbor_device.hpp"

namespace mgt {
namespace {

using Bits = unsigned long long;  // the integer that CUDA's atomic operations take

constexpr int kThreads = 128;
constexpr int kMostThreads = 512;  // of a block that prepares a crystal
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kPool = 128;  // distances a warp keeps to find the k-th among

// Order-preserving map of doubles to integers, and back.
__device__ inline Bits to_ordered(double value) {
  const Bits bits = static_cast<Bits>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | (Bits{1} << 63);
}
__device__ inline double from_ordered(Bits ordered) {
  return __longlong_as_double(static_cast<long long>(ordered >> 63 ? ordered & ~(Bits{1} << 63) : ~ordered));
}

__device__ inline Vec3 load_vector(const double* values, std::int64_t index) {
  return {values[3 * index], values[3 * index + 1], values[3 * index + 2]};
}

// Whether a crystal has been refused, one answer for the whole warp: others may be writing it.
__device__ inline bool any_fault(const long long* first_fault, std::int64_t n_crystals) {
  return __any_sync(kAllLanes, *first_fault < n_crystals);
}

// Inclusive sums in place, by one warp.
__device__ inline void sum_up_warp(int count, int* values) {
  int before = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int k = base + lane_index();
    int sum = k < count ? values[k] : 0;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane_index() >= step) sum += other;
    }
    sum += before;
    if (k < count) values[k] = sum;
    before = __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

// Inclusive sums in place, by a block; each thread sums a share of its own.
__device__ inline void sum_up(int count, int* values) {
  __shared__ int totals[kMostThreads];
  const int t = threadIdx.x, share = (count + blockDim.x - 1) / blockDim.x;
  const int begin = t * share, end = begin + share < count ? begin + share : count;
  int sum = 0;
  for (int k = begin; k < end; ++k) sum += values[k];
  totals[t] = sum;
  __syncthreads();
  if (t < kWarp) sum_up_warp(blockDim.x, totals);
  __syncthreads();
  sum = t > 0 ? totals[t - 1] : 0;
  for (int k = begin; k < end; ++k) values[k] = sum += values[k];
  __syncthreads();
}

// Whether a search by so many atoms reaches for more than can be meant.
__device__ inline bool too_large(const SearchCell& crystal, double radius, std::int64_t searching) {
  return !search_size(crystal.cell, crystal.n_atoms, crystal.volume_per_atom, radius).allowed(searching);
}

// The k-th smallest of the pool, by one warp; k counts from 1.
__device__ inline double select(const double* pool, int count, int k) {
  for (int base = 0;; base += kWarp) {
    const int own = base + lane_index();
    const double value = own < count ? pool[own] : 0;
    int less = 0, equal = 0;
    for (int n = 0; n < count; ++n) {
      less += pool[n] < value;
      equal += pool[n] == value;
    }
    const unsigned found = __ballot_sync(kAllLanes, own < count && less < k && k <= less + equal);
    if (found) return __shfl_sync(kAllLanes, value, __ffs(static_cast<int>(found)) - 1);
  }
}

// Call visit(hit, slot, image, r), by all lanes at once, for the edges of the atom in a slot: |r|^2 within
// the limit of either end.
template <class Visit>
__device__ __forceinline__ void for_each_edge(const SearchCell& crystal, std::int64_t own, bool half,
                                              const int* bin_start, const int* slot_atom,
                                              const Vec3* slot_position, const double* slot_limit,
                                              long long* first_fault, int b, const Visit& visit) {
  const double longest = __longlong_as_double(static_cast<long long>(crystal.limit_bits));
  const double own_limit = slot_limit[own];
  const int own_atom = slot_atom[own];
  for_each_candidate(crystal, bin_start, slot_position, slot_position[own], std::sqrt(longest),
                     [&](bool live, int slot, Int3 image, Vec3 r, double d2) {
                       bool hit = live && d2 <= longest && !(slot == own && d2 == 0);
                       hit = hit && (d2 <= own_limit || d2 <= slot_limit[slot]);
                       if (hit && d2 < kMinDistance * kMinDistance)
                         atomicMin(first_fault, static_cast<long long>(b));
                       if (half && hit) {
                         hit = slot == own ? Int3{0, 0, 0} < combine(image, crystal.cell.to_given)
                                           : own_atom < slot_atom[slot];
                       }
                       visit(hit, slot, image, r);
                     });
}

}  // namespace
}  // namespace mgt

using mgt::Int3;
using mgt::Mat3;
using mgt::SearchCell;
using mgt::Vec3;

// Grid: one block a crystal, of at most kMostThreads. Writes crystals, bin_start (N + B), and for each slot
// its atom, crystal, position and wrap; with a cutoff also its limit.
extern "C" __global__ void __launch_bounds__(mgt::kMostThreads)
    prepare_crystals(std::int64_t n_crystals, std::int64_t n_atoms, const std::int64_t* batch_ptr,
                     const double* frac_coords, const double* cells, const bool* pbc_flags, double cutoff,
                     std::int64_t max_neighbors, unsigned char* crystals, int* bin_start, int* slot_atom,
                     int* slot_crystal, Vec3* slot_position, Int3* slot_wrap, double* slot_limit,
                     long long* first_fault) {
  using namespace mgt;
  __shared__ SearchCell crystal;
  __shared__ Bits low[3], high[3];
  __shared__ int refused, bad_atom;
  const std::int64_t b = blockIdx.x, first = batch_ptr[b], last = batch_ptr[b + 1];
  const bool in_order = 0 <= first && first < last && last <= n_atoms && (b > 0 || first == 0) &&
                        (b + 1 < n_crystals || last == n_atoms);
  const bool* pbc = pbc_flags + 3 * b;
  const Mat3 given = {
      {load_vector(cells, 3 * b), load_vector(cells, 3 * b + 1), load_vector(cells, 3 * b + 2)}};
  const auto wrapped = [&](std::int64_t atom) {
    return wrap_atom(load_vector(frac_coords, atom), given, pbc, crystal.cell);
  };
  if (threadIdx.x == 0) {
    bool sound = in_order;
    for (int k = 0; k < 9; ++k) sound = sound && usable(cells[9 * b + k]);
    refused = !(sound && reduce_cell(given, pbc, crystal.cell).fault == CellFault::kNone);
    bad_atom = 0;
    crystal.first_atom = first;
    crystal.n_atoms = last - first;
    crystal.first_bin = first + b;
    for (int a = 0; a < 3; ++a) {
      low[a] = ~Bits{0};
      high[a] = 0;
    }
  }
  __syncthreads();
  if (!refused) {
    for (std::int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
      if (!usable(load_vector(frac_coords, i), given, pbc)) {
        atomicMax(&bad_atom, 1);
        break;
      }
      const Vec3 u = wrapped(i).coordinate;
      const double coordinate[3] = {u.x, u.y, u.z};
      for (int a = crystal.cell.periodic; a < 3; ++a) {
        atomicMin(&low[a], to_ordered(coordinate[a]));
        atomicMax(&high[a], to_ordered(coordinate[a]));
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && bad_atom) refused = 1;
  if (threadIdx.x == 0 && !refused) {
    const int open = crystal.cell.periodic;
    const auto bounds = [&](const Bits(&ordered)[3]) {
      return Vec3{open < 1 ? from_ordered(ordered[0]) : 0, open < 2 ? from_ordered(ordered[1]) : 0,
                  open < 3 ? from_ordered(ordered[2]) : 0};
    };
    const Vec3 from = bounds(low), to = bounds(high);
    crystal.volume_per_atom = volume_per_atom(crystal.cell, from, to, crystal.n_atoms);
    crystal.radius = cutoff > 0 ? cutoff : starting_radius(max_neighbors, crystal.volume_per_atom);
    crystal.limit_bits = static_cast<Bits>(__double_as_longlong(cutoff * cutoff));
    crystal.grid = choose_grid(crystal.cell, crystal.n_atoms, from, to, crystal.radius);
    refused = too_large(crystal, crystal.radius, crystal.n_atoms) ||
              (cutoff == 0 && open == 0 && crystal.n_atoms - 1 < max_neighbors);
  }
  __syncthreads();
  if (refused) {
    if (threadIdx.x == 0) atomicMin(first_fault, static_cast<long long>(b));
    return;
  }
  // A counting sort. Starts of bins are at first their lengths, then their ends, and move down as the atoms
  // take their slots from the end.
  int* start = bin_start + crystal.first_bin;
  const int bins = crystal.grid.total();
  const auto bin_of = [&](Vec3 position) {
    return crystal.grid.bin_of(combine(position, crystal.cell.inverse));
  };
  for (int bin = threadIdx.x; bin <= bins; bin += blockDim.x) {
    start[bin] = bin == 0 ? static_cast<int>(first) : 0;
  }
  __syncthreads();
  for (std::int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    atomicAdd(&start[bin_of(wrapped(i).position)], 1);
  }
  __syncthreads();
  sum_up(bins + 1, start);
  for (std::int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const WrappedAtom atom = wrapped(i);
    const int slot = atomicAdd(&start[bin_of(atom.position)], -1) - 1;
    slot_atom[slot] = static_cast<int>(i);
    slot_crystal[slot] = static_cast<int>(b);
    slot_position[slot] = atom.position;
    slot_wrap[slot] = atom.wrap;
    if (cutoff > 0) slot_limit[slot] = cutoff * cutoff;
  }
  if (threadIdx.x == 0) reinterpret_cast<SearchCell&>(crystals[b * kSearchCellBytes]) = crystal;
}

// Grid: one warp an atom, by slots. Writes slot_limit and, unless null, shell_margin (by atom).
extern "C" __global__ void __launch_bounds__(mgt::kThreads)
    find_shells(std::int64_t n_crystals, std::int64_t n_atoms, std::int64_t max_neighbors,
                double shell_tolerance, unsigned char* crystals, const int* bin_start, const int* slot_atom,
                const int* slot_crystal, const Vec3* slot_position, double* slot_limit, double* shell_margin,
                long long* first_fault) {
  using namespace mgt;
  __shared__ double pools[kWarpsPerBlock][kPool];
  double* pool = pools[threadIdx.x / kWarp];
  const std::int64_t slot = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (slot >= n_atoms || any_fault(first_fault, n_crystals)) return;
  const int b = slot_crystal[slot];
  SearchCell& crystal = reinterpret_cast<SearchCell&>(crystals[std::int64_t{b} * kSearchCellBytes]);
  const Vec3 centre = slot_position[slot];

  // The k-th distance lies above `floor`, which `below` atoms are within, and not above `ceiling`, once that
  // is known. Distances between floor and reach are pooled; the reach grows until there are k, and is then
  // halved for as long as there are more than the pool holds.
  double radius = crystal.radius, floor = 0, reach = radius * radius, ceiling = 0, kth = 0;
  std::int64_t below = 0;
  for (;;) {
    int found = 0;
    for_each_candidate(crystal, bin_start, slot_position, centre, std::sqrt(reach),
                       [&](bool live, int, Int3, Vec3, double d2) {
                         const bool hit = live && floor < d2 && d2 <= reach;
                         const unsigned hits = __ballot_sync(kAllLanes, hit);
                         const int place = found + lanes_before(hits);
                         if (hit && place < kPool) pool[place] = d2;
                         found += __popc(hits);
                       });
    __syncwarp();
    if (below + found < max_neighbors) {
      below += found;
      floor = reach;
      if (ceiling == 0) {
        radius *= kRadiusGrowth;
        if (too_large(crystal, radius, 1)) {  // few search on
          if (lane_index() == 0) atomicMin(first_fault, static_cast<long long>(b));
          return;
        }
        reach = radius * radius;
        continue;
      }
    } else if (found <= kPool) {
      kth = select(pool, found, static_cast<int>(max_neighbors - below));
      break;
    } else {
      ceiling = reach;
    }
    reach = 0.5 * (floor + ceiling);
    if (reach <= floor || ceiling <= reach) {  // nothing lies between: all that are left are at the ceiling
      kth = ceiling;
      break;
    }
    __syncwarp();
  }
  const double limit = shell_limit(kth, shell_tolerance);
  if (lane_index() == 0) {
    slot_limit[slot] = limit;
    atomicMax(&crystal.limit_bits, static_cast<Bits>(__double_as_longlong(limit)));
  }
  if (!shell_margin) return;
  // The k-th neighbour itself is shell_tolerance away from the boundary; beyond `see` nothing is nearer.
  const double stretch = 1.0 + shell_tolerance, see = 1.0 + 3.0 * shell_tolerance;
  double margin = shell_tolerance;
  for_each_candidate(crystal, bin_start, slot_position, centre, std::sqrt(kth) * see,
                     [&](bool live, int, Int3, Vec3, double d2) {
                       if (live && d2 > 0) {
                         margin = std::fmin(margin, std::fabs(std::sqrt(d2 / kth) - stretch));
                       }
                     });
  margin = warp_reduce(margin, [](double p, double q) { return std::fmin(p, q); });
  if (lane_index() == 0) shell_margin[slot_atom[slot]] = margin;
}

// Grid: one warp an atom, by slots. Writes row_length (by atom), which is zero beforehand and remains so for
// atoms that a fault leaves uncounted.
extern "C" __global__ void __launch_bounds__(mgt::kThreads)
    count_edges(std::int64_t n_crystals, std::int64_t n_atoms, std::int64_t half,
                const unsigned char* crystals, const int* bin_start, const int* slot_atom,
                const int* slot_crystal, const Vec3* slot_position, const double* slot_limit,
                std::int64_t* row_length, long long* first_fault) {
  using namespace mgt;
  const std::int64_t slot = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (slot >= n_atoms || any_fault(first_fault, n_crystals)) return;
  const int b = slot_crystal[slot];
  const auto& crystal = reinterpret_cast<const SearchCell&>(crystals[std::int64_t{b} * kSearchCellBytes]);
  int count = 0;
  for_each_edge(crystal, slot, half != 0, bin_start, slot_atom, slot_position, slot_limit, first_fault, b,
                [&](bool hit, int, Int3, Vec3) { count += hit; });
  count = warp_reduce(count, [](int p, int q) { return p + q; });
  if (lane_index() == 0) row_length[slot_atom[slot]] = count;
}

// Grid: one warp an atom, by slots. Writes row_ptr, and the edges if all of them fit into the capacity and no
// crystal is at fault; otherwise row_ptr is that of an empty list. rows (N + 1) is the running sum of
// row_length, from 0.
extern "C" __global__ void __launch_bounds__(mgt::kThreads)
    fill_edges(std::int64_t n_crystals, std::int64_t n_atoms, std::int64_t half,
               const unsigned char* crystals, const int* bin_start, const int* slot_atom,
               const int* slot_crystal, const Vec3* slot_position, const Int3* slot_wrap,
               const double* slot_limit, const std::int64_t* rows, std::int64_t capacity,
               std::int64_t* row_ptr, std::int64_t* edge_index, Vec3* edge_vec, Int3* cell_shift,
               long long* first_fault) {
  using namespace mgt;
  const std::int64_t slot = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (slot >= n_atoms) return;
  const bool fits = rows[n_atoms] <= capacity && !any_fault(first_fault, n_crystals);
  if (lane_index() == 0) {
    row_ptr[slot + 1] = fits ? rows[slot + 1] : 0;
    if (slot == 0) row_ptr[0] = 0;
  }
  if (!fits) return;
  const int atom = slot_atom[slot], b = slot_crystal[slot];
  const auto& crystal = reinterpret_cast<const SearchCell&>(crystals[std::int64_t{b} * kSearchCellBytes]);
  const std::int64_t begin = rows[atom];
  const int count = static_cast<int>(rows[atom + 1] - begin);
  std::int64_t* source = edge_index + begin;
  std::int64_t* target = edge_index + capacity + begin;
  Int3* shift = cell_shift + begin;
  Vec3* vector = edge_vec + begin;
  const Int3 own_wrap = slot_wrap[slot];
  int found = 0;
  for_each_edge(crystal, slot, half != 0, bin_start, slot_atom, slot_position, slot_limit, first_fault, b,
                [&](bool hit, int other, Int3 image, Vec3 r) {
                  const unsigned hits = __ballot_sync(kAllLanes, hit);
                  if (hit) {
                    const int place = found + lanes_before(hits);
                    target[place] = slot_atom[other];
                    shift[place] = combine(image, crystal.cell.to_given) + slot_wrap[other] - own_wrap;
                    vector[place] = r;
                  }
                  found += __popc(hits);
                });
  __syncwarp();
  sort_row(count, target, shift, vector);
  for (int e = lane_index(); e < count; e += kWarp) source[e] = atom;
}
