// The search for neighbours by a warp: what the kernels of neighbor_list.cu have in common.
//
// A crystal's atoms are sorted into bins of its reduced cell. Atoms in this order are called slots; bins
// along the third axis are neighbours in memory, so that a row of bins, within one image of the cell, is one
// run of slots. Each lane takes a run of its own, and the warp goes through its runs slot by slot.
#pragma once

#include "search_limits.hpp"

namespace mgt {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
// Lanes before this one among those of the mask.
__device__ inline int lanes_before(unsigned mask) { return __popc(mask & ((1u << lane_index()) - 1)); }

template <class T, class Combine>
__device__ inline T warp_reduce(T value, const Combine& combine) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// Bins of a reduced cell: bin = floor((coordinate - low) * scale) along each basis vector; `per_length` of
// them are as thick as 1 Å.
struct BinGrid {
  double low[3], scale[3], per_length[3];
  int bins[3];

  __device__ int total() const { return bins[0] * bins[1] * bins[2]; }
  __device__ int bin_of(Vec3 u) const {
    const double coordinate[3] = {u.x, u.y, u.z};
    int flat = 0;
    for (int a = 0; a < 3; ++a) {
      const double bin = std::floor((coordinate[a] - low[a]) * scale[a]);
      flat = flat * bins[a] + static_cast<int>(std::fmin(std::fmax(bin, 0.0), bins[a] - 1.0));
    }
    return flat;
  }
};

// One crystal, ready to be searched.
struct SearchCell {
  ReducedCell cell;
  BinGrid grid;
  std::int64_t first_atom, n_atoms;
  std::int64_t first_bin;         // in the array of bin starts
  double volume_per_atom;         // Å^3
  double radius;                  // cutoff, or where the k-nearest search starts, Å
  unsigned long long limit_bits;  // bits of the largest squared limit of its atoms, Å^2
};
// The caller allocates this much a crystal.
constexpr int kSearchCellBytes = 384;
static_assert(sizeof(SearchCell) <= kSearchCellBytes);

// Bins half as wide as the radius, which gives most lanes a run, but no more of them than atoms: an array of
// N + B starts then holds those of all crystals. `low` and `high` span the coordinates of the atoms.
__device__ inline BinGrid choose_grid(const ReducedCell& cell, std::int64_t n_atoms, Vec3 low, Vec3 high,
                                      double radius) {
  constexpr double kMostBins = 1024;  // along an axis
  const double first[3] = {low.x, low.y, low.z}, last[3] = {high.x, high.y, high.z};
  BinGrid grid;
  double width[3];
  for (int a = 0; a < 3; ++a) {
    const bool open = a >= cell.periodic;
    grid.low[a] = open ? first[a] : 0.0;
    width[a] = open ? std::fmax(last[a] - first[a], 1e-3) : 1.0;
    const double wanted = std::floor(width[a] * cell.height[a] / (0.5 * radius));
    grid.bins[a] = static_cast<int>(std::fmin(std::fmax(wanted, 1.0), kMostBins));
  }
  while (static_cast<std::int64_t>(grid.bins[0]) * grid.bins[1] * grid.bins[2] > n_atoms) {
    const int a = grid.bins[0] >= grid.bins[1] && grid.bins[0] >= grid.bins[2] ? 0
                  : grid.bins[1] >= grid.bins[2]                               ? 1
                                                                               : 2;
    grid.bins[a] = (grid.bins[a] + 1) / 2;
  }
  for (int a = 0; a < 3; ++a) {
    grid.scale[a] = grid.bins[a] / width[a];
    grid.per_length[a] = grid.scale[a] / cell.height[a];
  }
  return grid;
}

__device__ inline int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Call visit(live, slot, image, r, |r|^2) for every atom that can be within the radius of the centre, itself
// among them, by all lanes at once: `live` tells whether a lane has a candidate. r points from the centre to
// the atom in that image of the reduced cell.
template <class Visit>
__device__ __forceinline__ void for_each_candidate(const SearchCell& crystal, const int* bin_start,
                                                   const Vec3* position, Vec3 centre, double radius,
                                                   const Visit& visit) {
  constexpr double kBinSlack = 1e-6;  // rounding of a coordinate costs far less of a bin
  const BinGrid& grid = crystal.grid;
  const Vec3 u = combine(centre, crystal.cell.inverse);
  const double coordinate[3] = {u.x, u.y, u.z};
  int low[3], high[3];  // bins, counted on through the images of the cell
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const double bin = (coordinate[a] - grid.low[a]) * grid.scale[a];
    const double reach = kSearchSlack * radius * grid.per_length[a] + kBinSlack;
    double from = std::floor(bin - reach), to = std::floor(bin + reach);
    if (a >= crystal.cell.periodic) {
      from = std::fmax(from, 0.0);
      to = std::fmin(to, grid.bins[a] - 1.0);
    }
    low[a] = static_cast<int>(from);
    high[a] = static_cast<int>(to);
  }
  const int first_image = floor_divide(low[2], grid.bins[2]);
  const int images = floor_divide(high[2], grid.bins[2]) - first_image + 1;
  const int columns = high[1] - low[1] + 1;
  const int runs = (high[0] - low[0] + 1) * columns * images;
  for (int first_run = 0; first_run < runs; first_run += kWarp) {
    const int run = first_run + lane_index();
    int slot = 0, end = 0;
    Int3 image{0, 0, 0};
    Vec3 offset{0, 0, 0};
    if (run < runs) {
      const int a = low[0] + run / images / columns, b = low[1] + run / images % columns;
      image = {floor_divide(a, grid.bins[0]), floor_divide(b, grid.bins[1]), first_image + run % images};
      offset = translation(image, crystal.cell.basis);
      const int begin_of_image = image.z * grid.bins[2];
      const int from = low[2] > begin_of_image ? low[2] - begin_of_image : 0;
      const int to = high[2] < begin_of_image + grid.bins[2] ? high[2] - begin_of_image : grid.bins[2] - 1;
      const int row =
          ((a - image.x * grid.bins[0]) * grid.bins[1] + b - image.y * grid.bins[1]) * grid.bins[2];
      const int* start = bin_start + crystal.first_bin + row;
      slot = start[from];
      end = start[to + 1];
    }
    for (; __any_sync(kAllLanes, slot < end); ++slot) {
      const bool live = slot < end;
      const Vec3 r = live ? edge_vector(centre, position[slot], offset) : Vec3{0, 0, 0};
      visit(live, slot, image, r, squared_length(r));
    }
  }
}

// Sort a row of edges by (target, shift): a bitonic sort of the warp in place. All comparisons put the
// smaller edge first, so that a row of any length sorts as if it were filled up with edges that come last.
__device__ inline void sort_row(int count, std::int64_t* target, Int3* shift, Vec3* vector) {
  for (int half = 1; half < count; half *= 2) {
    for (int stride = half; stride > 0; stride /= 2) {
      for (int pair = lane_index(); pair < count; pair += kWarp) {
        const int within = pair & (stride - 1), p = 2 * (pair - within) + within;
        const int q = stride == half ? 2 * (pair - within) + 2 * stride - 1 - within : p + stride;
        if (q >= count) continue;
        const std::int64_t target_p = target[p], target_q = target[q];
        const Int3 shift_p = shift[p], shift_q = shift[q];
        if (target_p != target_q ? target_p < target_q : shift_p < shift_q) continue;
        target[p] = target_q;
        target[q] = target_p;
        shift[p] = shift_q;
        shift[q] = shift_p;
        const Vec3 vector_p = vector[p];
        vector[p] = vector[q];
        vector[q] = vector_p;
      }
      __syncwarp();
    }
  }
}

}  // namespace mgt
