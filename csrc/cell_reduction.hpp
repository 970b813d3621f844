// Reduced cells and wrapped atoms of a batch, on the host; the arithmetic is in reduced_cell.hpp.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "crystals.hpp"
#include "reduced_cell.hpp"

namespace mgt {

// Check the numbers of crystal b and reduce its cell.
// Throws CrystalError for non-finite or huge numbers, (near-)zero volume, or a lattice vector below
// kMinDistance.
ReducedCell reduce_cell(const Crystals& crystals, std::int64_t b);

// The atoms of one crystal, moved by lattice vectors into the reduced cell.
struct WrappedAtoms {
  Buffer<Vec3> position;   // Å
  Buffer<Int3> wrap;       // position = (frac + wrap) · given cell
  double volume_per_atom;  // Å^3; the bounding box, 2 Å larger, stands in where not periodic
};

WrappedAtoms wrap_atoms(const Crystals& crystals, std::int64_t b, const ReducedCell& cell, int threads);

}  // namespace mgt
