// Reduction of a cell to short vectors, and atoms wrapped into it: the arithmetic shared by host and device,
// which neither throws nor allocates.
#pragma once

#include "geometry.hpp"

namespace mgt {

constexpr double kMinDistance = 0.01;       // least distance of two atoms that is taken for real, Å
constexpr double kMinVolume = 1e-3;         // Å^3; an atom takes more than 1
constexpr double kMaxFractional = 1 << 20;  // beyond it wrapping costs more than 1e-9 of a cell
constexpr double kMaxSkew = 1 << 22;        // keeps integer coefficients far from overflow
// Largest component of a lattice vector, and farthest place where not periodic, Å. Squares then fit into
// single precision, and lattice translations into 32-bit integers.
constexpr double kMaxLength = 1e6;

// Whether a component of a lattice vector can be worked with.
MGT_HOST_DEVICE inline bool usable(double component) { return std::fabs(component) <= kMaxLength; }

// Whether a fractional coordinate can be, along a lattice vector that is periodic or not.
MGT_HOST_DEVICE inline bool usable(double fraction, Vec3 lattice_vector, bool periodic) {
  return std::fabs(fraction) <= kMaxFractional &&
         (periodic || std::fabs(fraction) * norm(lattice_vector) <= kMaxLength);
}
MGT_HOST_DEVICE inline bool usable(Vec3 frac, const Mat3& given, const bool* pbc) {
  return usable(frac.x, given.row[0], pbc[0]) && usable(frac.y, given.row[1], pbc[1]) &&
         usable(frac.z, given.row[2], pbc[2]);
}

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
MGT_HOST_DEVICE inline void minkowski_reduce(int count, Mat3& vectors, Int3 (&coefficients)[3]) {
  constexpr double kShorter = 1.0 - 1e-12;  // a step must shorten by more than rounding, or it could repeat
  Vec3* v = vectors.row;
  const auto subtract = [&](int k, double multiple, int j) {
    v[k] = v[k] - multiple * v[j];
    const auto m = static_cast<std::int32_t>(multiple);
    coefficients[k] =
        coefficients[k] - Int3{m * coefficients[j].x, m * coefficients[j].y, m * coefficients[j].z};
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (int pass = 1; pass < count; ++pass) {  // insertion sort by length
      for (int k = pass; k > 0 && dot(v[k], v[k]) < dot(v[k - 1], v[k - 1]) * kShorter; --k) {
        const Vec3 shorter = v[k];
        const Int3 its = coefficients[k];
        v[k] = v[k - 1];
        coefficients[k] = coefficients[k - 1];
        v[k - 1] = shorter;
        coefficients[k - 1] = its;
      }
    }
    for (int k = 1; k < count; ++k) {
      for (int j = 0; j < k; ++j) {
        const double multiple = std::nearbyint(dot(v[k], v[j]) / dot(v[j], v[j]));
        const Vec3 shorter = v[k] - multiple * v[j];
        if (multiple != 0 && dot(shorter, shorter) < dot(v[k], v[k]) * kShorter) {
          subtract(k, multiple, j);
          changed = true;
        }
      }
    }
    // In three dimensions the steps left over are those with both multiples +-1.
    for (int s = 0; count == 3 && !changed && s < 4; ++s) {
      const double first = s & 1 ? 1 : -1, second = s & 2 ? 1 : -1;
      const Vec3 shorter = v[2] - first * v[0] - second * v[1];
      if (dot(shorter, shorter) < dot(v[2], v[2]) * kShorter) {
        subtract(2, first, 0);
        subtract(2, second, 1);
        changed = true;
      }
    }
  }
}

enum class CellFault { kNone, kFlat, kSkewed, kOwnImage };

// Why a cell cannot be worked on, and the numbers that show it.
struct CellCheck {
  CellFault fault;
  double value;  // kFlat: volume, Å^3; kSkewed: longest lattice vector, Å; kOwnImage: shortest one, Å
  double other;  // kSkewed: spacing of lattice planes, Å
};

// Reduce a cell of usable components; `cell` is complete if the check finds no fault.
MGT_HOST_DEVICE inline CellCheck reduce_cell(const Mat3& given, const bool* pbc, ReducedCell& cell) {
  const double volume = std::fabs(determinant(given));
  if (!(volume >= kMinVolume)) return {CellFault::kFlat, volume, 0};

  cell = ReducedCell{};
  const Int3 unit[3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  for (int a = 0; a < 3; ++a) {
    if (!pbc[a]) continue;
    cell.to_given[cell.periodic] = unit[a];
    cell.basis.row[cell.periodic++] = given.row[a];
  }
  // No lattice vector met during the reduction is longer than the longest given one, so this bounds every
  // integer coefficient.
  const Vec3* g = given.row;
  double longest = 0, longest_dual = 0;
  for (int a = 0; a < 3; ++a) {
    longest = std::fmax(longest, norm(g[a]));
    longest_dual = std::fmax(longest_dual, norm(cross(g[(a + 1) % 3], g[(a + 2) % 3])) / volume);
  }
  if (longest * longest_dual > kMaxSkew) return {CellFault::kSkewed, longest, 1 / longest_dual};

  minkowski_reduce(cell.periodic, cell.basis, cell.to_given);
  Vec3* row = cell.basis.row;
  if (cell.periodic > 0 && norm(row[0]) < kMinDistance) return {CellFault::kOwnImage, norm(row[0]), 0};
  if (cell.periodic == 0) {
    cell.basis = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  } else if (cell.periodic == 1) {
    const Vec3 axis = (1 / norm(row[0])) * row[0];
    const double x = std::fabs(axis.x), y = std::fabs(axis.y), z = std::fabs(axis.z);
    const Vec3 other = x <= y && x <= z ? Vec3{1, 0, 0} : y <= z ? Vec3{0, 1, 0} : Vec3{0, 0, 1};
    row[1] = cross(axis, other);
    row[1] = (1 / norm(row[1])) * row[1];
    row[2] = cross(axis, row[1]);
  } else if (cell.periodic == 2) {
    row[2] = cross(row[0], row[1]);
    row[2] = (1 / norm(row[2])) * row[2];
  }
  cell.inverse = inverse(cell.basis);
  for (int a = 0; a < 3; ++a) {
    const Vec3 normal = cross(row[(a + 1) % 3], row[(a + 2) % 3]);
    cell.height[a] = std::fabs(dot(row[a], normal)) / norm(normal);
  }
  return {CellFault::kNone, 0, 0};
}

// An atom moved by lattice vectors into the reduced cell.
struct WrappedAtom {
  Vec3 position;    // Å
  Int3 wrap;        // position = (frac + wrap) · given cell
  Vec3 coordinate;  // along the basis, before the move; the same as after it where not periodic
};

MGT_HOST_DEVICE inline WrappedAtom wrap_atom(Vec3 frac, const Mat3& given, const bool* pbc,
                                             const ReducedCell& cell) {
  const Vec3 whole = {pbc[0] ? std::floor(frac.x) : 0, pbc[1] ? std::floor(frac.y) : 0,
                      pbc[2] ? std::floor(frac.z) : 0};
  const Vec3 inside = combine(frac - whole, given);
  const Vec3 u = combine(inside, cell.inverse);
  const Vec3 steps = {cell.periodic > 0 ? std::floor(u.x) : 0, cell.periodic > 1 ? std::floor(u.y) : 0,
                      cell.periodic > 2 ? std::floor(u.z) : 0};
  const auto rounded = [](Vec3 v) {
    return Int3{static_cast<std::int32_t>(v.x), static_cast<std::int32_t>(v.y),
                static_cast<std::int32_t>(v.z)};
  };
  return {inside - combine(steps, cell.basis),
          Int3{0, 0, 0} - rounded(whole) - combine(rounded(steps), cell.to_given), u};
}

// Volume for each of `count` atoms whose coordinates along the basis span [low, high], Å^3; their bounding
// box, 2 Å larger, stands in where not periodic.
MGT_HOST_DEVICE inline double volume_per_atom(const ReducedCell& cell, Vec3 low, Vec3 high,
                                              std::int64_t count) {
  constexpr double kMargin = 2.0;
  double volume = std::fabs(determinant(cell.basis));
  if (cell.periodic < 3) volume *= high.z - low.z + kMargin;
  if (cell.periodic < 2) volume *= high.y - low.y + kMargin;
  if (cell.periodic < 1) volume *= high.x - low.x + kMargin;
  return volume / static_cast<double>(count);
}

}  // namespace mgt
