// The inner loops of the neighbour search, in one version for each vector unit; which one runs is chosen at
// run time, so that a wheel built on one machine runs on any other. All versions have the same result.
#pragma once

#include <cstdint>

#include "geometry.hpp"

namespace mgt {

constexpr std::int64_t kVector = 16;   // single-precision numbers in the widest register
constexpr std::int64_t kRanked = 192;  // up to so many keys are put in order by RankKernel

// A vector that fills a register of the machine.
struct alignas(32) Vec4 {
  double x, y, z, unused;
};
struct alignas(16) Int4 {
  std::int32_t x, y, z, unused;
};

// What the edges of one crystal are made from. An edge is known by its starting atom and the code of what it
// points to, atom << image_bits | image. Images are numbered in lexicographic order of their shift, so that
// edges in ascending order of codes are sorted by (j, S).
struct EdgeTables {
  const Vec4* position;     // (atoms) inside the reduced cell, Å
  const Int4* wrap;         // (atoms) position = (frac + wrap) · given cell
  const Vec4* translation;  // (images) Å
  const Int4* shift;        // (images) the same, in the given cell
  std::uint32_t image_bits;
  std::uint32_t home;  // the image that is the crystal itself; beyond it stand the opposites of those before

  std::uint32_t atom(std::uint32_t code) const { return code >> image_bits; }
  std::uint32_t image(std::uint32_t code) const { return code & ((1u << image_bits) - 1); }
  std::uint32_t code(std::uint32_t atom, std::uint32_t image) const { return atom << image_bits | image; }
  std::uint32_t self(std::uint32_t i) const { return code(i, home); }
  std::uint32_t images() const { return 2 * home + 1; }
  // The reverse of an edge from atom i.
  std::uint32_t reverse(std::uint32_t i, std::uint32_t edge) const { return code(i, 2 * home - image(edge)); }
};

// Atoms and images of atoms round a crystal, single precision, Å from the middle of the crystal. Arrays may
// be read a vector beyond their end.
struct Points {
  const float *x, *y, *z;
  const std::uint32_t* code;
};

// Where new points are written.
struct NewPoints {
  float *x, *y, *z;
  std::uint32_t* code;
};

// Of the images of an atom, write those within sqrt(reach) of the box |x| <= half, with codes from `code` on;
// return how many there are. Room for kVector more than that is needed.
using ListKernel = std::int64_t (*)(const Points& translations, std::int64_t images, const float* atom,
                                    const float* half, float reach, std::uint32_t code,
                                    const NewPoints& points);

// Squared distances, Å^2: points with near < d^2 <= far are candidates; outside near < d^2 <= sure single
// precision cannot tell.
struct Bounds {
  float near, sure, far;
};

// Of points begin to end, write the codes of the candidates round `centre`, in order, and where `squared` is
// not null their squared distances; return how many there are. Room for kVector more than that is needed.
// Adds to `unsure` the number of points with d^2 <= far that are not sure.
using SelectKernel = std::int64_t (*)(const Points& points, std::int64_t begin, std::int64_t end,
                                      const float* centre, const Bounds& bounds, std::uint32_t* codes,
                                      float* squared, std::int64_t& unsure);

// Edges in the form they are returned, see NeighborList.
struct EdgeArrays {
  std::int64_t *source, *target;
  Vec3* vector;
  Int3* shift;
};

// Write the edges of atom i with the given codes from edge `first_edge` on; atoms are counted from
// `first_atom`.
using WriteKernel = void (*)(const EdgeTables& tables, std::uint32_t i, const std::uint32_t* codes,
                             std::int64_t count, std::int64_t first_atom, std::int64_t first_edge,
                             const EdgeArrays& edges);

// Write to rank[k] how many of the keys are less than keys[k]. A vector more may be read and written.
using RankKernel = void (*)(const std::uint32_t* keys, std::int64_t count, std::uint32_t* rank);

struct VectorKernels {
  const char* name;
  ListKernel list;
  SelectKernel select;
  WriteKernel write;
  RankKernel rank;
};

// The kernels in use: at first the widest that the machine has.
const VectorKernels& vector_kernels();

// Use the kernels called "portable", "avx2" or "avx512" from now on; false if the machine cannot run them.
bool use_vector_kernels(const char* name);

}  // namespace mgt
