// How a crystal's edges look from a basis, as one number: it decides between bases that the lattice alone
// cannot tell apart. Two rounds of messages between atoms, each weighted by the elements, the length of the
// edge and its angles to the basis, then the sum of squares over atoms. Equal for two bases if a symmetry of
// the crystal takes one into the other; messages, not a sum over edges alone, so that it matters which edges
// meet at an atom.
//
// Host and device add the same numbers in the same order: over the edges of an atom, then over atoms.
#pragma once

#include "geometry.hpp"
#include "lattice_bases.hpp"

namespace mgt {

constexpr double kSignatureTie = 1e-12;  // relative difference of signatures that counts as none

// Weights by element, without pattern and different for the two ends of an edge.
MGT_HOST_DEVICE inline double fraction(double x) { return x - std::floor(x); }
MGT_HOST_DEVICE inline double start_weight(std::int64_t number) {
  return 0.5 + fraction(0.6180339887 * static_cast<double>(number));
}
MGT_HOST_DEVICE inline double end_weight(std::int64_t number) {
  return 0.5 + fraction(0.7548776662 * static_cast<double>(number));
}

struct EdgeLook {
  Vec3 unit;      // direction
  double weight;  // by length: a quarter at 3 Å; without exp, which host and device would round differently
};
MGT_HOST_DEVICE inline EdgeLook look_at(Vec3 edge) {
  const double squared = dot(edge, edge);
  const double root = 9.0 / (9.0 + squared);
  return {(1.0 / std::sqrt(squared)) * edge, root * root};
}

// A generic polynomial of the cosine to each L_m. Their product over m has no symmetry of its own.
MGT_HOST_DEVICE inline double profile(int m, double c) {
  const double k0 = 1.0;
  const double k1 = m == 0 ? 0.83 : m == 1 ? -0.59 : 0.37;
  const double k2 = m == 0 ? 0.47 : m == 1 ? 0.71 : -0.53;
  const double k3 = m == 0 ? 0.31 : m == 1 ? -0.23 : 0.67;
  const double k4 = m == 0 ? 0.19 : m == 1 ? 0.37 : 0.29;
  return k0 + c * (k1 + c * (k2 + c * (k3 + c * k4)));
}

// The first of the signatures that are the greatest.
MGT_HOST_DEVICE inline int greatest_signature(const double* signature, int count) {
  double greatest = signature[0];
  for (int n = 1; n < count; ++n) greatest = signature[n] > greatest ? signature[n] : greatest;
  int best = 0;
  while (signature[best] < (1.0 - kSignatureTie) * greatest) ++best;
  return best;
}

}  // namespace mgt
