// Two ways to find the neighbours of an atom; both call
//   visit(j, S, r_ij, |r_ij|^2)
// for every neighbour with |r_ij|^2 <= max(limit[i], limit[j]), the atom itself (S = 0) left out. Vectors and
// squared lengths are those of edge_vector and squared_length.
#pragma once

#include <cstdint>
#include <vector>

#include "cell_reduction.hpp"

// Wider vector units where the machine has them. Without contraction to fused multiply-adds every version
// rounds alike.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MGT_WIDE_VECTORS __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MGT_WIDE_VECTORS
#endif

namespace mgt {

// squared_length(edge_vector(centre, x, offset)) for `count` points x given as structure of arrays.
void squared_distances(std::int64_t count, const double* x, const double* y, const double* z, Vec3 centre,
                       Vec3 offset, double* out);

// Points as structure of arrays, the form squared_distances takes.
struct Points {
  std::vector<double> x, y, z;
  void push_back(Vec3 p) {
    x.push_back(p.x);
    y.push_back(p.y);
    z.push_back(p.z);
  }
  Vec3 operator[](std::size_t k) const { return {x[k], y[k], z[k]}; }
};

// For small cells: every pair of atoms against a list of lattice translations, the inner loop running over
// the translations. These are kept in the order of S, so neighbours come out sorted by (j, S).
class ImageSearch {
 public:
  static constexpr bool kSorted = true;
  ImageSearch(const ReducedCell& cell, const WrappedAtoms& atoms, double radius);

  template <class Visit>
  void neighbors(std::int64_t i, const double* limit, const Visit& visit) {
    const auto count = static_cast<std::int64_t>(shifts_.size());
    const auto n_atoms = static_cast<std::int64_t>(atoms_.position.size());
    for (std::int64_t j = 0; j < n_atoms; ++j) {
      // As offset stands the vector between the atoms: addition commutes.
      const Vec3 vector = atoms_.position[j] - atoms_.position[i];
      squared_distances(count, images_.x.data(), images_.y.data(), images_.z.data(), {0, 0, 0}, vector,
                        squared_.data());
      const double reach = limit[i] > limit[j] ? limit[i] : limit[j];
      std::int64_t hits = 0;
      for (std::int64_t m = 0; m < count; ++m) {
        hits_[hits] = static_cast<std::int32_t>(m);
        hits += squared_[m] <= reach;
      }
      for (std::int64_t h = 0; h < hits; ++h) {
        const std::int32_t m = hits_[h];
        if (i == j && squared_[m] == 0) continue;
        visit(j, shifts_[m] + atoms_.wrap[j] - atoms_.wrap[i],
              edge_vector(atoms_.position[i], atoms_.position[j], images_[m]), squared_[m]);
      }
    }
  }

 private:
  const ReducedCell& cell_;
  const WrappedAtoms& atoms_;
  Points images_;             // translations, Å
  std::vector<Int3> shifts_;  // the same in the given cell
  std::vector<double> squared_;
  std::vector<std::int32_t> hits_;
};

// For large cells: atoms sorted into bins; only bins within the radius are looked at. The order of
// neighbours is that of the bins.
class BinSearch {
 public:
  static constexpr bool kSorted = false;
  BinSearch(const ReducedCell& cell, const WrappedAtoms& atoms, double radius);

  template <class Visit>
  void neighbors(std::int64_t i, const double* limit, const Visit& visit) {
    const Vec3 centre = atoms_.position[i];
    const Int3 home = bin_of(centre);
    for (std::int32_t a = home.x - reach_[0]; a <= home.x + reach_[0]; ++a) {
      for (std::int32_t b = home.y - reach_[1]; b <= home.y + reach_[1]; ++b) {
        for (std::int32_t c = home.z - reach_[2]; c <= home.z + reach_[2]; ++c) {
          Int3 bin{a, b, c}, image;
          if (!wrap(bin, image)) continue;
          const std::int64_t index = flat(bin), begin = start_[index], count = start_[index + 1] - begin;
          const Vec3 offset = translation(image, cell_.basis);
          squared_distances(count, points_.x.data() + begin, points_.y.data() + begin,
                            points_.z.data() + begin, centre, offset, squared_.data());
          for (std::int64_t m = 0; m < count; ++m) {
            const std::int64_t j = atom_[begin + m];
            if (squared_[m] > (limit[i] > limit[j] ? limit[i] : limit[j])) continue;
            if (i == j && squared_[m] == 0) continue;
            const Int3 shift = combine(image, cell_.to_given) + atoms_.wrap[j] - atoms_.wrap[i];
            visit(j, shift, edge_vector(centre, points_[begin + m], offset), squared_[m]);
          }
        }
      }
    }
  }

 private:
  Int3 bin_of(Vec3 position) const;
  // Bring a bin back into the grid by lattice translations; false if it lies outside along an open axis.
  bool wrap(Int3& bin, Int3& image) const;
  std::int64_t flat(Int3 bin) const { return (std::int64_t{bin.x} * bins_[1] + bin.y) * bins_[2] + bin.z; }

  const ReducedCell& cell_;
  const WrappedAtoms& atoms_;
  double low_[3], scale_[3];  // bin = floor((coordinate - low) * scale)
  std::int32_t bins_[3], reach_[3];
  std::vector<std::int64_t> start_, atom_;
  Points points_;
  std::vector<double> squared_;
};

}  // namespace mgt
