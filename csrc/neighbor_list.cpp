#include "neighbor_list.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <numeric>
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

constexpr std::int64_t kCrystalsABlock = 4;  // handed to a thread at once
constexpr std::int64_t kRowsABlock = 128;    // the same within a large crystal
constexpr std::int64_t kSharedAtoms = 2048;  // crystals with more atoms are worked on by all threads

// The first search for the nearest of many atoms looks at some of them, lest the atoms crowd in a small part
// of the cell: with a radius meant for the mean density all might then find all others.
constexpr std::int64_t kManyAtoms = 2048;
constexpr std::int64_t kSampled = 32;
constexpr double kCrowded = 0.5;  // share of the starting radius below which it is given up

struct Candidates {
  std::uint32_t* codes;
  const float* squared;  // Å^2
  std::int64_t count;
  std::size_t round;  // in which they were found
};

// One search within a radius. Those for the nearest neighbours grow round by round, for the atoms that have
// not found theirs.
struct Round {
  double reach;  // squared radius, Å^2
  float error;   // see NeighborSearch
  bool in_order;
  EdgeTables tables;
};

// What the search for the nearest neighbours knows of each atom.
struct Nearest {
  std::vector<Round> rounds;
  std::vector<Candidates> candidates;
  std::vector<double> limits;            // squared radius of its whole shells, Å^2
  std::vector<double> needed;            // squared radius that must be searched for that to be right, Å^2
  std::vector<std::uint32_t> searching;  // the atoms whose search has not reached so far
};

// What a thread works with.
struct Worker {
  NeighborSearch search;
  double radius = 0;      // of the search, Å
  SearchSize size{0, 0};  // of the search
  Nearest nearest;
  Arena kept;     // for the whole call: tables and codes of edges
  Arena scratch;  // for one crystal
};

// An edge that its end j does not find, being farther away than j searched.
struct FarEdge {
  std::uint32_t j, code;
};
bool operator<(const FarEdge& p, const FarEdge& q) { return p.j != q.j ? p.j < q.j : p.code < q.code; }

// There is no memory for the list, after all crystals have been searched.
class ListTooLarge : public std::bad_alloc {
 public:
  explicit ListTooLarge(std::int64_t n_edges)
      : message_("no memory for the list of " + std::to_string(n_edges) +
                 " edges; build it for fewer crystals at a time") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// The k-th of `count` positive numbers; `space` has room for twice as many and two vectors.
float kth_least(const float* numbers, std::int64_t count, std::int32_t k, std::uint32_t* space) {
  if (count > kRanked) {
    auto* copy = reinterpret_cast<float*>(space);
    std::copy_n(numbers, count, copy);
    std::nth_element(copy, copy + (k - 1), copy + count);
    return copy[k - 1];
  }
  // Positive numbers are ordered as their bits are.
  std::uint32_t *bits = space, *rank = space + count + kVector;
  std::memcpy(bits, numbers, count * sizeof(float));
  vector_kernels().rank(bits, count, rank);
  std::int32_t kth = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    kth = std::max(kth, static_cast<std::int32_t>(rank[c]) < k ? static_cast<std::int32_t>(bits[c]) : 0);
  }
  float result;
  std::memcpy(&result, &kth, sizeof(result));
  return result;
}

