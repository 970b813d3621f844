// The finest lattice that maps a crystal onto itself.
#pragma once

#include <cstdint>

#include "crystals.hpp"

namespace mgt {

// Two atoms no farther apart count as the same place when a translation is tried, Å.
constexpr double kSamePlace = 0.01;

// The lattice of all translations, along periodic directions, that map crystal b onto itself, atom onto atom
// of the same number. Rows are Minkowski-reduced; the first `periodic` are set.
// `numbers` are those of the whole batch.
struct PrimitiveLattice {
  int periodic;
  Mat3 basis;  // Å
};
PrimitiveLattice primitive_lattice(const Crystals& crystals, std::int64_t b, const std::int64_t* numbers);

}  // namespace mgt
