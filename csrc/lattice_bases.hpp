// The bases of a lattice that could be the frame: those with the shortest vectors and the preferred angles.
#pragma once

#include "primitive_lattice.hpp"

namespace mgt {

// Cosines, and lengths in units of the shortest, that differ by no more count as equal.
constexpr double kTie = 1e-4;

// Vectors with coefficients of -1, 0, 1 along a reduced basis: no basis as short has others.
constexpr int kVectors = 27;

// No lattice has more rotations.
constexpr int kMaxBases = 24;

// Three vectors, as indices.
struct Basis {
  int row[3];
};

// Shared by the threads of a group.
struct LatticeBases {
  Mat3 reference;                       // the reduced basis, completed by the cell's vectors, Å
  double length[3];                     // of its rows
  unsigned rows[kVectors];              // by coefficients: bit a is set if the vector can stand in row a
  int num_vectors;                      // those that can stand anywhere, in the order of their coefficients:
  Int3 coefficients[kVectors];          // along the reduced basis
  Vec3 vector[kVectors];                // Å
  Vec3 unit[kVectors];                  // the same of length 1
  double cosine[kVectors * kVectors];   // between vectors i and j, at i * num_vectors + j
  int slot[3][kVectors], slot_size[3];  // vectors that can stand in each row
  std::int32_t found[kMaxBases];        // bases in the order they were found in
  std::int32_t count;                   // above kMaxBases the rest is not stored
  Basis basis[kMaxBases];               // in the order of their vectors
};

MGT_HOST_DEVICE inline int determinant(Int3 a, Int3 b, Int3 c) {
  return a.x * (b.y * c.z - b.z * c.y) + a.y * (b.z * c.x - b.x * c.z) + a.z * (b.x * c.y - b.y * c.x);
}

// Cosines between the vectors of a basis. The greater a rank the better; each decides where those before tie.
// No rank falls when a cosine grows.
struct Angles {
  double cos_01, cos_02, cos_12;

