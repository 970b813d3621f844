#include "lattice_frame.hpp"

#include <algorithm>
#include <memory>

#include "cell_reduction.hpp"
#include "frame_signature.hpp"
#include "lattice_bases.hpp"
#include "parallel.hpp"
#include "primitive_lattice.hpp"

// Wider vector units where the machine has them. Without contraction to fused multiply-adds every version
// rounds alike.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MGT_WIDE_VECTORS __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MGT_WIDE_VECTORS
#endif

namespace mgt {
namespace {

// Edges are worked on in blocks, each quantity in an array of its own, for the sake of vector units and
// caches.
constexpr std::int64_t kBlock = 1024;

struct EdgeBlock {
  double x[kBlock], y[kBlock], z[kBlock];  // r_ij, Å; then of length 1
  double weight[kBlock];                   // by elements; then by length as well
  double term[kBlock];
  std::int32_t target[kBlock];  // j, numbered through the crystal
};

MGT_WIDE_VECTORS void look_at_all(std::int64_t count, EdgeBlock& edges) {
  for (std::int64_t e = 0; e < count; ++e) {
    const EdgeLook edge = look_at({edges.x[e], edges.y[e], edges.z[e]});
    edges.x[e] = edge.unit.x;
    edges.y[e] = edge.unit.y;
    edges.z[e] = edge.unit.z;
    edges.weight[e] *= edge.weight;
  }
}

// The m-th profile of the cosines between edges and a vector of length 1.
MGT_WIDE_VECTORS void profile_all(std::int64_t count, const EdgeBlock& edges, Vec3 unit, int m, double* out) {
  for (std::int64_t e = 0; e < count; ++e) {
    out[e] = profile(m, dot(Vec3{edges.x[e], edges.y[e], edges.z[e]}, unit));
  }
}

MGT_WIDE_VECTORS void multiply_all(std::int64_t count, const double* a, const double* b, const double* c,
                                   const double* d, double* out) {
  for (std::int64_t e = 0; e < count; ++e) out[e] = a[e] * b[e] * c[e] * d[e];
}

// The signatures of one crystal's bases.
class Signatures {
 public:
  Signatures(const Motif& motif, std::int64_t first_atom, std::int64_t num_atoms, const LatticeBases& bases)
      : numbers_(motif.numbers + first_atom),
        target_(motif.target),
        edge_vec_(motif.edge_vec),
        row_ptr_(motif.row_ptr + first_atom),
        first_atom_(first_atom),
        num_atoms_(num_atoms),
        bases_(bases),
        block_size_(std::min(row_ptr_[num_atoms] - row_ptr_[0], kBlock)),
        edges_(new EdgeBlock) {
    int num_profiles = 0;
    for (int m = 0; m < 3; ++m) {
      std::fill_n(profile_of_[m], kVectors, -1);
      for (int n = 0; n < bases.count; ++n) {
        int& index = profile_of_[m][bases.basis[n].row[m]];
        if (index < 0) index = num_profiles++;
      }
    }
    profiles_.reset(new double[num_profiles * block_size_]);
  }

  std::vector<double> compute() {
    const std::int64_t first_edge = row_ptr_[0], last_edge = row_ptr_[num_atoms_];
    std::vector<double> once(num_atoms_ * bases_.count), twice(num_atoms_ * bases_.count);
    for (int round = 0; round < 2; ++round) {
      std::int64_t atom = 0;
      for (std::int64_t begin = first_edge; begin < last_edge; begin += kBlock) {
        const std::int64_t end = std::min(begin + kBlock, last_edge);
        while (row_ptr_[atom + 1] <= begin) ++atom;
        if (round == 0 || last_edge - first_edge > kBlock) load(atom, begin, end);
        for (int n = 0; n < bases_.count; ++n) {
          multiply_all(end - begin, edges_->weight, profile_of(n, 0), profile_of(n, 1), profile_of(n, 2),
                       edges_->term);
          const double* term = edges_->term;
          double* received = &once[n * num_atoms_];
          if (round == 0) {
            add(atom, begin, end, received, [&](std::int64_t e) { return term[e]; });
          } else {
            const double* sent = received;
            add(atom, begin, end, &twice[n * num_atoms_],
                [&](std::int64_t e) { return term[e] * sent[edges_->target[e]]; });
          }
        }
      }
    }
    std::vector<double> signature(bases_.count, 0.0);
    for (int n = 0; n < bases_.count; ++n) {
      const double* message = &twice[n * num_atoms_];
      for (std::int64_t i = 0; i < num_atoms_; ++i) signature[n] += message[i] * message[i];
    }
    return signature;
  }

