#include "neighbor_list.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cell_reduction.hpp"
#include "neighbor_search.hpp"
#include "parallel.hpp"
#include "search_limits.hpp"

namespace mgt {
namespace {

constexpr std::int64_t kRanked = 192;        // so many numbers are ranked by counting the lesser ones
constexpr std::int64_t kCrystalsABlock = 4;  // handed to a thread at once
constexpr std::int64_t kRowsABlock = 128;    // the same within a large crystal
constexpr std::int64_t kSharedAtoms = 2048;  // crystals with more atoms are worked on by all threads

// What a thread works with.
struct Worker {
  NeighborSearch search;
  Arena kept;     // for the whole call: tables and codes of edges
  Arena scratch;  // for one crystal
};

struct Candidates {
  const std::uint32_t* codes;
  const float* squared;  // Å^2
  std::int64_t count;
};

// The k-th of `count` positive numbers; `space` has room for kVector more.
float kth_least(const float* numbers, std::int64_t count, std::int32_t k, std::uint32_t* space) {
  if (count > kRanked) {
    auto* copy = reinterpret_cast<float*>(space);
    std::copy_n(numbers, count, copy);
    std::nth_element(copy, copy + (k - 1), copy + count);
    return copy[k - 1];
  }
  // Positive numbers are ordered as their bits are.
  const auto* bits = reinterpret_cast<const std::uint32_t*>(numbers);
  vector_kernels().rank(bits, count, space);
  std::int32_t kth = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    kth = std::max(kth, static_cast<std::int32_t>(space[c]) < k ? static_cast<std::int32_t>(bits[c]) : 0);
  }
  float result;
  std::memcpy(&result, &kth, sizeof(result));
  return result;
}

// Searches crystal after crystal and keeps, for each atom, the codes of its edges.
class Finder {
 public:
  Finder(const Crystals& crystals, const NeighborOptions& options)
      : crystals_(crystals),
        options_(options),
        workers_(worker_count(options.threads)),
        tables_(crystals.count),
        rows_(crystals.batch_ptr[crystals.count]) {
    list_.row_ptr.resize(rows_.size() + 1);
    list_.row_ptr[0] = 0;
    list_.shell_margin.resize(options.shell_margin ? rows_.size() : 0);
  }

  NeighborList run() {
    std::int64_t end = crystals_.count;  // crystals beyond the first at fault are of no interest
    std::exception_ptr failure;
    const auto noting_failure = [&](const auto& body) {
      try {
        body();
      } catch (const CrystalError& error) {
        end = error.crystal;
        failure = std::current_exception();
      }
    };
    noting_failure([&] {
      for_each_block(end, kCrystalsABlock, options_.threads,
                     [&](int worker, std::int64_t first, std::int64_t last) {
                       for (std::int64_t b = first; b < last; ++b) {
                         if (!shared(b)) find(b, workers_[worker], 1);
                       }
                     });
    });
    for (std::int64_t b = 0; b < end; ++b) {
      if (shared(b)) noting_failure([&] { find(b, workers_[0], options_.threads); });
    }
    if (failure) std::rethrow_exception(failure);
    write();
    return std::move(list_);
  }

 private:
  bool shared(std::int64_t b) const { return workers_.size() > 1 && crystals_.num_atoms(b) > kSharedAtoms; }

