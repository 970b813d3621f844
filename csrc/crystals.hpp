// What every routine takes in: a ragged batch of crystals, seen through borrowed arrays.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "geometry.hpp"

namespace mgt {

// B crystals with N atoms in all. The arrays belong to the caller and outlive the call.
struct Crystals {
  std::int64_t count;             // B
  const std::int64_t* batch_ptr;  // (B + 1) first atom of each crystal, and N at the end
  const double* frac_coords;      // (N, 3) fractional coordinates; atoms may lie outside the cell
  const double* cell;             // (B, 3, 3) lattice vectors as rows, Å
  const bool* pbc;                // (B, 3) periodic along each lattice vector

  std::int64_t first_atom(std::int64_t b) const { return batch_ptr[b]; }
  std::int64_t num_atoms(std::int64_t b) const { return batch_ptr[b + 1] - batch_ptr[b]; }
  Vec3 frac(std::int64_t atom) const {
    return {frac_coords[3 * atom], frac_coords[3 * atom + 1], frac_coords[3 * atom + 2]};
  }
  Mat3 lattice(std::int64_t b) const {
    const double* m = cell + 9 * b;
    return {{{m[0], m[1], m[2]}, {m[3], m[4], m[5]}, {m[6], m[7], m[8]}}};
  }
};

// A crystal that cannot be worked on. what() says why and what to do; the caller adds the crystal's name.
class CrystalError : public std::invalid_argument {
 public:
  CrystalError(std::int64_t crystal, const std::string& why) : std::invalid_argument(why), crystal(crystal) {}
  std::int64_t crystal;
};

}  // namespace mgt
