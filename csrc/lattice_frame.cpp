#include "lattice_frame.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "parallel.hpp"
#include "primitive_lattice.hpp"

namespace mgt {
namespace {

constexpr double kTie = 1e-4;            // cosines, and lengths in units of the shortest, that count as equal
constexpr double kSignatureTie = 1e-12;  // relative difference of signatures that counts as none

using Basis = std::array<int, 3>;  // rows of a frame, as indices into the list of vectors

struct Candidates {
  std::vector<Vec3> vectors;
  std::vector<Basis> bases;
};

// All right-handed bases of vectors as long as the rows of a Minkowski-reduced basis.
Candidates shortest_bases(const PrimitiveLattice& lattice, const Mat3& cell, const bool* pbc) {
  Candidates found;
  std::array<std::vector<int>, 3> slot;  // vectors that can stand in each row
  double length[3] = {};
  for (int a = 0; a < lattice.periodic; ++a) length[a] = norm(lattice.basis.row[a]);

  // Vectors of a reduced basis's lengths have coefficients of -1, 0, 1; one more allows for the tolerance.
  const int most[3] = {lattice.periodic > 0 ? 2 : 0, lattice.periodic > 1 ? 2 : 0,
                       lattice.periodic > 2 ? 2 : 0};
  for (int x = -most[0]; x <= most[0]; ++x) {
    for (int y = -most[1]; y <= most[1]; ++y) {
      for (int z = -most[2]; z <= most[2]; ++z) {
        const Vec3 vector = combine(Vec3{double(x), double(y), double(z)}, lattice.basis);
        const auto index = static_cast<int>(found.vectors.size());
        bool fits = false;
        for (int a = 0; a < lattice.periodic; ++a) {
          if (std::fabs(norm(vector) - length[a]) > kTie * length[0]) continue;
          slot[a].push_back(index);
          fits = true;
        }
        if (fits) found.vectors.push_back(vector);
      }
    }
  }
  for (int a = 0, row = lattice.periodic; a < 3; ++a) {
    if (pbc[a]) continue;
    slot[row++].push_back(static_cast<int>(found.vectors.size()));
    found.vectors.push_back(cell.row[a]);
  }
  // Three vectors of the lattice form a basis if they span its volume, and not two or more times as much.
  Mat3 reference = lattice.basis;
  for (int a = lattice.periodic; a < 3; ++a) reference.row[a] = found.vectors[slot[a][0]];
  const double volume = std::fabs(determinant(reference));
  for (const int i : slot[0]) {
    for (const int j : slot[1]) {
      for (const int k : slot[2]) {
        const double spanned = determinant({{found.vectors[i], found.vectors[j], found.vectors[k]}});
        // Without periodicity the cell is the frame, whichever hand it has.
        const bool is_basis = std::fabs(spanned) > 0.5 * volume && std::fabs(spanned) < 1.5 * volume;
        if (is_basis && (spanned > 0 || lattice.periodic == 0)) found.bases.push_back({i, j, k});
      }
    }
  }
  return found;
}

// Keep the bases whose rank is the greatest, within the tolerance.
template <class Rank>
void keep_greatest(std::vector<Basis>& bases, double tolerance, const Rank& rank) {
  std::vector<double> ranks;
  for (const Basis& basis : bases) ranks.push_back(rank(basis));
  const double least = *std::max_element(ranks.begin(), ranks.end()) - tolerance;
  std::size_t kept = 0;
  for (std::size_t n = 0; n < bases.size(); ++n) {
    if (ranks[n] >= least) bases[kept++] = bases[n];
  }
  bases.resize(kept);
}

// Keep the bases with the preferred angles. Bases that remain have equal lengths and angles, so the lattice
// has the rotations that take one into another.
void keep_preferred_angles(Candidates& found) {
  const auto cosine = [&](int i, int j) {
    const Vec3 u = found.vectors[i], v = found.vectors[j];
    return dot(u, v) / (norm(u) * norm(v));
  };
  keep_greatest(found.bases, kTie, [&](const Basis& l) {  // to L1, 90 degrees at most
    return std::min(0.0, cosine(l[0], l[1])) + std::min(0.0, cosine(l[0], l[2]));
  });
  keep_greatest(found.bases, kTie, [&](const Basis& l) {  // the most acute
    return cosine(l[0], l[1]) + cosine(l[0], l[2]) + cosine(l[1], l[2]);
  });
  keep_greatest(found.bases, kTie, [&](const Basis& l) { return cosine(l[0], l[1]); });
  keep_greatest(found.bases, kTie, [&](const Basis& l) { return cosine(l[0], l[2]); });
}

// Weights by element, without pattern and different for the two ends of an edge.
double start_weight(std::int64_t number) {
  return 0.5 + std::fmod(0.6180339887 * static_cast<double>(number), 1.0);
}
double end_weight(std::int64_t number) {
  return 0.5 + std::fmod(0.7548776662 * static_cast<double>(number), 1.0);
}

// A generic polynomial of the cosine to each L_m. Their product over m has no symmetry of its own.
double profile(int m, double c) {
  constexpr double kCoefficients[3][5] = {
      {1.0, 0.83, 0.47, 0.31, 0.19}, {1.0, -0.59, 0.71, -0.23, 0.37}, {1.0, 0.37, -0.53, 0.67, 0.29}};
  const double* k = kCoefficients[m];
  return k[0] + c * (k[1] + c * (k[2] + c * (k[3] + c * k[4])));
}

// How the crystal's edges look from each basis, as one number a basis: two rounds of messages between
// atoms, each weighted by the elements, the length of the edge and its angles to the basis, then the mean
// square over atoms. Equal for two bases if a symmetry of the crystal takes one into the other; messages, not
// a sum over edges alone, so that it matters which edges meet at an atom.
std::vector<double> signatures(const Crystals& crystals, std::int64_t b, const Motif& motif,
                               const Candidates& found) {
  constexpr double kDecay = 3.0;  // Å
  const std::int64_t first = crystals.first_atom(b), n_atoms = crystals.num_atoms(b);
  const std::size_t n_vectors = found.vectors.size(), n_bases = found.bases.size();
  std::vector<Vec3> unit;
  for (const Vec3& vector : found.vectors) unit.push_back((1.0 / norm(vector)) * vector);
  std::vector<double> profiles(3 * n_vectors), message(n_atoms * n_bases, 1.0), received(n_atoms * n_bases);
  for (int round = 0; round < 2; ++round) {
    std::fill(received.begin(), received.end(), 0.0);
    for (std::int64_t i = 0; i < n_atoms; ++i) {
      const double start = start_weight(motif.numbers[first + i]);
      double* sum = &received[i * n_bases];
      for (std::int64_t e = motif.row_ptr[first + i]; e < motif.row_ptr[first + i + 1]; ++e) {
        const Vec3 edge = {motif.edge_vec[3 * e], motif.edge_vec[3 * e + 1], motif.edge_vec[3 * e + 2]};
        const double length = norm(edge);
        const double weight = start * end_weight(motif.numbers[motif.target[e]]) * std::exp(-length / kDecay);
        for (std::size_t v = 0; v < n_vectors; ++v) {
          const double c = dot(edge, unit[v]) / length;
          for (int m = 0; m < 3; ++m) profiles[m * n_vectors + v] = profile(m, c);
        }
        const double* sent = &message[(motif.target[e] - first) * n_bases];
        for (std::size_t n = 0; n < n_bases; ++n) {
          const Basis& basis = found.bases[n];
          sum[n] += weight * sent[n] * profiles[basis[0]] * profiles[n_vectors + basis[1]] *
                    profiles[2 * n_vectors + basis[2]];
        }
      }
    }
    message.swap(received);
  }
  std::vector<double> signature(n_bases, 0.0);
  for (std::int64_t i = 0; i < n_atoms; ++i) {
    for (std::size_t n = 0; n < n_bases; ++n) {
      signature[n] += message[i * n_bases + n] * message[i * n_bases + n] / static_cast<double>(n_atoms);
    }
  }
  return signature;
}

Mat3 lattice_frame(const Crystals& crystals, std::int64_t b, const Motif& motif) {
  const PrimitiveLattice lattice = primitive_lattice(crystals, b, motif.numbers);
  Candidates found = shortest_bases(lattice, crystals.lattice(b), crystals.pbc + 3 * b);
  keep_preferred_angles(found);
  std::size_t best = 0;
  if (found.bases.size() > 1) {
    const std::vector<double> signature = signatures(crystals, b, motif, found);
    const double greatest = *std::max_element(signature.begin(), signature.end());
    while (signature[best] < (1.0 - kSignatureTie) * greatest) ++best;
  }
  const Basis& basis = found.bases[best];
  return {{found.vectors[basis[0]], found.vectors[basis[1]], found.vectors[basis[2]]}};
}

}  // namespace

std::vector<Mat3> lattice_frames(const Crystals& crystals, const Motif& motif, int threads) {
  std::vector<Mat3> frames(crystals.count);
  for_each_crystal(crystals.count, threads,
                   [&](std::int64_t b) { frames[b] = lattice_frame(crystals, b, motif); });
  return frames;
}

}  // namespace mgt
