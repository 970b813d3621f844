// How far to search, and which searches are refused: shared by host and device.
#pragma once

#include "reduced_cell.hpp"

namespace mgt {

constexpr double kSearchSlack = 1.0 + 1e-9;  // rounding must not lose a pair right on the radius
constexpr double kMaxImages = 4e6;           // translations looked through
constexpr double kMaxNeighbors = 1e6;        // expected neighbours of one atom
constexpr double kMaxEdges = 1e9;            // expected edges of one crystal

// What a search for all pairs within a radius is expected to meet.
struct SearchSize {
  double neighbors;  // of one atom
  double edges;      // of the crystal
  double images;     // of the cell, at most
  MGT_HOST_DEVICE bool allowed() const {
    return neighbors <= kMaxNeighbors && edges <= kMaxEdges && images <= kMaxImages;
  }
};

MGT_HOST_DEVICE inline double sphere_volume(double radius) {
  return 4.0 / 3.0 * 3.14159265358979323846 * radius * radius * radius;
}

// The longest diagonal: no vector between wrapped atoms is longer within the periodic directions.
MGT_HOST_DEVICE inline double longest_diagonal(const ReducedCell& cell) {
  double longest = 0;
  for (int s = 0; s < 4; ++s) {
    Vec3 sum{0, 0, 0};
    for (int a = 0; a < cell.periodic; ++a) {
      const double sign = a > 0 && (s >> (a - 1) & 1) ? -1 : 1;
      sum = sum + sign * cell.basis.row[a];
    }
    longest = std::fmax(longest, norm(sum));
  }
  return longest;
}

MGT_HOST_DEVICE inline SearchSize search_size(const ReducedCell& cell, std::int64_t n_atoms,
                                              double volume_per_atom, double radius) {
  const auto atoms = static_cast<double>(n_atoms);
  SearchSize size{sphere_volume(radius) / volume_per_atom, 0, 1};
  if (cell.periodic == 0) size.neighbors = std::fmin(size.neighbors, atoms);
  size.edges = size.neighbors * atoms;
  const double length = radius + (n_atoms > 1 ? longest_diagonal(cell) : 0);
  for (int a = 0; a < cell.periodic; ++a) {
    size.images *= 2 * std::floor(kSearchSlack * length / cell.height[a]) + 1;
  }
  return size;
}

// Where a search for the k nearest starts. Room for half as many neighbours again: most atoms then find their
// shells at the first attempt.
MGT_HOST_DEVICE inline double starting_radius(std::int64_t max_neighbors, double volume_per_atom) {
  const double wanted = 1.5 * static_cast<double>(max_neighbors) + 6.0;
  return std::cbrt(wanted * volume_per_atom / sphere_volume(1.0));
}
constexpr double kRadiusGrowth = 1.25;

// Squared radius of an atom's whole shells, from the squared distance of its k-th neighbour.
MGT_HOST_DEVICE inline double shell_limit(double kth, double shell_tolerance) {
  const double stretch = 1.0 + shell_tolerance;
  return kth * stretch * stretch;
}

}  // namespace mgt