// The radius to start with, Å: one that suits the most crowded of the sampled atoms where it is much smaller.
double first_radius(const WrappedAtoms& atoms, std::int64_t max_neighbors) {
  const double radius = starting_radius(max_neighbors, atoms.volume_per_atom);
  const auto n_atoms = static_cast<std::int64_t>(atoms.position.size());
  if (n_atoms <= std::max(kManyAtoms, max_neighbors)) return radius;
  std::vector<double> squared(n_atoms);
  double least = radius * radius;
  for (std::int64_t s = 0; s < kSampled; ++s) {
    const Vec3 centre = atoms.position.data()[s * n_atoms / kSampled];
    for (std::int64_t i = 0; i < n_atoms; ++i) {
      squared[i] = squared_length(atoms.position.data()[i] - centre);
    }
    std::nth_element(squared.begin(), squared.begin() + max_neighbors, squared.end());  // itself is the first
    least = std::min(least, squared[max_neighbors]);
  }
  const double crowded = kRadiusGrowth * std::sqrt(least);
  return crowded < kCrowded * radius ? std::max(crowded, kMinDistance) : radius;
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
    worker.radius = 0;
    worker.size = {0, 0};
    try {
      search(b, worker, threads);
    } catch (const std::bad_alloc&) {
      std::ostringstream message;
      message.precision(3);
      message << "not enough memory for " << crystals_.num_atoms(b) << " atoms with about "
              << worker.size.neighbors << " neighbours each within " << worker.radius << " Å, in "
              << worker.size.images << " images of the cell; lower " << remedy();
      throw CrystalError(b, message.str());
    }
  }

  const char* remedy() const { return options_.cutoff > 0 ? "the cutoff" : "max_neighbors"; }

  void search(std::int64_t b, Worker& worker, int threads) {
    const ReducedCell cell = reduce_cell(crystals_, b);
    const std::int64_t n_atoms = crystals_.num_atoms(b), others = n_atoms - 1;
    if (options_.cutoff == 0 && cell.periodic == 0 && others < options_.max_neighbors) {
      throw CrystalError(b, "without periodicity an atom has only " + std::to_string(others) +
                                " neighbours, fewer than max_neighbors = " +
                                std::to_string(options_.max_neighbors) + "; lower max_neighbors or set pbc");
    }
    const WrappedAtoms atoms = wrap_atoms(crystals_, b, cell, threads);
    worker.search.enter(cell, atoms, worker.kept);
    // Prepare to search for so many atoms, unless the search is too large to be meant.
    const auto prepare = [&](double radius, std::int64_t searching) {
      worker.radius = radius;
      worker.size = search_size(cell, n_atoms, atoms.volume_per_atom, radius);
      check_size(b, worker, searching);
      if (worker.search.prepare(radius, worker.kept)) return;
      throw CrystalError(b, "too many images: all those of " + std::to_string(n_atoms) +
                                " atoms together cannot be numbered in 32 bits; lower " + remedy());
    };
    // Call body(worker, item) for every item in [0, count).
    const auto for_each = [&](std::int64_t count, const auto& body) {
      for_each_block(count, threads == 1 ? count : kRowsABlock, threads,
                     [&](int number, std::int64_t begin, std::int64_t end) {
                       Worker& own = threads == 1 ? worker : workers_[number];
                       for (std::int64_t k = begin; k < end; ++k) body(own, static_cast<std::uint32_t>(k));
                     });
    };
    if (options_.cutoff > 0) {
      prepare(options_.cutoff, n_atoms);
      find_within(b, worker.search, for_each);
    } else {
      if (threads == 1) {  // other workers are busy with other crystals
        worker.scratch.clear();
      } else {
        for (Worker& any : workers_) any.scratch.clear();
      }
      find_nearest(b, worker, first_radius(atoms, options_.max_neighbors), prepare, for_each);
    }
    tables_[b] = worker.search.tables();
  }

  void check_size(std::int64_t b, const Worker& worker, std::int64_t searching) const {
    const SearchSize& size = worker.size;
    if (size.allowed(searching)) return;
    std::ostringstream message;
    message.precision(3);
    message << "too many images: within " << worker.radius << " Å ";
    if (size.images > kMaxImages) {
      message << "there are about " << size.images << " images of the cell (allowed " << kMaxImages << ")";
    } else if (size.neighbors > kMaxNeighbors) {
      message << "an atom has about " << size.neighbors << " neighbours (allowed " << kMaxNeighbors << ")";
    } else {
      message << "the crystal has about " << size.neighbors * static_cast<double>(searching)
              << " edges (allowed " << kMaxEdges << ")";
    }
    message << "; lower " << remedy() << ", or check that the cell is in Å";
    throw CrystalError(b, message.str());
  }

  template <class ForEach>
  void find_within(std::int64_t b, const NeighborSearch& search, const ForEach& for_each) {
    const double limit = options_.cutoff * options_.cutoff;
    const Bounds bounds = bounds_of(search, limit);
    for_each(crystals_.num_atoms(b), [&](Worker& own, std::uint32_t i) {
      auto* codes = own.kept.template room<std::uint32_t>(search.capacity() + kVector);
      std::int64_t unsure = 0, count = search.select(i, bounds, codes, nullptr, unsure);
      const bool sure = unsure == 1;  // the atom itself
      if (!sure) count = search.select(i, {-1, -1, bounds.far}, codes, nullptr, unsure);
      if (!search.in_order()) sort_codes(codes, count);
      if (!sure) count = decide(search, b, i, limit, codes, count);
      keep_row(search, b, i, codes, count, own);
    });
  }

  template <class Prepare, class ForEach>
  void find_nearest(std::int64_t b, Worker& worker, double radius, const Prepare& prepare,
                    const ForEach& for_each) {
    const std::int64_t n_atoms = crystals_.num_atoms(b);
    const NeighborSearch& search = worker.search;
    std::vector<Round>& rounds = worker.nearest.rounds;
    std::vector<Candidates>& candidates = worker.nearest.candidates;
    std::vector<double>&limits = worker.nearest.limits, &needed = worker.nearest.needed;
    std::vector<std::uint32_t>& searching = worker.nearest.searching;
    rounds.clear();
    candidates.resize(n_atoms);
    limits.resize(n_atoms);
    needed.resize(n_atoms);
    searching.resize(n_atoms);
    std::iota(searching.begin(), searching.end(), 0u);
    for (std::int64_t searchers = n_atoms;; searchers = 1) {  // of those that search on there are few
      prepare(radius, searchers);
      rounds.push_back({radius * radius, search.error(), search.in_order(), search.tables()});
      for_each(static_cast<std::int64_t>(searching.size()), [&](Worker& own, std::uint32_t k) {
        const std::uint32_t i = searching[k];
        candidates[i] = find_candidates(search, b, i, radius, own.scratch);
        candidates[i].round = rounds.size() - 1;
        needed[i] = find_limit(search, b, i, candidates[i], limits[i], own.scratch);
      });
      const auto done = [&](std::uint32_t i) { return needed[i] <= rounds.back().reach; };
      searching.erase(std::remove_if(searching.begin(), searching.end(), done), searching.end());
      if (searching.empty()) break;
      double most = 0;
      for (const std::uint32_t i : searching) most = std::max(most, needed[i]);
      // Not all have found k yet; or they have, and a last shell may go on beyond the radius.
      radius = std::isfinite(most) ? 1.000001 * std::sqrt(most) : kRadiusGrowth * radius;
    }
    const std::vector<FarEdge> far = join_rounds(search, rounds, limits, candidates);
    for_each(n_atoms, [&](Worker& own, std::uint32_t i) {
      const Candidates& found = candidates[i];
      const Round& round = rounds[found.round];
      const auto [more, end] = std::equal_range(far.begin(), far.end(), FarEdge{i, 0},
                                                [](const FarEdge& p, const FarEdge& q) { return p.j < q.j; });
      auto* codes = own.kept.template room<std::uint32_t>(found.count + (end - more) + kVector);
      std::int64_t count = 0;
      for (std::int64_t c = 0; c < found.count; ++c) {
        const std::uint32_t code = found.codes[c];
        // What is beyond the reach of this atom's search comes with the far edges.
        const double limit = std::max(limits[i], std::min(limits[search.tables().atom(code)], round.reach));
        const double d2 = found.squared[c];
        codes[count] = code;
        if (std::fabs(d2 - limit) > round.error) {
          count += d2 <= limit;
        } else {
          count += search.squared_distance(i, code) <= limit;
        }
      }
      for (auto edge = more; edge != end; ++edge) codes[count++] = edge->code;
      if (!round.in_order || more != end) sort_codes(codes, count);
      keep_row(search, b, i, codes, count, own);
    });
  }

  // Number the images that earlier rounds found as the last one does, and return, sorted, the edges that only
  // the search of the other end has found.
  static std::vector<FarEdge> join_rounds(const NeighborSearch& search, const std::vector<Round>& rounds,
                                          const std::vector<double>& limits,
                                          std::vector<Candidates>& candidates) {
    std::vector<FarEdge> far;
    if (rounds.size() == 1) return far;
    const EdgeTables& last = search.tables();
    std::vector<std::vector<std::uint32_t>> numbers(rounds.size());
    for (Candidates& found : candidates) {
      const EdgeTables& tables = rounds[found.round].tables;
      if (found.round + 1 == rounds.size()) continue;
      std::vector<std::uint32_t>& number = numbers[found.round];
      if (number.empty()) number = renumbering(tables, last);
      for (std::int64_t c = 0; c < found.count; ++c) {
        found.codes[c] = last.code(tables.atom(found.codes[c]), number[tables.image(found.codes[c])]);
      }
    }
    for (std::uint32_t i = 0; i < candidates.size(); ++i) {
      const Candidates& found = candidates[i];
      const double error = rounds[found.round].error;
      for (std::int64_t c = 0; found.round > 0 && c < found.count; ++c) {
        const std::uint32_t code = found.codes[c], j = last.atom(code);
        const double reach = rounds[candidates[j].round].reach;
        if (found.squared[c] + error <= reach || found.squared[c] - error > limits[i]) continue;
        const double d2 = search.squared_distance(i, code);
        if (d2 > reach && d2 <= limits[i]) far.push_back({j, last.reverse(i, code)});
      }
    }
    std::sort(far.begin(), far.end());
    return far;
  }

  // What the images of one round are numbered in a later one, which has all of them.
  static std::vector<std::uint32_t> renumbering(const EdgeTables& from, const EdgeTables& to) {
    std::vector<std::uint32_t> number;
    for (std::uint32_t m = 0; number.size() < from.images() && m < to.images(); ++m) {
      const Int4 &old = from.shift[number.size()], &shift = to.shift[m];
      if (old.x == shift.x && old.y == shift.y && old.z == shift.z) number.push_back(m);
    }
    return number;
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
    return {codes, moved, count, 0};
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
    try {
      list_.edge_index.resize(2 * n_edges);
      list_.edge_vec.resize(n_edges);
      list_.cell_shift.resize(n_edges);
    } catch (const std::bad_alloc&) {
      throw ListTooLarge(n_edges);
    }
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
