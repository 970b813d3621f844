#include "neighbor_search.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "search_limits.hpp"

namespace mgt {
namespace {

// Rounding must not lose a pair right on the radius; the exact test of distance follows.
constexpr double kSlack = 1.0 + 4e-6;
constexpr double kUnit = 1.0 / (1 << 24);  // half a unit in the last place of single precision, relative
// Points are sorted into bins if there are more than these, and more than so many for each neighbour.
constexpr double kBinnedPoints = 512, kBinnedRatio = 40;

// Memory of a thread for sorting.
struct SortSpace {
  Buffer<std::uint32_t> order, keys;
  Buffer<std::uint64_t> words, swapped;
};
SortSpace& sort_space() {
  static thread_local SortSpace space;
  return space;
}

// Where the keys, different from one another, stand in ascending order.
const std::uint32_t* ascending(const std::uint32_t* keys, std::int64_t count) {
  SortSpace& space = sort_space();
  space.order.resize(2 * count);
  std::uint32_t *order = space.order.data(), *rank = order + count;
  if (count <= kRanked) {
    vector_kernels().rank(keys, count, rank);
    for (std::int64_t k = 0; k < count; ++k) order[rank[k]] = static_cast<std::uint32_t>(k);
    return order;
  }
  // Radix sort by bytes, the least first.
  space.words.resize(count);
  space.swapped.resize(count);
  std::uint64_t *from = space.words.data(), *to = space.swapped.data();
  std::uint32_t highest = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    from[k] = std::uint64_t{keys[k]} << 32 | static_cast<std::uint64_t>(k);
    highest |= keys[k];
  }
  for (int byte = 0; byte < 4 && highest >> (8 * byte) != 0; ++byte) {
    const int position = 32 + 8 * byte;
    std::int64_t start[257] = {};
    for (std::int64_t k = 0; k < count; ++k) ++start[(from[k] >> position & 255) + 1];
    std::partial_sum(start, start + 257, start);
    for (std::int64_t k = 0; k < count; ++k) to[start[from[k] >> position & 255]++] = from[k];
    std::swap(from, to);
  }
  for (std::int64_t k = 0; k < count; ++k) order[k] = static_cast<std::uint32_t>(from[k]);
  return order;
}

bool before(const Int4& a, const Int4& b) { return Int3{a.x, a.y, a.z} < Int3{b.x, b.y, b.z}; }

// Where the shifts stand in lexicographic order.
const std::uint32_t* shift_order(const Int4* shifts, std::int64_t count) {
  Int4 low = shifts[0], high = shifts[0];
  for (std::int64_t m = 1; m < count; ++m) {
    const Int4& s = shifts[m];
    low = {std::min(low.x, s.x), std::min(low.y, s.y), std::min(low.z, s.z), 0};
    high = {std::max(high.x, s.x), std::max(high.y, s.y), std::max(high.z, s.z), 0};
  }
  const double ranges[3] = {double(high.x) - low.x + 1, double(high.y) - low.y + 1,
                            double(high.z) - low.z + 1};
  SortSpace& space = sort_space();
  if (ranges[0] * ranges[1] * ranges[2] < 4294967296.0) {  // the place in the box between is a key
    const auto range_y = static_cast<std::uint32_t>(ranges[1]),
               range_z = static_cast<std::uint32_t>(ranges[2]);
    space.keys.resize(count);
    for (std::int64_t m = 0; m < count; ++m) {
      const Int4& s = shifts[m];
      const auto x = std::uint32_t(s.x - low.x), y = std::uint32_t(s.y - low.y),
                 z = std::uint32_t(s.z - low.z);
      space.keys[m] = (x * range_y + y) * range_z + z;
    }
    return ascending(space.keys.data(), count);
  }
  space.order.resize(count);
  std::iota(space.order.begin(), space.order.end(), 0u);
  std::sort(space.order.begin(), space.order.end(),
            [&](std::uint32_t m, std::uint32_t n) { return before(shifts[m], shifts[n]); });
  return space.order.data();
}

}  // namespace