  MGT_HOST_DEVICE double rank(int n) const {
    if (n == 0) return (cos_01 < 0 ? cos_01 : 0) + (cos_02 < 0 ? cos_02 : 0);  // to L1, 90 degrees at most
    if (n == 1) return cos_01 + cos_02 + cos_12;                               // the most acute
    return n == 2 ? cos_01 : cos_02;
  }
};
constexpr int kRanks = 4;

// Find all right-handed bases of vectors as long as the rows of the reference that have the preferred angles:
// their number, and indices of as many of them as there is room for.
template <class Group>
MGT_HOST_DEVICE void find_bases(const Group& group, int periodic, double tie, LatticeBases& bases) {
  const auto combination = [](int v) { return Int3{v / 9 - 1, v / 3 % 3 - 1, v % 3 - 1}; };
  group.for_each(kVectors, [&](std::int64_t v) {
    const Int3 c = combination(static_cast<int>(v));
    const double its = norm(translation(c, bases.reference));
    unsigned rows = 0;
    for (int a = 0; a < 3; ++a) {
      const bool inside = (periodic > 2 || c.z == 0) && (periodic > 1 || c.y == 0);
      const bool fits = a < periodic ? inside && std::fabs(its - bases.length[a]) <= tie * bases.length[0]
                                     : c == Int3{a == 0, a == 1, a == 2};
      if (fits) rows |= 1u << a;
    }
    bases.rows[v] = rows;
  });
  // Vectors that precede v in some row.
  const auto before = [&](int v, unsigned rows) {
    int count = 0;
    for (int other = 0; other < v; ++other) count += (bases.rows[other] & rows) != 0;
    return count;
  };
  group.for_each(kVectors, [&](std::int64_t n) {
    const int v = static_cast<int>(n);
    if (n == 0) {
      bases.count = 0;
      bases.num_vectors = before(kVectors, 7);
      for (int a = 0; a < 3; ++a) bases.slot_size[a] = before(kVectors, 1u << a);
    }
    if (bases.rows[v] == 0) return;
    const int index = before(v, 7);
    bases.coefficients[index] = combination(v);
    bases.vector[index] = translation(combination(v), bases.reference);
    bases.unit[index] = (1 / norm(bases.vector[index])) * bases.vector[index];
    for (int a = 0; a < 3; ++a) {
      if (bases.rows[v] >> a & 1) bases.slot[a][before(v, 1u << a)] = index;
    }
  });
  const int num_vectors = bases.num_vectors;
  group.for_each(num_vectors, [&](std::int64_t i) {
    for (int j = 0; j < num_vectors; ++j) {
      bases.cosine[i * num_vectors + j] = dot(bases.unit[i], bases.unit[j]);
    }
  });

  // Three vectors of the lattice form a basis if they span its volume, and not two or more times as much.
  // Without periodicity the cell is the frame, whichever hand it has.
  const int hand = periodic == 0 || mgt::determinant(bases.reference) > 0 ? 1 : -1;
  const int sizes[3] = {bases.slot_size[0], bases.slot_size[1], bases.slot_size[2]};
  const std::int64_t pairs = static_cast<std::int64_t>(sizes[0]) * sizes[1];
  double least[kRanks];
  const auto preferred = [&](const Angles& angles, int ranks) {
    for (int r = 0; r < ranks; ++r) {
      if (angles.rank(r) < least[r]) return false;
    }
    return true;
  };
  // Call visit(index, angles) for the bases, with the n-th pair of first vectors, that pass the test. The
  // test sees the pair alone first, with the best angles its bases could have.
  const auto visit_bases = [&](std::int64_t n, const auto& test, const auto& visit) {
    const int pair = static_cast<int>(n), i = bases.slot[0][pair / sizes[1]],
              j = bases.slot[1][pair % sizes[1]];
    const double* cos_i = bases.cosine + i * num_vectors;
    const double* cos_j = bases.cosine + j * num_vectors;
    if (!test(Angles{cos_i[j], 1, 1})) return;
    const Int3* c = bases.coefficients;
    for (int m = 0; m < sizes[2]; ++m) {
      const int k = bases.slot[2][m];
      const Angles angles{cos_i[j], cos_i[k], cos_j[k]};
      if (test(angles) && determinant(c[i], c[j], c[k]) == hand) visit(pair * sizes[2] + m, angles);
    }
  };
  for (int rank = 0; rank < kRanks; ++rank) {
    constexpr double kNone = -10;  // below any rank
    const double greatest = group.greatest(pairs, kNone, [&](std::int64_t n, double best) {
      visit_bases(
          n, [&](const Angles& angles) { return angles.rank(rank) > best && preferred(angles, rank); },
          [&](std::int32_t, const Angles& angles) { best = angles.rank(rank); });
      return best;
    });
    least[rank] = greatest - tie;
  }
  group.for_each(pairs, [&](std::int64_t n) {
    visit_bases(
        n, [&](const Angles& angles) { return preferred(angles, kRanks); },
        [&](std::int32_t index, const Angles&) {
          const std::int32_t place = Group::increment(bases.count);
          if (place < kMaxBases) bases.found[place] = index;
        });
  });
}

// The bases of the lattice, completed by the cell's vectors where it is not periodic, that could be the
// frame. They have equal lengths and angles, so the lattice has the rotations that take one into another.
template <class Group>
MGT_HOST_DEVICE void preferred_bases(const Group& group, const PrimitiveLattice& lattice, const Mat3& cell,
                                     const bool* pbc, LatticeBases& bases) {
  group.for_each(1, [&](std::int64_t) {
    bases.reference = lattice.basis;
    for (int a = 0, row = lattice.periodic; a < 3; ++a) {
      if (!pbc[a]) bases.reference.row[row++] = cell.row[a];
    }
    for (int a = 0; a < 3; ++a) bases.length[a] = norm(bases.reference.row[a]);
  });
  // In cells thousands of times longer than thick the tolerance covers whole lattice vectors, and bases tie
  // that no rotation relates. It shrinks until it tells them apart.
  double tie = kTie;
  do {
    find_bases(group, lattice.periodic, tie, bases);
    tie *= 0.1;
  } while (bases.count > kMaxBases);

  const int sizes[3] = {bases.slot_size[0], bases.slot_size[1], bases.slot_size[2]};
  group.for_each(bases.count, [&](std::int64_t n) {  // sorted: each counts those before it
    const std::int32_t index = bases.found[n];
    int place = 0;
    for (int other = 0; other < bases.count; ++other) place += bases.found[other] < index;
    const int pair = index / sizes[2];
    bases.basis[place] = {
        {bases.slot[0][pair / sizes[1]], bases.slot[1][pair % sizes[1]], bases.slot[2][index % sizes[2]]}};
  });
}

}  // namespace mgt