  // Find the edges of crystal b with so many threads; one works with `worker`, several with all workers.
  void find(std::int64_t b, Worker& worker, int threads) {
    const ReducedCell cell = reduce_cell(crystals_, b);
    const std::int64_t others = crystals_.num_atoms(b) - 1;
    if (options_.cutoff == 0 && cell.periodic == 0 && others < options_.max_neighbors) {
      throw CrystalError(b, "without periodicity an atom has only " + std::to_string(others) +
                                " neighbours, fewer than max_neighbors = " +
                                std::to_string(options_.max_neighbors) + "; lower max_neighbors or set pbc");
    }
    const WrappedAtoms atoms = wrap_atoms(crystals_, b, cell, threads);
    // Calls row(worker, i) for every atom.
    const auto for_rows = [&](const auto& row) {
      for_each_block(crystals_.num_atoms(b), threads == 1 ? crystals_.num_atoms(b) : kRowsABlock, threads,
                     [&](int number, std::int64_t begin, std::int64_t end) {
                       Worker& own = threads == 1 ? worker : workers_[number];
                       for (std::int64_t i = begin; i < end; ++i) row(own, static_cast<std::uint32_t>(i));
                     });
    };
    if (options_.cutoff > 0) {
      find_within(b, cell, atoms, worker, for_rows);
    } else {
      find_nearest(b, cell, atoms, worker, for_rows);
    }
    tables_[b] = worker.search.tables();
  }

  // Prepare the worker's search, unless it is too large to be meant.
  void prepare(std::int64_t b, const ReducedCell& cell, const WrappedAtoms& atoms, double radius,
               Worker& worker) const {
    const SearchSize size =
        search_size(cell, static_cast<std::int64_t>(atoms.position.size()), atoms.volume_per_atom, radius);
    if (size.allowed() && worker.search.prepare(cell, atoms, radius, worker.kept)) return;
    std::ostringstream message;
    message.precision(3);
    message << "too many images: within " << radius << " Å an atom has about " << size.neighbors
            << " neighbours (allowed " << kMaxNeighbors << "; " << kMaxEdges << " a crystal) in "
            << size.images << " images of the cell (allowed " << kMaxImages << "); lower "
            << (options_.cutoff > 0 ? "the cutoff" : "max_neighbors") << ", or check that the cell is in Å";
    throw CrystalError(b, message.str());
  }

  template <class ForRows>
  void find_within(std::int64_t b, const ReducedCell& cell, const WrappedAtoms& atoms, Worker& worker,
                   const ForRows& for_rows) {
    prepare(b, cell, atoms, options_.cutoff, worker);
    const NeighborSearch& search = worker.search;
    const double limit = options_.cutoff * options_.cutoff;
    const Bounds bounds = bounds_of(search, limit);
    for_rows([&](Worker& own, std::uint32_t i) {
      auto* codes = own.kept.template room<std::uint32_t>(search.capacity() + kVector);
      std::int64_t unsure = 0, count = search.select(i, bounds, codes, nullptr, unsure);
      if (unsure == 1) {  // the atom itself
        search.sort(codes, count);
      } else {
        count = search.select(i, {-1, -1, bounds.far}, codes, nullptr, unsure);
        search.sort(codes, count);
        count = decide(search, b, i, limit, codes, count);
      }
      keep_row(search, b, i, codes, count, own);
    });
  }

  template <class ForRows>
  void find_nearest(std::int64_t b, const ReducedCell& cell, const WrappedAtoms& atoms, Worker& worker,
                    const ForRows& for_rows) {
    const std::size_t n_atoms = atoms.position.size();
    double radius = starting_radius(options_.max_neighbors, atoms.volume_per_atom);
    const NeighborSearch& search = worker.search;
    std::vector<Candidates> candidates(n_atoms);
    std::vector<double> limits(n_atoms), needed(n_atoms);
    for (;;) {
      prepare(b, cell, atoms, radius, worker);
      for (Worker& any : workers_) {  // of a crystal not shared, other workers are busy with others
        if (&any == &worker || shared(b)) any.scratch.clear();
      }
      for_rows([&](Worker& own, std::uint32_t i) {
        candidates[i] = find_candidates(search, b, i, radius, own.scratch);
        needed[i] = find_limit(search, b, i, candidates[i], limits[i], own.scratch);
      });
      const double most = *std::max_element(needed.begin(), needed.end());
      if (most <= radius * radius) break;
      // Not all have found k yet; or they have, and a last shell may go on beyond the radius.
      radius = std::isfinite(most) ? 1.000001 * std::sqrt(most) : kRadiusGrowth * radius;
    }
    const double error = search.error();
    for_rows([&](Worker& own, std::uint32_t i) {
      const Candidates& found = candidates[i];
      auto* codes = own.kept.template room<std::uint32_t>(found.count + kVector);
      std::int64_t count = 0;
      for (std::int64_t c = 0; c < found.count; ++c) {
        const std::uint32_t code = found.codes[c];
        const double limit = std::max(limits[i], limits[search.tables().atom(code)]), d2 = found.squared[c];
        codes[count] = code;
        if (std::fabs(d2 - limit) > error) {
          count += d2 <= limit;
        } else {
          count += search.squared_distance(i, code) <= limit;
        }
      }
      search.sort(codes, count);
      keep_row(search, b, i, codes, count, own);
    });
  }