void NeighborSearch::PointBuffer::resize(std::size_t count) {
  x.resize(count);
  y.resize(count);
  z.resize(count);
  code.resize(count);
}

void NeighborSearch::enter(const ReducedCell& cell, const WrappedAtoms& atoms, Arena& arena) {
  cell_ = cell;
  n_atoms_ = atoms.position.size();
  volume_per_atom_ = atoms.volume_per_atom;
  Vec4* position = arena.take<Vec4>(n_atoms_);
  Int4* wrap = arena.take<Int4>(n_atoms_);
  Vec3 low = atoms.position[0], high = low, first = combine(low, cell.inverse), last = first;
  for (std::size_t i = 0; i < n_atoms_; ++i) {
    const Vec3 x = atoms.position[i], u = combine(x, cell.inverse);
    const Int3 s = atoms.wrap[i];
    position[i] = {x.x, x.y, x.z, 0};
    wrap[i] = {s.x, s.y, s.z, 0};
    const auto lesser = [](Vec3 a, Vec3 b) {
      return Vec3{std::min(a.x, b.x), std::min(a.y, b.y), std::min(a.z, b.z)};
    };
    low = lesser(low, x);
    high = -lesser(-high, -x);
    first = lesser(first, u);
    last = -lesser(-last, -u);
  }
  tables_.position = position;
  tables_.wrap = wrap;
  middle_ = 0.5 * (low + high);
  width_ = high - low;
  extent_ = last - first;
}

bool NeighborSearch::prepare(double radius, Arena& arena) {
  const double widest = std::max({width_.x, width_.y, width_.z});
  radius_ = kSlack * radius + 32 * kUnit * widest;
  // Coordinates of points are at most widest + radius, each of a few operations on them errs by kUnit of
  // that.
  error_ = static_cast<float>(32 * kUnit * radius_ * (widest + radius_));
  find_images(arena);
  if ((n_atoms_ - 1) >> (32 - tables_.image_bits) != 0) return false;
  list_points();
  const double neighbors = sphere_volume(radius) / volume_per_atom_;
  binned_ = static_cast<double>(count_) > kBinnedPoints + kBinnedRatio * neighbors;
  capacity_ = count_;
  if (binned_) sort_into_bins();
  return true;
}

