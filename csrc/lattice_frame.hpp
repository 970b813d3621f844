// The lattice frame of a crystal: three lattice vectors that depend on the crystal alone, not on the cell,
// the origin, the order of atoms or the orientation it is described with.
//
// 1. The primitive lattice: every translation that maps the crystal onto itself.
// 2. Of all right-handed bases whose vectors realise the successive minima of that lattice, those with the
//    preferred angles: to L1 not above 90 degrees, then the most acute.
// 3. What is left are bases related by the lattice's own rotations. The crystal's edges decide between them;
//    where these do not either, the crystal has the symmetry and the choice makes no difference to what a
//    network sees: |L_m| and the angles between edges and L_m.
//
// Along axes without periodicity the given cell vector is taken as it is, so there the frame is that of the
// description. Tolerances draw a line somewhere: two descriptions of a crystal whose lengths, angles or
// positions differ by rounding, and that lies right on such a line, can get different frames.
#pragma once

#include <cstdint>
#include <vector>

#include "crystals.hpp"

namespace mgt {

// The crystals' graph, of which the frame sees atomic numbers, lengths and directions.
struct Motif {
  const std::int64_t* numbers;  // (N) atomic numbers
  const std::int64_t* target;   // (E) atom an edge points to
  const double* edge_vec;       // (E, 3) Å
  const std::int64_t* row_ptr;  // (N + 1) first edge of each atom
};

// One frame a crystal, rows L1, L2, L3 in Å, periodic directions first and by length.
// Throws what reduce_cell throws.
std::vector<Mat3> lattice_frames(const Crystals& crystals, const Motif& motif, int threads);

}  // namespace mgt
