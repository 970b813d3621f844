#include "lattice_frame.hpp"

#include <algorithm>

#include "buffer.hpp"
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
constexpr std::int64_t kEdgesABlock = 1024;

constexpr std::int64_t kCrystalsABlock = 4;  // handed to a thread at once

struct EdgeBlock {
  double x[kEdgesABlock], y[kEdgesABlock], z[kEdgesABlock];  // r_ij, Å; then of length 1
  double weight[kEdgesABlock];                               // by elements; then by length as well
  double term[kEdgesABlock];
  std::int32_t target[kEdgesABlock];  // j, numbered through the crystal
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

// Chooses frames, one crystal after the other, and uses its memory again.
class FrameChooser {
 public:
  FrameChooser(const Crystals& crystals, const Motif& motif) : crystals_(crystals), motif_(motif) {}

  Mat3 choose(std::int64_t b) {
    const OneThread group;
    first_atom_ = crystals_.first_atom(b);
    num_atoms_ = crystals_.num_atoms(b);
    numbers_ = motif_.numbers + first_atom_;
    row_ptr_ = motif_.row_ptr + first_atom_;
    const CrystalView crystal = {num_atoms_, numbers_, crystals_.frac_coords + 3 * first_atom_,
                                 crystals_.lattice(b), crystals_.pbc + 3 * b};
    coordinates_.resize(num_atoms_);
    bins_.resize(2 * num_atoms_);
    primitive_lattice(group, crystal, reduce_cell(crystals_, b),
                      {coordinates_.data(), bins_.data(), bins_.data() + num_atoms_}, lattice_);
    preferred_bases(group, lattice_, crystal.cell, crystal.pbc, bases_);
    const int* row = bases_.basis[bases_.count > 1 ? best_basis() : 0].row;
    return {{bases_.vector[row[0]], bases_.vector[row[1]], bases_.vector[row[2]]}};
  }

 private:
  // The basis with the greatest signature, see frame_signature.hpp.
  int best_basis() {
    choose_profiles();
    edges_.resize(1);
    ends_.resize(num_atoms_);
    for (std::int64_t i = 0; i < num_atoms_; ++i) ends_[i] = end_weight(numbers_[i]);
    for (Buffer<double>* message : {&once_, &twice_}) {
      message->resize(num_atoms_ * bases_.count);
      std::fill(message->begin(), message->end(), 0.0);
    }
    const std::int64_t first_edge = row_ptr_[0], last_edge = row_ptr_[num_atoms_];
    for (int round = 0; round < 2; ++round) {
      std::int64_t atom = 0;
      for (std::int64_t begin = first_edge; begin < last_edge; begin += kEdgesABlock) {
        const std::int64_t end = std::min(begin + kEdgesABlock, last_edge);
        while (row_ptr_[atom + 1] <= begin) ++atom;
        if (round == 0 || last_edge - first_edge > kEdgesABlock) load(atom, begin, end);
        for (int n = 0; n < bases_.count; ++n) {
          EdgeBlock& edges = edges_[0];
          multiply_all(end - begin, edges.weight, profile_of(n, 0), profile_of(n, 1), profile_of(n, 2),
                       edges.term);
          double* once = &once_[n * num_atoms_];
          if (round == 0) {
            add(atom, begin, end, once, [&](std::int64_t e) { return edges.term[e]; });
          } else {
            add(atom, begin, end, &twice_[n * num_atoms_],
                [&](std::int64_t e) { return edges.term[e] * once[edges.target[e]]; });
          }
        }
      }
    }
    double signature[kMaxBases] = {};
    for (int n = 0; n < bases_.count; ++n) {
      const double* message = &twice_[n * num_atoms_];
      for (std::int64_t i = 0; i < num_atoms_; ++i) signature[n] += message[i] * message[i];
    }
    return greatest_signature(signature, bases_.count);
  }

