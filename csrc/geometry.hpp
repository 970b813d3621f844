// Vectors and 3 x 3 lattices: small functions for host and device, lengths in Å.
#pragma once

#include "host_device.hpp"

namespace mgt {

struct Vec3 {
  double x, y, z;
};

MGT_HOST_DEVICE inline Vec3 operator+(Vec3 a, Vec3 b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
MGT_HOST_DEVICE inline Vec3 operator-(Vec3 a, Vec3 b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
MGT_HOST_DEVICE inline Vec3 operator-(Vec3 a) { return {-a.x, -a.y, -a.z}; }
MGT_HOST_DEVICE inline Vec3 operator*(double s, Vec3 a) { return {s * a.x, s * a.y, s * a.z}; }
MGT_HOST_DEVICE inline double dot(Vec3 a, Vec3 b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
MGT_HOST_DEVICE inline Vec3 cross(Vec3 a, Vec3 b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
MGT_HOST_DEVICE inline double norm(Vec3 a) { return std::sqrt(dot(a, a)); }

// Three vectors as rows; row 0 is the first.
struct Mat3 {
  Vec3 row[3];
};

MGT_HOST_DEVICE inline double determinant(const Mat3& m) { return dot(m.row[0], cross(m.row[1], m.row[2])); }

// s · m: the vector with coefficients s along the rows. Negating s negates every bit of the result but
// the sign of zero, which keeps an edge and its reverse exactly opposite.
MGT_HOST_DEVICE inline Vec3 combine(Vec3 s, const Mat3& m) {
  return s.x * m.row[0] + s.y * m.row[1] + s.z * m.row[2];
}

// The inverse, stored so that combine(v, inverse(m)) gives the coefficients of v along the rows of m.
MGT_HOST_DEVICE inline Mat3 inverse(const Mat3& m) {
  const double scale = 1.0 / determinant(m);
  const Vec3 a = scale * cross(m.row[1], m.row[2]);
  const Vec3 b = scale * cross(m.row[2], m.row[0]);
  const Vec3 c = scale * cross(m.row[0], m.row[1]);
  return {{{a.x, b.x, c.x}, {a.y, b.y, c.y}, {a.z, b.z, c.z}}};
}

// A lattice translation in units of some three lattice vectors.
struct Int3 {
  std::int32_t x, y, z;
};

MGT_HOST_DEVICE inline Int3 operator+(Int3 a, Int3 b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
MGT_HOST_DEVICE inline Int3 operator-(Int3 a, Int3 b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
MGT_HOST_DEVICE inline bool operator==(Int3 a, Int3 b) { return a.x == b.x && a.y == b.y && a.z == b.z; }
// Lexicographic order, the order of edges between the same two atoms.
MGT_HOST_DEVICE inline bool operator<(Int3 a, Int3 b) {
  return a.x != b.x ? a.x < b.x : a.y != b.y ? a.y < b.y : a.z < b.z;
}
// sum of s[a] times row a; partial sums may need more bits than the result.
MGT_HOST_DEVICE inline Int3 combine(Int3 s, const Int3 (&rows)[3]) {
  const std::int64_t a = s.x, b = s.y, c = s.z;
  return {static_cast<std::int32_t>(a * rows[0].x + b * rows[1].x + c * rows[2].x),
          static_cast<std::int32_t>(a * rows[0].y + b * rows[1].y + c * rows[2].y),
          static_cast<std::int32_t>(a * rows[0].z + b * rows[1].z + c * rows[2].z)};
}

// The one arithmetic that decides whether two atoms are neighbours, on host and device, compiled without
// contraction to fused multiply-adds. Lists and their order are then the same everywhere, and an edge and its
// reverse have exactly opposite vectors, so that both pass or fail any test of length.
MGT_HOST_DEVICE inline Vec3 translation(Int3 s, const Mat3& basis) {
  return combine(Vec3{double(s.x), double(s.y), double(s.z)}, basis);
}
// From x_i to the image of x_j moved by a translation.
MGT_HOST_DEVICE inline Vec3 edge_vector(Vec3 x_i, Vec3 x_j, Vec3 translation) {
  return (x_j - x_i) + translation;
}
MGT_HOST_DEVICE inline double squared_length(Vec3 v) { return dot(v, v); }

}  // namespace mgt
