#include "primitive_lattice.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "cell_reduction.hpp"

namespace mgt {
namespace {

// A translation of n / order cells. Translations that map a crystal onto itself form a group that moves every
// atom, so the group's size divides the number of atoms of each element: `order` is their greatest common
// divisor, and every such translation is a whole multiple of 1 / order along each cell vector.
struct Fraction {
  std::int64_t n[3];
};

// Lattice of fractions containing the cell vectors, as rows of an upper triangular matrix.
class FractionLattice {
 public:
  explicit FractionLattice(std::int64_t order) : order_(order) {
    for (int a = 0; a < 3; ++a) rows_[a].n[a] = order;
  }

  bool contains(Fraction v) const {
    for (int a = 0; a < 3; ++a) {
      if (v.n[a] % rows_[a].n[a] != 0) return false;
      subtract(v, v.n[a] / rows_[a].n[a], rows_[a]);
    }
    return true;
  }

  void add(Fraction v) {  // Euclid's algorithm, column by column
    for (int a = 0; a < 3; ++a) {
      while (v.n[a] != 0) {
        subtract(rows_[a], rows_[a].n[a] / v.n[a], v);
        std::swap(rows_[a], v);
      }
      for (int c = a + 1; c < 3; ++c) {  // whole cells are in the lattice: keep numbers small
        rows_[a].n[c] %= order_;
        v.n[c] %= order_;
      }
    }
  }

  // Number of translations in one cell.
  std::int64_t size() const {
    std::int64_t size = 1;
    for (int a = 0; a < 3; ++a) size *= order_ / std::abs(rows_[a].n[a]);
    return size;
  }

  Vec3 row(int a) const {
    const double scale = 1.0 / static_cast<double>(order_);
    const std::int64_t* n = rows_[a].n;
    return scale * Vec3{static_cast<double>(n[0]), static_cast<double>(n[1]), static_cast<double>(n[2])};
  }

 private:
  static void subtract(Fraction& v, std::int64_t multiple, const Fraction& w) {
    for (int a = 0; a < 3; ++a) v.n[a] -= multiple * w.n[a];
  }
  std::int64_t order_;
  Fraction rows_[3] = {};
};

// Finds atoms by place: they are sorted into a grid over the given cell, about one atom a bin.
class Places {
 public:
  Places(const Crystals& crystals, std::int64_t b, const std::int64_t* numbers)
      : frac_(crystals.frac_coords + 3 * crystals.first_atom(b)),
        numbers_(numbers + crystals.first_atom(b)),
        pbc_(crystals.pbc + 3 * b),
        cell_(crystals.lattice(b)),
        sorted_(crystals.num_atoms(b)) {
    const Mat3 dual = inverse(cell_);
    const double* d = &dual.row[0].x;
    for (int a = 0; a < 3; ++a) {
      bins_[a] = pbc_[a] ? std::llround(std::cbrt(static_cast<double>(sorted_.size()))) : 1;
      margin_[a] = kSamePlace * norm({d[a], d[a + 3], d[a + 6]});
    }
    for (std::size_t i = 0; i < sorted_.size(); ++i) {
      const auto atom = static_cast<std::int64_t>(i);
      const Vec3 f = coordinates(atom);
      sorted_[i] = {flat(bin(f.x, 0), bin(f.y, 1), bin(f.z, 2)), atom};
    }
    std::sort(sorted_.begin(), sorted_.end());
  }

  Vec3 coordinates(std::int64_t i) const { return {frac_[3 * i], frac_[3 * i + 1], frac_[3 * i + 2]}; }

  // Difference of two places in Å, whole cells along periodic directions left out.
  double distance(Vec3 p, Vec3 q) const {
    Vec3 d = p - q;
    d = {pbc_[0] ? d.x - std::nearbyint(d.x) : d.x, pbc_[1] ? d.y - std::nearbyint(d.y) : d.y,
         pbc_[2] ? d.z - std::nearbyint(d.z) : d.z};
    return norm(combine(d, cell_));
  }

  // Does the translation map every atom onto one of its kind?
  bool symmetric(Vec3 translation) const {
    // Atoms often come ordered by site. Striding through them finds the one that fails much sooner.
    const auto count = static_cast<std::int64_t>(sorted_.size());
    std::int64_t stride = 1 + count * 5 / 8;
    while (std::gcd(stride, count) != 1) ++stride;
    for (std::int64_t n = 0; n < count; ++n) {
      const std::int64_t i = n * stride % count;
      if (!has(numbers_[i], coordinates(i) + translation)) return false;
    }
    return true;
  }