 private:
  const double* profile_of(int n, int m) const {
    return profiles_.get() + profile_of_[m][bases_.basis[n].row[m]] * block_size_;
  }

  // Edges begin to end, the first of them an edge of `atom`.
  void load(std::int64_t atom, std::int64_t begin, std::int64_t end) {
    const std::int64_t count = end - begin;
    for (; atom < num_atoms_ && row_ptr_[atom] < end; ++atom) {
      const double start = start_weight(numbers_[atom]);
      const std::int64_t stop = std::min(row_ptr_[atom + 1], end);
      for (std::int64_t e = std::max(row_ptr_[atom], begin); e < stop; ++e) {
        const auto target = static_cast<std::int32_t>(target_[e] - first_atom_);
        edges_->x[e - begin] = edge_vec_[3 * e];
        edges_->y[e - begin] = edge_vec_[3 * e + 1];
        edges_->z[e - begin] = edge_vec_[3 * e + 2];
        edges_->weight[e - begin] = start * end_weight(numbers_[target]);
        edges_->target[e - begin] = target;
      }
    }
    look_at_all(count, *edges_);
    for (int m = 0; m < 3; ++m) {
      for (int v = 0; v < bases_.num_vectors; ++v) {
        const int index = profile_of_[m][v];
        if (index >= 0) {
          profile_all(count, *edges_, bases_.unit[v], m, profiles_.get() + index * block_size_);
        }
      }
    }
  }

  // Add the terms of edges begin to end to what their atoms received, edge by edge.
  template <class Term>
  void add(std::int64_t atom, std::int64_t begin, std::int64_t end, double* received,
           const Term& term) const {
    for (; atom < num_atoms_ && row_ptr_[atom] < end; ++atom) {
      const std::int64_t stop = std::min(row_ptr_[atom + 1], end);
      double sum = received[atom];
      for (std::int64_t e = std::max(row_ptr_[atom], begin); e < stop; ++e) sum += term(e - begin);
      received[atom] = sum;
    }
  }

  const std::int64_t* numbers_;
  const std::int64_t* target_;
  const double* edge_vec_;
  const std::int64_t* row_ptr_;
  const std::int64_t first_atom_, num_atoms_;
  const LatticeBases& bases_;
  const std::int64_t block_size_;
  std::unique_ptr<EdgeBlock> edges_;
  int profile_of_[3][kVectors];
  std::unique_ptr<double[]> profiles_;
};

Mat3 lattice_frame(const Crystals& crystals, std::int64_t b, const Motif& motif) {
  const OneThread group;
  const std::int64_t first = crystals.first_atom(b), num_atoms = crystals.num_atoms(b);
  const bool* pbc = crystals.pbc + 3 * b;
  const CrystalView crystal = {num_atoms, motif.numbers + first, crystals.frac_coords + 3 * first,
                               crystals.lattice(b), pbc};
  std::vector<Vec3> coordinates(num_atoms);
  std::vector<std::int32_t> bins(2 * num_atoms);
  PrimitiveLattice lattice;
  primitive_lattice(group, crystal, reduce_cell(crystals, b),
                    {coordinates.data(), bins.data(), bins.data() + num_atoms}, lattice);
  LatticeBases bases;
  preferred_bases(group, lattice, crystal.cell, pbc, bases);
  int best = 0;
  if (bases.count > 1) {
    const std::vector<double> signature = Signatures(motif, first, num_atoms, bases).compute();
    best = greatest_signature(signature.data(), bases.count);
  }
  const Basis& basis = bases.basis[best];
  return {{bases.vector[basis.row[0]], bases.vector[basis.row[1]], bases.vector[basis.row[2]]}};
}

}  // namespace

std::vector<Mat3> lattice_frames(const Crystals& crystals, const Motif& motif, int threads) {
  std::vector<Mat3> frames(crystals.count);
  for_each_crystal(crystals.count, threads,
                   [&](std::int64_t b) { frames[b] = lattice_frame(crystals, b, motif); });
  return frames;
}

}  // namespace mgt
