#include "comformer.hpp"

#include <algorithm>
#include <cmath>

#include "parallel.hpp"

namespace mgt {
namespace {

constexpr double kIgnoreBelow = 0.15;     // Å
constexpr double kFrameMargin = 0.01;     // Å
constexpr double kCandidateWidth = 1e-3;  // relative; covers the rounding of the cell
constexpr double kMaxFrameImages = 4e6;

// s · m as a chain of fused multiply-adds, the way the published program's linear algebra rounds.
Vec3 fused_combine(Vec3 s, const Mat3& m) {
  const auto component = [&](double a, double b, double c) {
    return std::fma(s.z, c, std::fma(s.y, b, s.x * a));
  };
  return {component(m.row[0].x, m.row[1].x, m.row[2].x), component(m.row[0].y, m.row[1].y, m.row[2].y),
          component(m.row[0].z, m.row[1].z, m.row[2].z)};
}

Mat3 rounded(const Mat3& cell) {
  const auto five_decimals = [](double x) { return std::nearbyint(x * 1e5) / 1e5; };
  Mat3 result;
  for (int a = 0; a < 3; ++a) {
    const Vec3 row = cell.row[a];
    result.row[a] = {five_decimals(row.x), five_decimals(row.y), five_decimals(row.z)};
  }
  return result;
}

Vec3 to_double(Int3 s) { return {double(s.x), double(s.y), double(s.z)}; }

// Published distance from `start` to the image S of `end`.
double published_distance(Vec3 start, Vec3 end, Int3 shift, const Mat3& cell) {
  const Vec3 d = (fused_combine(to_double(shift), cell) + end) - start;
  return norm(d);
}

Int3 cross(Int3 a, Int3 b) { return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x}; }

bool obtuse(Vec3 u, Vec3 v) {  // in degrees, so that a cosine of -1e-17 is not
  constexpr double kPi = 3.14159265358979323846;
  return std::acos(std::clamp(dot(u, v) / norm(u) / norm(v), -1.0, 1.0)) * (180.0 / kPi) > 90.0;
}

Mat3 published_frame(const Crystals& crystals, std::int64_t b) {
  struct Image {
    double length;
    Int3 shift;
  };
  const Mat3 cell = crystals.lattice(b), coarse = rounded(cell);
  const Vec3 origin = fused_combine(crystals.frac(crystals.first_atom(b)), coarse);
  const double radius =
      std::max({norm(coarse.row[0]), norm(coarse.row[1]), norm(coarse.row[2])}) + kFrameMargin;
  const Mat3 dual = inverse(coarse);
  const double* d = &dual.row[0].x;
  double most[3], images = 1;
  for (int a = 0; a < 3; ++a) {
    most[a] = std::ceil((radius + kIgnoreBelow) * norm({d[a], d[a + 3], d[a + 6]}));
    images *= 2 * most[a] + 1;
  }
  if (!(images <= kMaxFrameImages)) {
    throw CrystalError(
        b, "too many images of the cell within its longest vector for compat = 'comformer'; reduce the cell");
  }
  const auto limit = [&](int a) { return static_cast<std::int32_t>(most[a]); };
  std::vector<Image> near;
  for (std::int32_t x = -limit(0); x <= limit(0); ++x) {
    for (std::int32_t y = -limit(1); y <= limit(1); ++y) {
      for (std::int32_t z = -limit(2); z <= limit(2); ++z) {
        const double length = published_distance(origin, origin, {x, y, z}, cell);
        if (length > kIgnoreBelow && length <= radius) near.push_back({length, {x, y, z}});
      }
    }
  }
  std::stable_sort(near.begin(), near.end(),
                   [](const Image& p, const Image& q) { return p.length < q.length; });

  // The three cell vectors themselves are within the radius, so each search ends.
  const Int3 first = near[0].shift;
  std::size_t n = 1;
  while (cross(first, near[n].shift) == Int3{0, 0, 0}) ++n;
  const Int3 second = near[n].shift, normal = cross(first, second);
  const auto coplanar = [&](Int3 s) { return normal.x * s.x + normal.y * s.y + normal.z * s.z == 0; };
  while (coplanar(near[n].shift)) ++n;
  Mat3 frame;
  const Int3 chosen[3] = {first, second, near[n].shift};
  Vec3 judged[3];  // angles are those of the rounded cell
  for (int m = 0; m < 3; ++m) {
    frame.row[m] = combine(to_double(chosen[m]), cell);
    judged[m] = fused_combine(to_double(chosen[m]), coarse);
  }
  for (int m = 1; m < 3; ++m) {
    if (obtuse(judged[0], judged[m])) frame.row[m] = -frame.row[m];
  }
  if (determinant(frame) < 0) frame = {{-frame.row[0], -frame.row[1], -frame.row[2]}};
  return frame;
}

// How often the published list has each candidate edge of crystal b.
void count_published(const Crystals& crystals, std::int64_t b, const NeighborList& candidates, std::int64_t k,
                     std::vector<std::uint8_t>& copies) {
  const std::int64_t first = crystals.first_atom(b), n_atoms = crystals.num_atoms(b);
  const std::int64_t* target = candidates.edge_index.data() + candidates.edge_vec.size();
  const Mat3 cell = crystals.lattice(b), coarse = rounded(cell);
  std::vector<Vec3> position;
  for (std::int64_t i = 0; i < n_atoms; ++i)
    position.push_back(fused_combine(crystals.frac(first + i), coarse));

  std::vector<double> kth, row;
  for (std::int64_t i = 0; i < n_atoms; ++i) {
    row.clear();
    for (std::int64_t e = candidates.row_ptr[first + i]; e < candidates.row_ptr[first + i + 1]; ++e) {
      row.push_back(
          published_distance(position[i], position[target[e] - first], candidates.cell_shift[e], cell));
    }
    std::nth_element(row.begin(), row.begin() + (k - 1), row.end());
    kth.push_back(row[k - 1]);
  }
  for (std::int64_t i = 0; i < n_atoms; ++i) {
    for (std::int64_t e = candidates.row_ptr[first + i]; e < candidates.row_ptr[first + i + 1]; ++e) {
      const std::int64_t j = target[e] - first;
      const Int3 shift = candidates.cell_shift[e];
      const bool kept = published_distance(position[i], position[j], shift, cell) <= kth[i];
      const bool kept_by_j =
          published_distance(position[j], position[i], Int3{0, 0, 0} - shift, cell) <= kth[j];
      copies[e] = i == j ? std::uint8_t(kept + kept_by_j) : std::uint8_t(kept || kept_by_j);
    }
  }
}

}  // namespace

