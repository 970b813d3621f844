// The search for the neighbours of an atom among the images of a crystal's atoms round it.
//
// All images of atoms that lie within the radius of the box round the crystal's atoms stand in a list, in
// order of their codes, in single precision. Of a small crystal the whole list is looked through for each
// atom, many images at a time, and neighbours come out in order. Of a large one the list is sorted into
// columns of bins, and only the columns near an atom are looked through.
//
// Single precision only finds candidates: its error has a proven bound, and within that bound edge_vector and
// squared_length decide.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "cell_reduction.hpp"
#include "vector_kernels.hpp"

namespace mgt {

class NeighborSearch {
 public:
  // Turn to a crystal; memory is used again from crystal to crystal. Tables are put into `arena`.
  void enter(const ReducedCell& cell, const WrappedAtoms& atoms, Arena& arena);

  // Prepare to find images of atoms up to `radius`, Å, from an atom. False if there are too many of them to
  // number.
  bool prepare(double radius, Arena& arena);

  const EdgeTables& tables() const { return tables_; }

  // Bound on the error of squared distances up to the squared radius in single precision, Å^2.
  float error() const { return error_; }

  // Most candidates that `select` can find for one atom.
  std::int64_t capacity() const { return capacity_; }

  // Candidates of atom i within `bounds`, not in order; see SelectKernel. Safe to call from many threads.
  std::int64_t select(std::uint32_t i, const Bounds& bounds, std::uint32_t* codes, float* squared,
                      std::int64_t& unsure) const;

  // Whether `select` finds codes in ascending order.
  bool in_order() const { return !binned_; }

  double squared_distance(std::uint32_t i, std::uint32_t code) const {
    const auto vec3 = [](const Vec4& v) { return Vec3{v.x, v.y, v.z}; };
    return squared_length(edge_vector(vec3(tables_.position[i]), vec3(tables_.position[tables_.atom(code)]),
                                      vec3(tables_.translation[tables_.image(code)])));
  }

 private:
  // Points as structure of arrays.
  struct PointBuffer {
    Buffer<float> x, y, z;
    Buffer<std::uint32_t> code;
    void resize(std::size_t count);
    Points view() const { return {x.data(), y.data(), z.data(), code.data()}; }
    NewPoints at(std::int64_t k) { return {x.data() + k, y.data() + k, z.data() + k, code.data() + k}; }
  };

  void find_images(Arena& arena);
  void list_points();
  void sort_into_bins();
  std::int32_t bin_of(int axis, float coordinate) const;

  EdgeTables tables_;
  std::size_t n_atoms_;
  double volume_per_atom_;  // Å^3
  ReducedCell cell_;
  Vec3 extent_;          // differences between coordinates along the basis are at most so large
  Vec3 middle_, width_;  // of the box round the atoms, Å
  double radius_;        // with room for rounding, Å
  float error_;
  Buffer<float> image_x_, image_y_, image_z_;  // translations, Å
  PointBuffer points_;
  std::int64_t count_, capacity_;

  bool binned_;
  PointBuffer binned_points_;
  std::int32_t bins_[3];
  float low_[3], bin_width_[3], per_length_[3];  // bin = (coordinate - low) * per_length; Å
  Buffer<std::int64_t> start_;                   // first point of each bin, and their number at the end
  Buffer<std::uint32_t> bin_;
};

// Bring codes into ascending order.
void sort_codes(std::uint32_t* codes, std::int64_t count);

}  // namespace mgt