  // Which profiles of which vectors the bases need.
  void choose_profiles() {
    std::size_t count = 0;
    for (int m = 0; m < 3; ++m) {
      std::fill_n(profile_index_[m], kVectors, -1);
      for (int n = 0; n < bases_.count; ++n) {
        int& index = profile_index_[m][bases_.basis[n].row[m]];
        if (index < 0) index = static_cast<int>(count++);
      }
    }
    profiles_.resize(count * kEdgesABlock);
  }
  const double* profile_of(int n, int m) const {
    return profiles_.data() + profile_index_[m][bases_.basis[n].row[m]] * kEdgesABlock;
  }

  // Call visit(i, k, stop) for the atoms that edges begin to end start from, the first of them `atom`: the
  // edges of i are k to stop, counted from the first one of all.
  template <class Visit>
  void for_each_row(std::int64_t atom, std::int64_t begin, std::int64_t end, const Visit& visit) const {
    for (; atom < num_atoms_ && row_ptr_[atom] < end; ++atom) {
      visit(atom, std::max(row_ptr_[atom], begin) - begin, std::min(row_ptr_[atom + 1], end) - begin);
    }
  }

  void load(std::int64_t atom, std::int64_t begin, std::int64_t end) {
    EdgeBlock& edges = edges_[0];
    for_each_row(atom, begin, end, [&](std::int64_t i, std::int64_t k, std::int64_t stop) {
      const double start = start_weight(numbers_[i]);
      for (; k < stop; ++k) {
        const double* vector = motif_.edge_vec + 3 * (begin + k);
        const auto target = static_cast<std::int32_t>(motif_.target[begin + k] - first_atom_);
        edges.x[k] = vector[0];
        edges.y[k] = vector[1];
        edges.z[k] = vector[2];
        edges.weight[k] = start * ends_[target];
        edges.target[k] = target;
      }
    });
    look_at_all(end - begin, edges);
    for (int m = 0; m < 3; ++m) {
      for (int v = 0; v < bases_.num_vectors; ++v) {
        const int index = profile_index_[m][v];
        if (index >= 0) profile_all(end - begin, edges, bases_.unit[v], m, &profiles_[index * kEdgesABlock]);
      }
    }
  }

  // Add the terms of edges begin to end to what their atoms received, edge by edge.
  template <class Term>
  void add(std::int64_t atom, std::int64_t begin, std::int64_t end, double* received,
           const Term& term) const {
    for_each_row(atom, begin, end, [&](std::int64_t i, std::int64_t k, std::int64_t stop) {
      double sum = received[i];
      for (; k < stop; ++k) sum += term(k);
      received[i] = sum;
    });
  }

  const Crystals& crystals_;
  const Motif& motif_;
  // The crystal at work.
  std::int64_t first_atom_ = 0, num_atoms_ = 0;
  const std::int64_t* numbers_ = nullptr;
  const std::int64_t* row_ptr_ = nullptr;
  PrimitiveLattice lattice_;
  LatticeBases bases_;
  int profile_index_[3][kVectors];  // of the m-th profile of a vector, -1 for those not needed
  Buffer<Vec3> coordinates_;
  Buffer<std::int32_t> bins_;
  Buffer<EdgeBlock> edges_;
  Buffer<double> ends_, profiles_, once_, twice_;  // by atom; by edge of the block; by basis and atom
};

}  // namespace

std::vector<Mat3> lattice_frames(const Crystals& crystals, const Motif& motif, int threads) {
  std::vector<Mat3> frames(crystals.count);
  std::vector<FrameChooser> choosers;
  for (int worker = 0; worker < worker_count(threads); ++worker) choosers.emplace_back(crystals, motif);
  for_each_block(crystals.count, kCrystalsABlock, threads,
                 [&](int worker, std::int64_t begin, std::int64_t end) {
                   for (std::int64_t b = begin; b < end; ++b) frames[b] = choosers[worker].choose(b);
                 });
  return frames;
}

}  // namespace mgt