ComformerGraph comformer_graph(const Crystals& crystals, std::int64_t max_neighbors, int threads) {
  for (std::int64_t b = 0; b < crystals.count; ++b) {
    if (!(crystals.pbc[3 * b] && crystals.pbc[3 * b + 1] && crystals.pbc[3 * b + 2])) {
      throw CrystalError(
          b, "compat = 'comformer' needs periodicity in three directions; set pbc, or drop compat");
    }
  }
  NeighborOptions options;
  options.max_neighbors = max_neighbors;
  options.shell_tolerance = kCandidateWidth;
  options.ignore_below = kIgnoreBelow;
  options.threads = threads;
  const NeighborList candidates = neighbor_list(crystals, options);

  ComformerGraph graph;
  graph.frames.resize(crystals.count);
  std::vector<std::uint8_t> copies(candidates.edge_vec.size());
  for_each_crystal(crystals.count, threads, [&](std::int64_t b) {
    graph.frames[b] = published_frame(crystals, b);
    count_published(crystals, b, candidates, max_neighbors, copies);
  });

  const std::int64_t n_atoms = crystals.batch_ptr[crystals.count];
  const auto n_candidates = static_cast<std::int64_t>(copies.size());
  std::int64_t n_edges = 0;
  for (const std::uint8_t n : copies) n_edges += n;
  NeighborList& edges = graph.edges;
  edges.edge_index.resize(2 * n_edges);
  edges.edge_vec.resize(n_edges);
  edges.cell_shift.resize(n_edges);
  edges.row_ptr.resize(n_atoms + 1);
  std::int64_t written = 0;
  for (std::int64_t i = 0; i < n_atoms; ++i) {
    edges.row_ptr[i] = written;
    for (std::int64_t e = candidates.row_ptr[i]; e < candidates.row_ptr[i + 1]; ++e) {
      for (int copy = 0; copy < copies[e]; ++copy, ++written) {
        edges.edge_index[written] = i;
        edges.edge_index[n_edges + written] = candidates.edge_index[n_candidates + e];
        edges.edge_vec[written] = candidates.edge_vec[e];
        edges.cell_shift[written] = candidates.cell_shift[e];
      }
    }
  }
  edges.row_ptr[n_atoms] = written;
  return graph;
}

}  // namespace mgt