  Bounds bounds_of(const NeighborSearch& search, double limit) const {
    const double near = std::max(kMinDistance, options_.ignore_below);
    return {static_cast<float>(near * near) + search.error(), static_cast<float>(limit) - search.error(),
            static_cast<float>(limit) + search.error()};
  }

  // Everything but the atom itself that may be within the radius.
  Candidates find_candidates(const NeighborSearch& search, std::int64_t b, std::uint32_t i, double radius,
                             Arena& scratch) const {
    const std::int64_t capacity = search.capacity() + kVector;
    // Codes and distances lie in one piece, moved together when their number is known.
    auto* codes = scratch.room<std::uint32_t>(2 * capacity);
    auto* squared = reinterpret_cast<float*>(codes + capacity);
    Bounds bounds = bounds_of(search, radius * radius);
    bounds.sure = bounds.far;
    std::int64_t unsure = 0, count = search.select(i, bounds, codes, squared, unsure);
    if (unsure != 1) {
      count = search.select(i, {-1, -1, bounds.far}, codes, squared, unsure);
      count = decide(search, b, i, std::numeric_limits<double>::infinity(), codes, count);
      for (std::int64_t c = 0; c < count; ++c) {
        squared[c] = static_cast<float>(search.squared_distance(i, codes[c]));
      }
    }
    auto* moved = reinterpret_cast<float*>(codes + count);
    std::memmove(moved, squared, count * sizeof(float));
    scratch.keep<std::uint32_t>(2 * count);
    return {codes, moved, count};
  }

  // Set the squared radius of the atom's whole shells; return the squared radius that must have been searched
  // for it to be right, infinite if there are too few candidates.
  double find_limit(const NeighborSearch& search, std::int64_t b, std::uint32_t i, const Candidates& found,
                    double& limit, Arena& scratch) {
    const std::int64_t k = options_.max_neighbors;
    if (found.count < k) return std::numeric_limits<double>::infinity();
    const double kth = find_kth(search, i, found, k, scratch);
    limit = shell_limit(kth, options_.shell_tolerance);
    if (!options_.shell_margin) return limit;
    const double stretch = 1.0 + options_.shell_tolerance;
    double margin = options_.shell_tolerance;
    for (std::int64_t c = 0; c < found.count; ++c) {
      margin =
          std::min(margin, std::fabs(std::sqrt(search.squared_distance(i, found.codes[c]) / kth) - stretch));
    }
    list_.shell_margin[crystals_.first_atom(b) + i] = margin;
    const double see_margin = 1.0 + 2.0 * options_.shell_tolerance;
    return kth * see_margin * see_margin;
  }

  // The squared distance of the k-th neighbour.
  static double find_kth(const NeighborSearch& search, std::uint32_t i, const Candidates& found,
                         std::int64_t k, Arena& scratch) {
    auto* exact = scratch.room<double>(2 * found.count + kVector);
    auto* near = reinterpret_cast<std::uint32_t*>(exact + found.count);
    // The k-th in single precision is off by the error at most, so it lies among those off by twice that.
    const float about = kth_least(found.squared, found.count, static_cast<std::int32_t>(k), near),
                band = 2 * search.error();
    std::int64_t below = 0, count = 0;
    for (std::int64_t c = 0; c < found.count; ++c) {
      const bool less = found.squared[c] < about - band;
      below += less;
      near[count] = found.codes[c];
      count += !less & (found.squared[c] <= about + band);
    }
    for (std::int64_t c = 0; c < count; ++c) exact[c] = search.squared_distance(i, near[c]);
    std::nth_element(exact, exact + (k - 1 - below), exact + count);
    return exact[k - 1 - below];
  }

