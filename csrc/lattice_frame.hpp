// The lattice frame of a crystal: three lattice vectors that do not depend on how the crystal is described.
#pragma once

#include <cstdint>
#include <vector>

#include "crystals.hpp"

namespace mgt {

// What breaks ties between lattice vectors that the lattice alone cannot tell apart: the crystal's edges.
struct Motif {
  const std::int64_t* numbers;  // (N) atomic numbers
  const std::int64_t* target;   // (E) atom an edge points to
  const double* edge_vec;       // (E, 3) Å
  const std::int64_t* row_ptr;  // (N + 1) first edge of each atom
};

std::vector<Mat3> lattice_frames(const Crystals& crystals, const Motif& motif, int threads);

}  // namespace mgt
