// How far to search, and which searches are refused: shared by host and device.
#pragma once

#include "reduced_cell.hpp"

namespace mgt {

constexpr double kSearchSlack = 1.0 + 1e-9;  // rounding must not lose a pair right on the radius
constexpr double kMaxImages = 4e6;           // translations looked through
constexpr double kMaxNeighbors = 1e6;        // expected neighbours of one atom
constexpr double kMaxEdges = 1e8;            // expected edges of one crystal: 5.2 GB

// What a search for all pairs within a radius is expected to meet.
struct SearchSize {
  double neighbors;  // of one atom
  double images;     // of the cell, at most
  // Whether so many atoms may search.
  MGT_HOST_DEVICE bool allowed(std::int64_t searching) const {
    return neighbors <= kMaxNeighbors && images <= kMaxImages &&
           neighbors * static_cast<double>(searching) <= kMaxEdges;
  }
};

MGT_HOST_DEVICE inline double sphere_volume(double radius) {
  return 4.0 / 3.0 * 3.14159265358979323846 * radius * radius * radius;
}

MGT_HOST_DEVICE inline SearchSize search_size(const ReducedCell& cell, std::int64_t n_atoms,
                                              double volume_per_atom, double radius) {
  double images = 1;
  for (int a = 0; a < cell.periodic; ++a) {
    // Between two wrapped atoms lies less than one cell.
    images *= 2 * std::floor(kSearchSlack * radius / cell.height[a]) + (n_atoms > 1 ? 3 : 1);
  }
  // Wires and slabs leave most of a large sphere empty.
  const double neighbors =
      std::fmin(sphere_volume(radius) / volume_per_atom, images * static_cast<double>(n_atoms));
  return {neighbors, images};
}

// Where a search for the k nearest starts. Room for half as many neighbours again: most atoms then find their
// shells at the first attempt. Atoms that take much volume may well be crowded in a small part of it.
constexpr double kLooseVolume = 100;  // of an atom, Å^3; caesium takes 110
MGT_HOST_DEVICE inline double starting_radius(std::int64_t max_neighbors, double volume_per_atom) {
  const double wanted = 1.5 * static_cast<double>(max_neighbors) + 6.0;
  return std::cbrt(wanted * std::fmin(volume_per_atom, kLooseVolume) / sphere_volume(1.0));
}
constexpr double kRadiusGrowth = 1.25;

// Squared radius of an atom's whole shells, from the squared distance of its k-th neighbour.
MGT_HOST_DEVICE inline double shell_limit(double kth, double shell_tolerance) {
  const double stretch = 1.0 + shell_tolerance;
  return kth * stretch * stretch;
}

}  // namespace mgt
