#include "cell_reduction.hpp"

#include <algorithm>
#include <sstream>

namespace mgt {
namespace {

constexpr double kMinVolume = 1e-3;         // Å^3; an atom takes more than 1
constexpr double kMaxFractional = 1 << 20;  // beyond it wrapping costs more than 1e-9 of a cell
constexpr double kMaxSkew = 1 << 22;        // keeps integer coefficients far from overflow
constexpr double kShorter = 1.0 - 1e-12;    // a step must shorten by more than rounding, or it could repeat

template <class... Parts>
[[noreturn]] void fail(std::int64_t b, const Parts&... parts) {
  std::ostringstream message;
  message.precision(6);
  (message << ... << parts);
  throw CrystalError(b, message.str());
}

void check_numbers(const Crystals& crystals, std::int64_t b) {
  static const char* const kAxis = "abc";
  for (int k = 0; k < 9; ++k) {
    const double value = crystals.cell[9 * b + k];
    if (!std::isfinite(value)) {
      fail(b, "component ", k % 3, " of lattice vector ", kAxis[k / 3], " is ", value,
           "; give finite lengths in Å");
    }
  }
  for (std::int64_t i = 0; i < crystals.num_atoms(b); ++i) {
    for (int k = 0; k < 3; ++k) {
      const double value = crystals.frac_coords[3 * (crystals.first_atom(b) + i) + k];
      if (!std::isfinite(value)) {
        fail(b, "atom ", i, ": fractional coordinate ", kAxis[k], " is ", value, "; give a finite number");
      }
      if (std::fabs(value) > kMaxFractional) {
        fail(b, "atom ", i, ": fractional coordinate ", kAxis[k], " is ", value,
             "; wrap the atom into the cell (are these Cartesian coordinates?)");
      }
    }
  }
}

}  // namespace

void minkowski_reduce(int count, Mat3& vectors, Int3 (&coefficients)[3]) {
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
        std::swap(v[k], v[k - 1]);
        std::swap(coefficients[k], coefficients[k - 1]);
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

ReducedCell reduce_cell(const Crystals& crystals, std::int64_t b) {
  check_numbers(crystals, b);
  const Mat3 given = crystals.lattice(b);
  const double volume = std::fabs(determinant(given));
  if (!(volume >= kMinVolume)) {
    fail(b, "the cell has a volume of ", volume,
         " Å^3, (nearly) zero; give three independent lattice vectors in Å");
  }
  if (!std::isfinite(volume)) fail(b, "the volume of the cell overflows; give lattice vectors in Å");

  ReducedCell cell{};
  const Int3 unit[3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  for (int a = 0; a < 3; ++a) {
    if (!crystals.pbc[3 * b + a]) continue;
    cell.to_given[cell.periodic] = unit[a];
    cell.basis.row[cell.periodic++] = given.row[a];
  }
  // No lattice vector met during the reduction is longer than the longest given one, so this bounds every
  // integer coefficient.
  const Vec3* g = given.row;
  double longest = 0, longest_dual = 0;
  for (int a = 0; a < 3; ++a) {
    longest = std::max(longest, norm(g[a]));
    longest_dual = std::max(longest_dual, norm(cross(g[(a + 1) % 3], g[(a + 2) % 3])) / volume);
  }
  if (longest * longest_dual > kMaxSkew) {
    fail(b, "the longest lattice vector, ", longest,
         " Å, is over four million times the spacing of lattice planes, ", 1 / longest_dual,
         " Å; give a less skewed cell");
  }
  minkowski_reduce(cell.periodic, cell.basis, cell.to_given);
  if (cell.periodic > 0 && norm(cell.basis.row[0]) < kMinDistance) {
    fail(b, "each atom is ", norm(cell.basis.row[0]), " Å from its own image; give lattice vectors in Å");
  }
  Vec3* row = cell.basis.row;
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
  return cell;
}

WrappedAtoms wrap_atoms(const Crystals& crystals, std::int64_t b, const ReducedCell& cell) {
  const std::int64_t first = crystals.first_atom(b), count = crystals.num_atoms(b);
  const Mat3 given = crystals.lattice(b);
  const bool* pbc = crystals.pbc + 3 * b;
  WrappedAtoms atoms;
  atoms.position.reserve(count);
  atoms.wrap.reserve(count);
  Vec3 low{0, 0, 0}, high{0, 0, 0};
  for (std::int64_t i = 0; i < count; ++i) {
    Vec3 f = crystals.frac(first + i);
    const Vec3 whole = {pbc[0] ? std::floor(f.x) : 0, pbc[1] ? std::floor(f.y) : 0,
                        pbc[2] ? std::floor(f.z) : 0};
    const Vec3 inside = combine(f - whole, given);
    const Vec3 u = combine(inside, cell.inverse);
    const Vec3 steps = {cell.periodic > 0 ? std::floor(u.x) : 0, cell.periodic > 1 ? std::floor(u.y) : 0,
                        cell.periodic > 2 ? std::floor(u.z) : 0};
    const auto rounded = [](Vec3 v) {
      return Int3{static_cast<std::int32_t>(v.x), static_cast<std::int32_t>(v.y),
                  static_cast<std::int32_t>(v.z)};
    };
    atoms.position.push_back(inside - combine(steps, cell.basis));
    atoms.wrap.push_back(Int3{0, 0, 0} - rounded(whole) - combine(rounded(steps), cell.to_given));
    low = i == 0 ? u : Vec3{std::min(low.x, u.x), std::min(low.y, u.y), std::min(low.z, u.z)};
    high = i == 0 ? u : Vec3{std::max(high.x, u.x), std::max(high.y, u.y), std::max(high.z, u.z)};
  }
  constexpr double kMargin = 2.0;
  double volume = std::fabs(determinant(cell.basis));
  if (cell.periodic < 3) volume *= high.z - low.z + kMargin;
  if (cell.periodic < 2) volume *= high.y - low.y + kMargin;
  if (cell.periodic < 1) volume *= high.x - low.x + kMargin;
  atoms.volume_per_atom = volume / static_cast<double>(count);
  return atoms;
}

}  // namespace mgt