void NeighborSearch::find_images(Arena& arena) {
  const ReducedCell& cell = cell_;
  const double extents[3] = {extent_.x, extent_.y, extent_.z};
  std::int32_t most[3];
  for (int a = 0; a < 3; ++a) {
    most[a] = a < cell.periodic
                  ? static_cast<std::int32_t>(std::floor(kSlack * (radius_ / cell.height[a] + extents[a])))
                  : 0;
  }
  // One more than there can be: each is written before it is known to count.
  const std::size_t room = 1 + (2 * std::size_t(most[0]) + 1) * (2 * most[1] + 1) * (2 * most[2] + 1);
  auto* translations = arena.take<Vec4>(room);
  auto* shifts = arena.take<Int4>(room);
  const double reach = radius_ * radius_, longest = kSlack * (radius_ + norm(width_));
  const Vec3 row = cell.basis.row[2];
  const auto outside = [](double length, double width) {
    const double gap = std::max(std::fabs(length) - width, 0.0);
    return gap * gap;
  };
  std::int64_t count = 0;
  for (std::int32_t a = -most[0]; a <= most[0]; ++a) {
    for (std::int32_t b = -most[1]; b <= most[1]; ++b) {
      // The same as translation({a, b, c}, cell.basis), which adds from the left.
      const Vec3 line = double(a) * cell.basis.row[0] + double(b) * cell.basis.row[1];
      std::int32_t from = -most[2], to = most[2];
      if (to > 2) {  // on a long line: translations are no longer than the radius and the box's diagonal
        const double middle = -dot(line, row) / dot(row, row);
        const double rest = longest * longest - squared_length(line + middle * row);
        if (rest < 0) continue;
        const double half = std::sqrt(rest / dot(row, row));
        from = std::max(from, static_cast<std::int32_t>(middle - half));
        to = std::min(to, static_cast<std::int32_t>(middle + half));
      }
      const Int3 first = combine({a, b, from}, cell.to_given), step = cell.to_given[2];
      Int4 shift{first.x, first.y, first.z, 0};
      for (std::int32_t c = from; c <= to; ++c) {
        const Vec3 v = line + double(c) * row;
        translations[count] = {v.x, v.y, v.z, 0};
        shifts[count] = shift;
        // No two atoms are farther apart along an axis than the box is wide.
        count += outside(v.x, width_.x) + outside(v.y, width_.y) + outside(v.z, width_.z) <= reach;
        shift = {shift.x + step.x, shift.y + step.y, shift.z + step.z, 0};
      }
    }
  }
  if (!std::is_sorted(shifts, shifts + count, before)) {
    const std::uint32_t* order = shift_order(shifts, count);
    auto* sorted_translations = arena.take<Vec4>(count);
    auto* sorted_shifts = arena.take<Int4>(count);
    for (std::int64_t m = 0; m < count; ++m) {
      sorted_translations[m] = translations[order[m]];
      sorted_shifts[m] = shifts[order[m]];
    }
    translations = sorted_translations;
    shifts = sorted_shifts;
  }
  image_x_.resize(count);
  image_y_.resize(count);
  image_z_.resize(count);
  for (std::int64_t m = 0; m < count; ++m) {
    image_x_[m] = static_cast<float>(translations[m].x);
    image_y_[m] = static_cast<float>(translations[m].y);
    image_z_[m] = static_cast<float>(translations[m].z);
    if ((shifts[m].x | shifts[m].y | shifts[m].z) == 0) tables_.home = static_cast<std::uint32_t>(m);
  }
  tables_.translation = translations;
  tables_.shift = shifts;
  tables_.image_bits = 0;
  while (std::int64_t{1} << tables_.image_bits < count) ++tables_.image_bits;
}

void NeighborSearch::list_points() {
  const auto images = static_cast<std::int64_t>(image_x_.size());
  const float half[3] = {float(0.5 * width_.x), float(0.5 * width_.y), float(0.5 * width_.z)};
  const Points translations{image_x_.data(), image_y_.data(), image_z_.data(), nullptr};
  const float reach = static_cast<float>(radius_ * radius_) * 1.0001f + error_;
  const ListKernel list = vector_kernels().list;
  count_ = 0;
  for (std::size_t j = 0; j < n_atoms_; ++j) {
    if (static_cast<std::int64_t>(points_.x.size()) < count_ + images + kVector)
      points_.resize(2 * (count_ + images + kVector));
    const Vec4& x = tables_.position[j];
    const float atom[3] = {float(x.x - middle_.x), float(x.y - middle_.y), float(x.z - middle_.z)};
    count_ += list(translations, images, atom, half, reach, std::uint32_t(j) << tables_.image_bits,
                   points_.at(count_));
  }
}