 private:
  using Entry = std::pair<std::int64_t, std::int64_t>;  // bin, atom

  std::int64_t bin(double coordinate, int a) const {
    return static_cast<std::int64_t>(std::floor(coordinate * static_cast<double>(bins_[a])));
  }
  std::int64_t flat(std::int64_t x, std::int64_t y, std::int64_t z) const {
    const auto wrap = [&](std::int64_t n, int a) { return ((n % bins_[a]) + bins_[a]) % bins_[a]; };
    return (wrap(x, 0) * bins_[1] + wrap(y, 1)) * bins_[2] + wrap(z, 2);
  }

  bool has(std::int64_t number, Vec3 place) const {
    for (std::int64_t x = bin(place.x - margin_[0], 0); x <= bin(place.x + margin_[0], 0); ++x) {
      for (std::int64_t y = bin(place.y - margin_[1], 1); y <= bin(place.y + margin_[1], 1); ++y) {
        for (std::int64_t z = bin(place.z - margin_[2], 2); z <= bin(place.z + margin_[2], 2); ++z) {
          const std::int64_t index = flat(x, y, z);
          auto entry = std::lower_bound(sorted_.begin(), sorted_.end(), Entry{index, 0});
          for (; entry != sorted_.end() && entry->first == index; ++entry) {
            const std::int64_t i = entry->second;
            if (numbers_[i] == number && distance(place, coordinates(i)) <= kSamePlace) return true;
          }
        }
      }
    }
    return false;
  }

  const double* frac_;
  const std::int64_t* numbers_;
  const bool* pbc_;
  Mat3 cell_;
  std::vector<Entry> sorted_;
  std::int64_t bins_[3];
  double margin_[3];  // kSamePlace in fractional coordinates
};

// Atoms of the rarest element, and the greatest common divisor of all elements' counts.
std::vector<std::int64_t> rarest_atoms(const std::int64_t* numbers, std::int64_t count, std::int64_t& order) {
  std::vector<std::int64_t> sorted(numbers, numbers + count);
  std::sort(sorted.begin(), sorted.end());
  std::int64_t rarest = 0, fewest = count + 1;
  order = 0;
  for (auto first = sorted.begin(); first != sorted.end();) {
    const auto last = std::upper_bound(first, sorted.end(), *first);
    const std::int64_t atoms = last - first;
    order = std::gcd(order, atoms);
    if (atoms < fewest) {
      fewest = atoms;
      rarest = *first;
    }
    first = last;
  }
  std::vector<std::int64_t> atoms;
  for (std::int64_t i = 0; i < count; ++i) {
    if (numbers[i] == rarest) atoms.push_back(i);
  }
  return atoms;
}

}  // namespace

PrimitiveLattice primitive_lattice(const Crystals& crystals, std::int64_t b, const std::int64_t* numbers) {
  const ReducedCell cell = reduce_cell(crystals, b);
  PrimitiveLattice lattice{cell.periodic, cell.basis};
  std::int64_t order;
  const auto atoms = rarest_atoms(numbers + crystals.first_atom(b), crystals.num_atoms(b), order);
  if (order == 1 || cell.periodic == 0) return lattice;

  const Places places(crystals, b, numbers);
  const bool* pbc = crystals.pbc + 3 * b;
  const double scale = static_cast<double>(order);
  FractionLattice fractions(order);
  for (std::size_t k = 1; k < atoms.size() && fractions.size() < order; ++k) {
    const Vec3 shift = places.coordinates(atoms[k]) - places.coordinates(atoms[0]);
    const double components[3] = {shift.x, shift.y, shift.z};
    Fraction fraction;
    for (int a = 0; a < 3; ++a) fraction.n[a] = pbc[a] ? std::llround(scale * components[a]) % order : 0;
    const Vec3 snapped =
        (1 / scale) * Vec3{static_cast<double>(fraction.n[0]), static_cast<double>(fraction.n[1]),
                           static_cast<double>(fraction.n[2])};
    if (places.distance(shift, snapped) > kSamePlace || fractions.contains(fraction)) continue;
    if (places.symmetric(snapped)) fractions.add(fraction);
  }
  if (fractions.size() == 1) return lattice;

  Int3 ignored[3] = {};
  int row = 0;
  for (int a = 0; a < 3; ++a) {
    if (pbc[a]) lattice.basis.row[row++] = combine(fractions.row(a), crystals.lattice(b));
  }
  minkowski_reduce(lattice.periodic, lattice.basis, ignored);
  return lattice;
}

}  // namespace mgt
