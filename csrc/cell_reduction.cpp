#include "cell_reduction.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "parallel.hpp"

namespace mgt {
namespace {

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
    if (!usable(value)) {
      fail(b, "component ", k % 3, " of lattice vector ", kAxis[k / 3], " is ", value,
           "; give lengths in Å, at most ", kMaxLength);
    }
  }
  const Mat3 given = crystals.lattice(b);
  const bool* pbc = crystals.pbc + 3 * b;
  for (std::int64_t i = 0; i < crystals.num_atoms(b); ++i) {
    const std::int64_t atom = crystals.first_atom(b) + i;
    if (usable(crystals.frac(atom), given, pbc)) continue;
    int a = 0;
    while (usable(crystals.frac_coords[3 * atom + a], given.row[a], pbc[a])) ++a;
    const double value = crystals.frac_coords[3 * atom + a];
    const char* const remedy =
        !std::isfinite(value) ? "give a finite number"
        : pbc[a] ? "wrap the atom into the cell (are these Cartesian coordinates?)"
                 : "move it nearer to the origin: along this axis, which is not periodic, it is too far away";
    fail(b, "atom ", i, ": fractional coordinate ", kAxis[a], " is ", value, "; ", remedy);
  }
}

}  // namespace

ReducedCell reduce_cell(const Crystals& crystals, std::int64_t b) {
  check_numbers(crystals, b);
  ReducedCell cell{};
  const CellCheck check = reduce_cell(crystals.lattice(b), crystals.pbc + 3 * b, cell);
  switch (check.fault) {
    case CellFault::kNone:
      break;
    case CellFault::kFlat:
      fail(b, "the cell has a volume of ", check.value,
           " Å^3, (nearly) zero; give three independent lattice vectors in Å");
    case CellFault::kSkewed:
      fail(b, "the longest lattice vector, ", check.value,
           " Å, is over four million times the spacing of lattice planes, ", check.other,
           " Å; give a less skewed cell");
    case CellFault::kOwnImage:
      fail(b, "each atom is ", check.value, " Å from its own image; give lattice vectors in Å");
  }
  return cell;
}

WrappedAtoms wrap_atoms(const Crystals& crystals, std::int64_t b, const ReducedCell& cell, int threads) {
  constexpr std::int64_t kBlock = 4096;
  const std::int64_t first = crystals.first_atom(b), count = crystals.num_atoms(b);
  const Mat3 given = crystals.lattice(b);
  WrappedAtoms atoms{Buffer<Vec3>(count), Buffer<Int3>(count), 0};
  for_each_block(count, kBlock, threads, [&](int, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const WrappedAtom atom = wrap_atom(crystals.frac(first + i), given, crystals.pbc + 3 * b, cell);
      atoms.position[i] = atom.position;
      atoms.wrap[i] = atom.wrap;
    }
  });
  Vec3 low{0, 0, 0}, high{0, 0, 0};
  for (std::int64_t i = 0; cell.periodic < 3 && i < count; ++i) {
    const Vec3 u = wrap_atom(crystals.frac(first + i), given, crystals.pbc + 3 * b, cell).coordinate;
    low = i == 0 ? u : Vec3{std::min(low.x, u.x), std::min(low.y, u.y), std::min(low.z, u.z)};
    high = i == 0 ? u : Vec3{std::max(high.x, u.x), std::max(high.y, u.y), std::max(high.z, u.z)};
  }
  atoms.volume_per_atom = volume_per_atom(cell, low, high, count);
  return atoms;
}

}  // namespace mgt
