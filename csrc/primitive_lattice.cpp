#include "primitive_lattice.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
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

// Finds atoms by place. They are sorted by element and by a phase, the same for all images of an atom, that
// spreads out atoms which share a lattice plane.
class Places {
 public:
  Places(const Crystals& crystals, std::int64_t b, const std::int64_t* numbers)
      : frac_(crystals.frac_coords + 3 * crystals.first_atom(b)),
        numbers_(numbers + crystals.first_atom(b)),
        pbc_(crystals.pbc + 3 * b),
        cell_(crystals.lattice(b)),
        sorted_(crystals.num_atoms(b)) {
    for (std::size_t i = 0; i < sorted_.size(); ++i) {
      const auto atom = static_cast<std::int64_t>(i);
      sorted_[i] = {numbers_[i], phase(coordinates(atom)), atom};
    }
    std::sort(sorted_.begin(), sorted_.end(), [](const Entry& p, const Entry& q) {
      return p.number != q.number ? p.number < q.number : p.phase < q.phase;
    });
    const Mat3 dual = inverse(cell_);  // gradient of the phase, for the width of the window
    const Vec3 weights = phase_weights();
    window_ = kSamePlace * norm({dot(dual.row[0], weights), dot(dual.row[1], weights), dot(dual.row[2], weights)});
  }

  Vec3 coordinates(std::int64_t i) const { return {frac_[3 * i], frac_[3 * i + 1], frac_[3 * i + 2]}; }

  // Difference of two places in Å, whole cells along periodic directions left out.
  double distance(Vec3 p, Vec3 q) const {
    Vec3 d = p - q;
    d = {pbc_[0] ? d.x - std::nearbyint(d.x) : d.x, pbc_[1] ? d.y - std::nearbyint(d.y) : d.y,
         pbc_[2] ? d.z - std::nearbyint(d.z) : d.z};
    return norm(combine(d, cell_));
  }

  bool has(std::int64_t number, Vec3 place) const {
    const double centre = phase(place);
    for (const double turn : {0.0, -1.0, 1.0}) {
      const Entry low{number, centre + turn - window_, 0};
      auto entry = std::lower_bound(sorted_.begin(), sorted_.end(), low, [](const Entry& p, const Entry& q) {
        return p.number != q.number ? p.number < q.number : p.phase < q.phase;
      });
      for (; entry != sorted_.end() && entry->number == number && entry->phase <= centre + turn + window_; ++entry) {
        if (distance(place, coordinates(entry->atom)) <= kSamePlace) return true;
      }
    }
    return false;
  }

  // Does the translation map every atom onto one of its kind?
  bool symmetric(Vec3 translation) const {
    for (std::size_t i = 0; i < sorted_.size(); ++i) {
      if (!has(numbers_[i], coordinates(static_cast<std::int64_t>(i)) + translation)) return false;
    }
    return true;
  }

 private:
  struct Entry {
    std::int64_t number;
    double phase;
    std::int64_t atom;
  };
  Vec3 phase_weights() const { return {pbc_[0] ? 1.0 : 0.0, pbc_[1] ? 7.0 : 0.0, pbc_[2] ? 31.0 : 0.0}; }
  double phase(Vec3 place) const {
    const double turns = dot(place, phase_weights());
    return turns - std::floor(turns);
  }

  const double* frac_;
  const std::int64_t* numbers_;
  const bool* pbc_;
  Mat3 cell_;
  std::vector<Entry> sorted_;
  double window_;
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
    const Vec3 snapped = (1 / scale) * Vec3{static_cast<double>(fraction.n[0]), static_cast<double>(fraction.n[1]),
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