  // Keep the codes of atom i that are neighbours within the limit, which may be infinite.
  std::int64_t decide(const NeighborSearch& search, std::int64_t b, std::uint32_t i, double limit,
                      std::uint32_t* codes, std::int64_t count) const {
    const double ignored = options_.ignore_below * options_.ignore_below;
    std::int64_t kept = 0;
    for (std::int64_t c = 0; c < count; ++c) {
      const std::uint32_t code = codes[c], j = search.tables().atom(code);
      if (code == search.tables().self(i)) continue;
      const double d2 = search.squared_distance(i, code);
      if (d2 < kMinDistance * kMinDistance) {
        std::ostringstream message;
        message << "atom " << std::min(i, j) << " and atom " << std::max(i, j) << " are " << std::sqrt(d2)
                << " Å apart (coincident: below " << kMinDistance << " Å); remove one of them";
        throw CrystalError(b, message.str());
      }
      codes[kept] = code;
      kept += d2 > ignored && d2 <= limit;
    }
    return kept;
  }

  void keep_row(const NeighborSearch& search, std::int64_t b, std::uint32_t i, const std::uint32_t* codes,
                std::int64_t count, Worker& own) {
    if (options_.half) {  // of an edge and its reverse one has the greater code than its starting atom
      const std::uint32_t* first = std::upper_bound(codes, codes + count, search.tables().self(i));
      own.kept.keep<std::uint32_t>(count);
      count -= first - codes;
      codes = first;
    } else {
      own.kept.keep<std::uint32_t>(count);
    }
    const std::int64_t atom = crystals_.first_atom(b) + i;
    rows_[atom] = codes;
    list_.row_ptr[atom + 1] = count;
  }

  // Make the list from the codes.
  void write() {
    const auto n_atoms = static_cast<std::int64_t>(rows_.size());
    for (std::int64_t i = 0; i < n_atoms; ++i) list_.row_ptr[i + 1] += list_.row_ptr[i];
    const std::int64_t n_edges = list_.row_ptr[n_atoms];
    list_.edge_index.resize(2 * n_edges);
    list_.edge_vec.resize(n_edges);
    list_.cell_shift.resize(n_edges);
    const EdgeArrays edges = {list_.edge_index.data(), list_.edge_index.data() + n_edges,
                              list_.edge_vec.data(), list_.cell_shift.data()};
    const WriteKernel write = vector_kernels().write;
    for_each_block(n_atoms, kRowsABlock, options_.threads, [&](int, std::int64_t begin, std::int64_t end) {
      const std::int64_t* ptr = crystals_.batch_ptr;
      std::int64_t b = std::upper_bound(ptr, ptr + crystals_.count + 1, begin) - ptr - 1;
      for (std::int64_t atom = begin; atom < end; ++atom) {
        while (atom >= ptr[b + 1]) ++b;
        const std::int64_t first_edge = list_.row_ptr[atom];
        write(tables_[b], static_cast<std::uint32_t>(atom - ptr[b]), rows_[atom],
              list_.row_ptr[atom + 1] - first_edge, ptr[b], first_edge, edges);
      }
    });
  }

  const Crystals& crystals_;
  const NeighborOptions& options_;
  std::vector<Worker> workers_;
  std::vector<EdgeTables> tables_;     // of each crystal
  Buffer<const std::uint32_t*> rows_;  // codes of each atom's edges
  NeighborList list_;
};

}  // namespace

NeighborList neighbor_list(const Crystals& crystals, const NeighborOptions& options) {
  return Finder(crystals, options).run();
}

}  // namespace mgt