void NeighborSearch::sort_into_bins() {
  // Columns along z as wide as the radius, of bins a quarter as long; not many more bins than points.
  const double widths[3] = {width_.x, width_.y, width_.z}, part[3] = {1, 1, 0.25};
  double total = 1;
  for (int a = 0; a < 3; ++a) total *= std::max(1.0, (widths[a] + 2 * radius_) / (part[a] * radius_));
  const double thin = std::max(1.0, std::cbrt(total / (2.0 * static_cast<double>(count_))));
  for (int a = 0; a < 3; ++a) {
    const double span = widths[a] + 2 * radius_;
    bins_[a] = static_cast<std::int32_t>(std::max(1.0, std::floor(span / (part[a] * radius_ * thin))));
    low_[a] = static_cast<float>(-0.5 * span);
    bin_width_[a] = static_cast<float>(span / bins_[a]);
    per_length_[a] = static_cast<float>(bins_[a] / span);
  }
  const auto n_bins = std::size_t(bins_[0]) * bins_[1] * bins_[2];
  start_.resize(n_bins + 2);
  std::fill(start_.begin(), start_.end(), 0);
  bin_.resize(count_);
  const Points points = points_.view();
  for (std::int64_t k = 0; k < count_; ++k) {
    const std::int32_t column = bin_of(0, points.x[k]) * bins_[1] + bin_of(1, points.y[k]);
    bin_[k] = static_cast<std::uint32_t>(column) * bins_[2] + bin_of(2, points.z[k]);
    ++start_[bin_[k] + 2];
  }
  // start_[bin + 1] is where the bin starts, until its points have been put in: then, where it ends.
  std::partial_sum(start_.begin(), start_.end(), start_.begin());
  binned_points_.resize(count_ + kVector);
  for (std::int64_t k = 0; k < count_; ++k) {
    const std::int64_t place = start_[bin_[k] + 1]++;
    binned_points_.x[place] = points.x[k];
    binned_points_.y[place] = points.y[k];
    binned_points_.z[place] = points.z[k];
    binned_points_.code[place] = points.code[k];
  }
  std::int64_t fullest = 0;
  for (std::int32_t column = 0; column < bins_[0] * bins_[1]; ++column) {
    fullest = std::max(
        fullest, start_[(column + 1) * std::int64_t{bins_[2]}] - start_[column * std::int64_t{bins_[2]}]);
  }
  capacity_ = std::min(count_, 9 * fullest);
}

std::int32_t NeighborSearch::bin_of(int axis, float coordinate) const {
  const float bin = (coordinate - low_[axis]) * per_length_[axis];
  return static_cast<std::int32_t>(std::min(std::max(bin, 0.0f), static_cast<float>(bins_[axis] - 1)));
}

std::int64_t NeighborSearch::select(std::uint32_t i, const Bounds& bounds, std::uint32_t* codes,
                                    float* squared, std::int64_t& unsure) const {
  const SelectKernel select = vector_kernels().select;
  const Vec4& x = tables_.position[i];
  const float centre[3] = {float(x.x - middle_.x), float(x.y - middle_.y), float(x.z - middle_.z)};
  if (!binned_) return select(points_.view(), 0, count_, centre, bounds, codes, squared, unsure);

  const Points points = binned_points_.view();
  const auto radius = static_cast<float>(radius_);
  const std::int32_t home[2] = {bin_of(0, centre[0]), bin_of(1, centre[1])};
  // How far the centre is from a column that is `step` bins away.
  const auto gap = [&](int axis, std::int32_t step) {
    const float edge = low_[axis] + bin_width_[axis] * (home[axis] + (step > 0 ? step : step + 1));
    return step == 0 ? 0.0f : std::max(0.0f, step > 0 ? edge - centre[axis] : centre[axis] - edge);
  };
  std::int64_t count = 0;
  for (std::int32_t a = -1; a <= 1; ++a) {
    if (home[0] + a < 0 || home[0] + a >= bins_[0]) continue;
    for (std::int32_t b = -1; b <= 1; ++b) {
      if (home[1] + b < 0 || home[1] + b >= bins_[1]) continue;
      const float gap_x = gap(0, a), gap_y = gap(1, b);
      const float rest = radius * radius - (gap_x * gap_x + gap_y * gap_y);
      if (rest < 0) continue;
      const float reach = std::sqrt(rest);
      const std::int64_t column = (std::int64_t{home[0]} + a) * bins_[1] + home[1] + b;
      const std::int64_t* start = start_.data() + column * bins_[2];
      count += select(points, start[bin_of(2, centre[2] - reach)], start[bin_of(2, centre[2] + reach) + 1],
                      centre, bounds, codes + count, squared ? squared + count : nullptr, unsure);
    }
  }
  return count;
}

void sort_codes(std::uint32_t* codes, std::int64_t count) {
  const std::uint32_t* order = ascending(codes, count);
  Buffer<std::uint32_t>& sorted = sort_space().keys;
  sorted.resize(count);
  for (std::int64_t k = 0; k < count; ++k) sorted[k] = codes[order[k]];
  std::copy(sorted.begin(), sorted.end(), codes);
}

}  // namespace mgt
