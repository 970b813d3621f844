#include "neighbor_list.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "cell_reduction.hpp"
#include "neighbor_search.hpp"
#include "parallel.hpp"
#include "search_limits.hpp"

namespace mgt {
namespace {

constexpr std::int64_t kImageSearchAtoms = 64;  // cells with more atoms are searched through bins

// One crystal, ready to be searched.
struct Prepared {
  ReducedCell cell;
  WrappedAtoms atoms;
  double radius;  // cutoff, or where the k-nearest search starts
};

// Edges of one crystal; atoms counted from its first.
struct CrystalEdges {
  std::vector<std::int64_t> row_end;  // (atoms) edges up to and with this atom's
  std::vector<std::int64_t> target;
  std::vector<Int3> shift;
  std::vector<Vec3> vector;
  std::vector<double> margin;
};

void check_size(const Prepared& crystal, std::int64_t b, double radius, const char* remedy) {
  const SearchSize size = search_size(crystal.cell, static_cast<std::int64_t>(crystal.atoms.position.size()),
                                      crystal.atoms.volume_per_atom, radius);
  if (size.allowed()) return;
  std::ostringstream message;
  message.precision(3);
  message << "too many images: within " << radius << " Å an atom has about " << size.neighbors
          << " neighbours (allowed " << kMaxNeighbors << "; " << kMaxEdges << " a crystal) in " << size.images
          << " images of the cell (allowed " << kMaxImages << "); " << remedy;
  throw CrystalError(b, message.str());
}

Prepared prepare(const Crystals& crystals, std::int64_t b, const NeighborOptions& options) {
  Prepared crystal;
  crystal.cell = reduce_cell(crystals, b);
  const std::int64_t others = crystals.num_atoms(b) - 1;
  if (options.cutoff == 0 && crystal.cell.periodic == 0 && others < options.max_neighbors) {
    throw CrystalError(b, "without periodicity an atom has only " + std::to_string(others) +
                              " neighbours, fewer than max_neighbors = " +
                              std::to_string(options.max_neighbors) + "; lower max_neighbors or set pbc");
  }
  crystal.atoms = wrap_atoms(crystals, b, crystal.cell);
  if (options.cutoff > 0) {
    crystal.radius = options.cutoff;
    check_size(crystal, b, crystal.radius, "lower the cutoff, or check that the cell is in Å");
  } else {
    crystal.radius = starting_radius(options.max_neighbors, crystal.atoms.volume_per_atom);
    check_size(crystal, b, crystal.radius, "lower max_neighbors, or check that the cell is in Å");
  }
  return crystal;
}

// Call body(search) with the search that suits the size of the cell.
template <class Body>
void with_search(const Prepared& crystal, double radius, const Body& body) {
  if (static_cast<std::int64_t>(crystal.atoms.position.size()) <= kImageSearchAtoms) {
    ImageSearch search(crystal.cell, crystal.atoms, radius);
    body(search);
  } else {
    BinSearch search(crystal.cell, crystal.atoms, radius);
    body(search);
  }
}

// Squared radius of each atom's whole shells. The search radius grows until every atom has found k.
std::vector<double> shell_limits(const Prepared& crystal, std::int64_t b, const NeighborOptions& options,
                                 std::vector<double>& margin) {
  const std::size_t n_atoms = crystal.atoms.position.size();
  const auto k = static_cast<std::size_t>(options.max_neighbors);
  const double stretch = 1.0 + options.shell_tolerance, see_margin = 1.0 + 2.0 * options.shell_tolerance;
  const double ignored = options.ignore_below * options.ignore_below;
  std::vector<double> limits(n_atoms), reach(n_atoms), squared;
  std::vector<std::int64_t> waiting(n_atoms);
  for (std::size_t i = 0; i < n_atoms; ++i) waiting[i] = static_cast<std::int64_t>(i);
  margin.resize(options.shell_margin ? n_atoms : 0);

  for (double radius = crystal.radius; !waiting.empty(); radius *= kRadiusGrowth) {
    check_size(crystal, b, radius, "lower max_neighbors, or check that the cell is in Å");
    std::fill(reach.begin(), reach.end(), radius * radius);
    std::vector<std::int64_t> unfinished;
    with_search(crystal, radius, [&](auto& search) {
      for (const std::int64_t i : waiting) {
        squared.clear();
        search.neighbors(i, reach.data(), [&](std::int64_t, Int3, Vec3, double d2) {
          if (d2 > ignored) squared.push_back(d2);
        });
        if (squared.size() < k) {
          unfinished.push_back(i);
          continue;
        }
        std::nth_element(squared.begin(), squared.begin() + (k - 1), squared.end());
        const double kth = squared[k - 1];
        limits[i] = shell_limit(kth, options.shell_tolerance);
        if (!options.shell_margin) continue;
        if (kth * see_margin * see_margin > radius * radius) {
          unfinished.push_back(i);
          continue;
        }
        margin[i] = options.shell_tolerance;
        for (const double d2 : squared) {
          margin[i] = std::min(margin[i], std::fabs(std::sqrt(d2 / kth) - stretch));
        }
      }
    });
    waiting.swap(unfinished);
  }
  return limits;
}

bool positive(Int3 shift) { return Int3{0, 0, 0} < shift; }

// All edges with |r_ij|^2 <= max(limits[i], limits[j]).
CrystalEdges collect(const Prepared& crystal, std::int64_t b, const NeighborOptions& options,
                     const std::vector<double>& limits) {
  struct Edge {
    std::int64_t target;
    Int3 shift;
    Vec3 vector;
  };
  const double ignored = options.ignore_below * options.ignore_below;
  const double longest = *std::max_element(limits.begin(), limits.end());
  CrystalEdges edges;
  std::vector<Edge> row;
  with_search(crystal, std::sqrt(longest), [&](auto& search) {
    const auto n_atoms = static_cast<std::int64_t>(limits.size());
    for (std::int64_t i = 0; i < n_atoms; ++i) {
      row.clear();
      search.neighbors(i, limits.data(), [&](std::int64_t j, Int3 shift, Vec3 vector, double d2) {
        if (d2 < kMinDistance * kMinDistance) {
          std::ostringstream message;
          message << "atom " << std::min(i, j) << " and atom " << std::max(i, j) << " are " << std::sqrt(d2)
                  << " Å apart (coincident: below " << kMinDistance << " Å); remove one of them";
          throw CrystalError(b, message.str());
        }
        if (d2 <= ignored) return;
        if (options.half && !(i < j || (i == j && positive(shift)))) return;
        row.push_back({j, shift, vector});
      });
      if (!std::decay_t<decltype(search)>::kSorted) {
        std::sort(row.begin(), row.end(), [](const Edge& p, const Edge& q) {
          return p.target != q.target ? p.target < q.target : p.shift < q.shift;
        });
      }
      for (const Edge& edge : row) {
        edges.target.push_back(edge.target);
        edges.shift.push_back(edge.shift);
        edges.vector.push_back(edge.vector);
      }
      edges.row_end.push_back(static_cast<std::int64_t>(edges.target.size()));
    }
  });
  return edges;
}

NeighborList concatenate(const Crystals& crystals, std::vector<CrystalEdges>& parts,
                         const NeighborOptions& options) {
  std::vector<std::int64_t> first_edge(crystals.count + 1, 0);
  for (std::int64_t b = 0; b < crystals.count; ++b) {
    first_edge[b + 1] = first_edge[b] + static_cast<std::int64_t>(parts[b].target.size());
  }
  const std::int64_t n_atoms = crystals.batch_ptr[crystals.count], n_edges = first_edge[crystals.count];
  NeighborList list;
  list.edge_index.resize(2 * n_edges);
  list.edge_vec.resize(n_edges);
  list.cell_shift.resize(n_edges);
  list.row_ptr.assign(n_atoms + 1, 0);
  list.shell_margin.resize(options.shell_margin ? n_atoms : 0);
  for_each_crystal(crystals.count, options.threads, [&](std::int64_t b) {
    CrystalEdges& part = parts[b];
    const std::int64_t atom0 = crystals.first_atom(b), edge0 = first_edge[b];
    std::int64_t e = 0;
    for (std::int64_t i = 0; i < crystals.num_atoms(b); ++i) {
      for (; e < part.row_end[i]; ++e) {
        list.edge_index[edge0 + e] = atom0 + i;
        list.edge_index[n_edges + edge0 + e] = atom0 + part.target[e];
      }
      list.row_ptr[atom0 + i + 1] = edge0 + part.row_end[i];
    }
    std::copy(part.vector.begin(), part.vector.end(), list.edge_vec.begin() + edge0);
    std::copy(part.shift.begin(), part.shift.end(), list.cell_shift.begin() + edge0);
    std::copy(part.margin.begin(), part.margin.end(),
              list.shell_margin.begin() + (options.shell_margin ? atom0 : 0));
    part = {};
  });
  return list;
}

}  // namespace

NeighborList neighbor_list(const Crystals& crystals, const NeighborOptions& options) {
  std::vector<Prepared> prepared(crystals.count);
  for_each_crystal(crystals.count, options.threads,
                   [&](std::int64_t b) { prepared[b] = prepare(crystals, b, options); });
  std::vector<CrystalEdges> parts(crystals.count);
  for_each_crystal(crystals.count, options.threads, [&](std::int64_t b) {
    std::vector<double> limits, margin;
    if (options.cutoff > 0) {
      limits.assign(crystals.num_atoms(b), options.cutoff * options.cutoff);
    } else {
      limits = shell_limits(prepared[b], b, options, margin);
    }
    parts[b] = collect(prepared[b], b, options, limits);
    parts[b].margin = std::move(margin);
    prepared[b] = {};
  });
  return concatenate(crystals, parts, options);
}

}  // namespace mgt
