// The finest lattice that maps a crystal onto itself, on host and device.
#pragma once

#include "reduced_cell.hpp"
#include "thread_group.hpp"

namespace mgt {

// Two atoms no farther apart count as the same place when a translation is tried, Å.
constexpr double kSamePlace = 0.01;

MGT_HOST_DEVICE inline std::int64_t greatest_common_divisor(std::int64_t a, std::int64_t b) {
  while (b != 0) {
    const std::int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// A translation of n / order cells. Translations that map a crystal onto itself form a group that moves every
// atom, so the group's size divides the number of atoms of each element: `order` is their greatest common
// divisor, and every such translation is a whole multiple of 1 / order along each cell vector.
struct Fraction {
  std::int64_t n[3];
};

// Lattice of fractions containing the cell vectors, as rows of an upper triangular matrix.
class FractionLattice {
 public:
  MGT_HOST_DEVICE void reset(std::int64_t order) {
    order_ = order;
    for (int a = 0; a < 3; ++a) {
      for (int c = 0; c < 3; ++c) rows_[a].n[c] = a == c ? order : 0;
    }
  }

  // The fraction nearest to a translation in units of cells. Without periodicity there is none but zero.
  MGT_HOST_DEVICE Fraction nearest(int periodic, Vec3 cells) const {
    const double components[3] = {cells.x, cells.y, cells.z};
    Fraction v{};
    for (int a = 0; a < periodic; ++a) {
      v.n[a] =
          static_cast<std::int64_t>(std::nearbyint(static_cast<double>(order_) * components[a])) % order_;
    }
    return v;
  }
  MGT_HOST_DEVICE Vec3 in_cells(const Fraction& v) const {
    const double scale = 1.0 / static_cast<double>(order_);
    return scale *
           Vec3{static_cast<double>(v.n[0]), static_cast<double>(v.n[1]), static_cast<double>(v.n[2])};
  }

  MGT_HOST_DEVICE bool contains(Fraction v) const {
    for (int a = 0; a < 3; ++a) {
      if (v.n[a] % rows_[a].n[a] != 0) return false;
      subtract(v, v.n[a] / rows_[a].n[a], rows_[a]);
    }
    return true;
  }

  MGT_HOST_DEVICE void add(Fraction v) {  // Euclid's algorithm, column by column
    for (int a = 0; a < 3; ++a) {
      while (v.n[a] != 0) {
        subtract(rows_[a], rows_[a].n[a] / v.n[a], v);
        const Fraction rest = rows_[a];
        rows_[a] = v;
        v = rest;
      }
      for (int c = a + 1; c < 3; ++c) {  // whole cells are in the lattice: keep numbers small
        rows_[a].n[c] %= order_;
        v.n[c] %= order_;
      }
    }
  }

  // Number of translations in one cell.
  MGT_HOST_DEVICE std::int64_t size() const {
    std::int64_t size = 1;
    for (int a = 0; a < 3; ++a) size *= order_ / (rows_[a].n[a] < 0 ? -rows_[a].n[a] : rows_[a].n[a]);
    return size;
  }
  MGT_HOST_DEVICE const Fraction& row(int a) const { return rows_[a]; }

 private:
  MGT_HOST_DEVICE static void subtract(Fraction& v, std::int64_t multiple, const Fraction& w) {
    for (int a = 0; a < 3; ++a) v.n[a] -= multiple * w.n[a];
  }
  std::int64_t order_;
  Fraction rows_[3];
};

// One crystal, seen through borrowed arrays.
struct CrystalView {
  std::int64_t num_atoms;
  const std::int64_t* numbers;  // (num_atoms) atomic numbers
  const double* frac_coords;    // (num_atoms, 3)
  Mat3 cell;                    // Å
  const bool* pbc;              // (3)
};

// Room for as many items as the crystal has atoms.
struct PlaceWorkspace {
  Vec3* coordinate;
  std::int32_t* first_in_bin;
  std::int32_t* next_in_bin;
};

// Finds atoms by place: they are sorted into bins of the reduced cell, about one atom a bin.
class Places {
 public:
  template <class Group>
  MGT_HOST_DEVICE Places(const Group& group, const CrystalView& crystal, const ReducedCell& cell,
                         const PlaceWorkspace& workspace)
      : numbers_(crystal.numbers), count_(crystal.num_atoms), cell_(cell), workspace_(workspace) {
    std::int64_t root = 1;
    while ((root + 1) * (root + 1) * (root + 1) <= count_) ++root;
    for (int a = 0; a < 3; ++a) {
      bins_[a] = a < cell_.periodic ? root : 1;
      margin_[a] = kSamePlace / cell.height[a];
    }
    stride_ = 1 + count_ * 5 / 8;
    while (greatest_common_divisor(stride_, count_) != 1) ++stride_;

    group.for_each(bins_[0] * bins_[1] * bins_[2], [&](std::int64_t n) { workspace.first_in_bin[n] = -1; });
    group.for_each(count_, [&](std::int64_t i) {
      const double* f = crystal.frac_coords + 3 * i;
      const Vec3 u = wrap_atom({f[0], f[1], f[2]}, crystal.cell, crystal.pbc, cell).coordinate;
      workspace.coordinate[i] = u;
      std::int32_t& first = workspace.first_in_bin[bin(slice(u.x, 0), slice(u.y, 1), slice(u.z, 2))];
      workspace.next_in_bin[i] = Group::exchange(first, static_cast<std::int32_t>(i));
    });
  }

  MGT_HOST_DEVICE Vec3 coordinate(std::int64_t i) const { return workspace_.coordinate[i]; }

  // Distance of two places in Å, whole cells along periodic directions left out.
  MGT_HOST_DEVICE double distance(Vec3 p, Vec3 q) const {
    Vec3 d = p - q;
    d = {cell_.periodic > 0 ? d.x - std::nearbyint(d.x) : d.x,
         cell_.periodic > 1 ? d.y - std::nearbyint(d.y) : d.y,
         cell_.periodic > 2 ? d.z - std::nearbyint(d.z) : d.z};
    return norm(combine(d, cell_.basis));
  }

  // The n-th atom. Atoms often come ordered by site: counted in strides, one that fails is met sooner.
  MGT_HOST_DEVICE std::int64_t atom(std::int64_t n) const { return n * stride_ % count_; }

  // Does the translation, in cells, map the atom onto one of its kind?
  MGT_HOST_DEVICE bool maps(std::int64_t atom, Vec3 translation) const {
    return find(coordinate(atom) + translation, numbers_[atom]) >= 0;
  }

  // An atom of this number at a place, -1 if there is none.
  MGT_HOST_DEVICE std::int64_t find(Vec3 place, std::int64_t number) const {
    const Range x = around(place.x, 0), y = around(place.y, 1), z = around(place.z, 2);
    for (std::int64_t i = x.first; i <= x.last; ++i) {
      for (std::int64_t j = y.first; j <= y.last; ++j) {
        for (std::int64_t k = z.first; k <= z.last; ++k) {
          std::int32_t other = workspace_.first_in_bin[bin(i, j, k)];
          for (; other >= 0; other = workspace_.next_in_bin[other]) {
            if (numbers_[other] == number && distance(place, coordinate(other)) <= kSamePlace) return other;
          }
        }
      }
    }
    return -1;
  }

 private:
  struct Range {
    std::int64_t first, last;
  };

  MGT_HOST_DEVICE std::int64_t slice(double coordinate, int a) const {
    return static_cast<std::int64_t>(std::floor(coordinate * static_cast<double>(bins_[a])));
  }
  // Slices within kSamePlace of a coordinate, none twice.
  MGT_HOST_DEVICE Range around(double coordinate, int a) const {
    const std::int64_t first = slice(coordinate - margin_[a], a), last = slice(coordinate + margin_[a], a);
    return {first, last < first + bins_[a] ? last : first + bins_[a] - 1};
  }
  MGT_HOST_DEVICE std::int64_t bin(std::int64_t x, std::int64_t y, std::int64_t z) const {
    const auto wrapped = [&](std::int64_t n, int a) { return (n % bins_[a] + bins_[a]) % bins_[a]; };
    return (wrapped(x, 0) * bins_[1] + wrapped(y, 1)) * bins_[2] + wrapped(z, 2);
  }

  const std::int64_t* numbers_;
  std::int64_t count_;
  const ReducedCell& cell_;
  PlaceWorkspace workspace_;
  std::int64_t bins_[3];  // slices of the cell along each direction
  double margin_[3];      // kSamePlace in coordinates
  std::int64_t stride_;
};

// The rarest element, and the greatest common divisor of all elements' numbers of atoms.
struct RarestElement {
  std::int64_t number, order;
};

template <class Group>
MGT_HOST_DEVICE RarestElement rarest_element(const Group& group, const CrystalView& crystal) {
  constexpr std::int64_t kNone = -0x7fffffffffffffff - 1;
  const std::int64_t* numbers = crystal.numbers;
  const std::int64_t count = crystal.num_atoms;
  RarestElement rarest{0, 0};
  std::int64_t fewest = count + 1;
  std::int64_t number =
      group.greatest(count, kNone, [&](std::int64_t i, std::int64_t) { return numbers[i]; });
  for (std::int64_t seen = 0; seen < count && rarest.order != 1;) {
    const std::int64_t atoms = group.count(count, [&](std::int64_t i) { return numbers[i] == number; });
    rarest.order = greatest_common_divisor(rarest.order, atoms);
    if (atoms < fewest) {
      fewest = atoms;
      rarest.number = number;
    }
    seen += atoms;
    const std::int64_t last = number;
    number = group.greatest(count, kNone, [&](std::int64_t i, std::int64_t best) {
      return numbers[i] < last ? numbers[i] : best;
    });
  }
  return rarest;
}

// The atom that the last translation tried did not map onto another, and where it looked for one. In a
// crystal with a defect the next one fails there as well: at this atom, or at the one it moves to this place.
struct Failure {
  std::int64_t atom;  // -1 if there was none
  Vec3 place;         // in cells

  MGT_HOST_DEVICE bool comes_again(const Places& places, const CrystalView& crystal, Vec3 translation) const {
    if (atom < 0) return false;
    if (!places.maps(atom, translation)) return true;
    const std::int64_t moved = places.find(place - translation, crystal.numbers[atom]);
    return moved >= 0 && !places.maps(moved, translation);
  }
};

// Add all translations that map the crystal onto itself. `fractions` and `failure` are the whole group's.
template <class Group>
MGT_HOST_DEVICE void find_translations(const Group& group, const CrystalView& crystal,
                                       const ReducedCell& cell, const PlaceWorkspace& workspace,
                                       const RarestElement& rarest, FractionLattice& fractions,
                                       Failure& failure) {
  const Places places(group, crystal, cell, workspace);
  const std::int64_t count = crystal.num_atoms;
  const std::int64_t origin =
      group.first(0, count, [&](std::int64_t i) { return crystal.numbers[i] == rarest.number; });
  const auto shift = [&](std::int64_t i) { return places.coordinate(i) - places.coordinate(origin); };
  // Could the translation from the first atom of the rarest element to the i-th be one, and a new one?
  const auto possible = [&](std::int64_t i) {
    if (crystal.numbers[i] != rarest.number) return false;
    const Fraction fraction = fractions.nearest(cell.periodic, shift(i));
    const Vec3 translation = fractions.in_cells(fraction);
    return places.distance(shift(i), translation) <= kSamePlace && !fractions.contains(fraction) &&
           places.maps(places.atom(1), translation) && !failure.comes_again(places, crystal, translation);
  };
  for (std::int64_t i = origin + 1; fractions.size() < rarest.order; ++i) {
    i = group.first(i, count, possible);
    if (i == count) break;
    const Fraction fraction = fractions.nearest(cell.periodic, shift(i));
    const Vec3 translation = fractions.in_cells(fraction);
    const auto fails = [&](std::int64_t n) { return !places.maps(places.atom(n), translation); };
    const std::int64_t n = group.first(0, count, fails);
    if (n < count) {
      group.for_each(1, [&](std::int64_t) {
        failure = {places.atom(n), places.coordinate(places.atom(n)) + translation};
      });
      continue;
    }
    group.for_each(1, [&](std::int64_t) { fractions.add(fraction); });
  }
}

// Shared by the threads of a group.
struct PrimitiveLattice {
  int periodic;
  Mat3 basis;                 // rows, Å; the first `periodic` are Minkowski-reduced
  FractionLattice fractions;  // its translations in units of the crystal's own reduced cell
  Failure failure;            // while they are searched
};

// The lattice of all translations, along periodic directions, that map the crystal onto itself, atom onto
// atom of the same number. `cell` is the crystal's own.
template <class Group>
MGT_HOST_DEVICE void primitive_lattice(const Group& group, const CrystalView& crystal,
                                       const ReducedCell& cell, const PlaceWorkspace& workspace,
                                       PrimitiveLattice& lattice) {
  const RarestElement rarest = rarest_element(group, crystal);
  FractionLattice& fractions = lattice.fractions;
  group.for_each(1, [&](std::int64_t) {
    fractions.reset(rarest.order);
    lattice.failure = {-1, {}};
  });
  if (rarest.order > 1 && cell.periodic > 0) {
    find_translations(group, crystal, cell, workspace, rarest, fractions, lattice.failure);
  }
  group.for_each(1, [&](std::int64_t) {
    lattice.periodic = cell.periodic;
    lattice.basis = cell.basis;
    if (fractions.size() == 1) return;
    Int3 ignored[3] = {};
    for (int a = 0; a < cell.periodic; ++a) {
      lattice.basis.row[a] = combine(fractions.in_cells(fractions.row(a)), cell.basis);
    }
    minkowski_reduce(lattice.periodic, lattice.basis, ignored);
  });
}

}  // namespace mgt
