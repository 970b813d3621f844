// Reduction of a cell to short vectors, and atoms wrapped into the reduced cell.
#pragma once

#include <cstdint>
#include <vector>

#include "crystals.hpp"
#include "geometry.hpp"

namespace mgt {

// Shortest lattice vector, and least distance between two atoms, that is taken for real, Å.
constexpr double kMinDistance = 0.01;

// A basis in which neighbours are searched: the `periodic` reduced lattice vectors first, completed by
// unit vectors at right angles to them where the crystal is not periodic.
struct ReducedCell {
  int periodic;      // number of periodic directions, 0 to 3
  Mat3 basis;        // rows, Å
  Mat3 inverse;      // combine(x, inverse) are the coefficients of x along the basis
  double height[3];  // distance between the planes spanned by the other two rows, Å
  Int3 to_given[3];  // row a of the basis = sum of to_given[a] times the given lattice vectors; zero rows
                     // stand for directions without periodicity
};

// Minkowski-reduce the first `count` rows in place: each is as short as it can be made by adding integer
// multiples of the shorter ones, so that they realise the successive minima of their lattice. The same
// steps are done on `coefficients`. Rows come out ordered by length.
void minkowski_reduce(int count, Mat3& vectors, Int3 (&coefficients)[3]);

// Check the numbers of crystal b and reduce its cell.
// Throws CrystalError for non-finite or huge numbers, (near-)zero volume, or a lattice vector below
// kMinDistance.
ReducedCell reduce_cell(const Crystals& crystals, std::int64_t b);

// The atoms of one crystal, moved by lattice vectors into the reduced cell.
struct WrappedAtoms {
  std::vector<Vec3> position;  // Å
  std::vector<Int3> wrap;      // position = (frac + wrap) · given cell
  double volume_per_atom;      // Å^3; the bounding box, 2 Å larger, stands in where not periodic
};

WrappedAtoms wrap_atoms(const Crystals& crystals, std::int64_t b, const ReducedCell& cell);

}  // namespace mgt
