// Periodic neighbour lists of a batch of crystals, on the CPU.
//
// An edge (i, j, S) is the vector r_ij = x_j - x_i + S · cell from atom i to an image of atom j, where x are
// the positions the caller gave (inside the cell or not) and S is an integer translation. S is zero along
// axes that are not periodic. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "crystals.hpp"

namespace mgt {

struct NeighborOptions {
  // Radius mode: all pairs with 0 < |r_ij| <= cutoff, Å. Zero selects the k-nearest mode.
  double cutoff = 0;
  // k-nearest mode: each atom keeps its whole shells up to |r_ij| <= d_k (1 + shell_tolerance), where d_k is
  // the distance of its k-th neighbour; then every edge is joined by its reverse (j, i, -S), so the edge
  // stands in the list if either end keeps it.
  std::int64_t max_neighbors = 0;
  double shell_tolerance = 1e-4;
  // Keep one of each edge and its reverse: (i, j, S) with i < j, or i = j and S lexicographically positive.
  bool half = false;
  // k-nearest mode: also report how far each shell boundary is from the nearest distance.
  bool shell_margin = false;
  // Pairs no farther apart than this do not count as neighbours, Å (the published builder ignores them).
  double ignore_below = 0;
  int threads = 1;
};

struct NeighborList {
  // (2, E): row 0 is the atom an edge starts from, row 1 the one it points to; numbered through the batch.
  // Edges are sorted by (row 0, row 1, S).
  Buffer<std::int64_t> edge_index;
  Buffer<Vec3> edge_vec;         // (E) r_ij, Å
  Buffer<Int3> cell_shift;       // (E) S
  Buffer<std::int64_t> row_ptr;  // (N + 1) first edge of each atom, and E at the end
  // (N) smallest |d / d_k - (1 + shell_tolerance)| over the neighbours of an atom: an atom whose margin is
  // below the relative noise of its distances may gain or lose a shell. At most shell_tolerance, which the
  // k-th neighbour itself is away. Empty unless asked for.
  Buffer<double> shell_margin;
};

// Throws CrystalError for the first crystal at fault: bad numbers or cell (see reduce_cell), too few atoms
// for k without periodicity, a search too large to be meant, or two atoms closer than kMinDistance.
NeighborList neighbor_list(const Crystals& crystals, const NeighborOptions& options);

}  // namespace mgt
