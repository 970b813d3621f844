#include "neighbor_search.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "search_limits.hpp"

namespace mgt {
namespace {

std::int32_t planes_within(const ReducedCell& cell, int a, double length) {
  return a < cell.periodic ? static_cast<std::int32_t>(std::floor(kSearchSlack * length / cell.height[a]))
                           : 0;
}

}  // namespace

MGT_WIDE_VECTORS void squared_distances(std::int64_t count, const double* x, const double* y, const double* z,
                                        Vec3 centre, Vec3 offset, double* out) {
  for (std::int64_t m = 0; m < count; ++m) {
    const double dx = (x[m] - centre.x) + offset.x;
    const double dy = (y[m] - centre.y) + offset.y;
    const double dz = (z[m] - centre.z) + offset.z;
    out[m] = dx * dx + dy * dy + dz * dz;
  }
}

ImageSearch::ImageSearch(const ReducedCell& cell, const WrappedAtoms& atoms, double radius)
    : cell_(cell), atoms_(atoms) {
  // The longest pair vector within the periodic directions bounds the translations that can be needed.
  double longest = 0;
  const auto n_atoms = static_cast<std::int64_t>(atoms.position.size());
  for (std::int64_t i = 0; i < n_atoms; ++i) {
    for (std::int64_t j = i + 1; j < n_atoms; ++j) {
      Vec3 v = atoms.position[j] - atoms.position[i];
      for (int a = cell.periodic; a < 3; ++a) v = v - dot(v, cell.basis.row[a]) * cell.basis.row[a];
      longest = std::max(longest, dot(v, v));
    }
  }
  const double length = kSearchSlack * (radius + std::sqrt(longest));
  std::int32_t most[3];
  for (int a = 0; a < 3; ++a) most[a] = planes_within(cell, a, length);

  struct Image {
    Int3 shift;
    Vec3 vector;
  };
  std::vector<Image> images;
  for (std::int32_t a = -most[0]; a <= most[0]; ++a) {
    for (std::int32_t b = -most[1]; b <= most[1]; ++b) {
      for (std::int32_t c = -most[2]; c <= most[2]; ++c) {
        const Vec3 vector = translation({a, b, c}, cell.basis);
        if (dot(vector, vector) <= length * length)
          images.push_back({combine({a, b, c}, cell.to_given), vector});
      }
    }
  }
  std::sort(images.begin(), images.end(), [](const Image& p, const Image& q) { return p.shift < q.shift; });
  for (const Image& image : images) {
    shifts_.push_back(image.shift);
    images_.push_back(image.vector);
  }
  squared_.resize(images.size());
  hits_.resize(images.size() + 1);
}

BinSearch::BinSearch(const ReducedCell& cell, const WrappedAtoms& atoms, double radius)
    : cell_(cell), atoms_(atoms) {
  const std::size_t n_atoms = atoms.position.size();
  double width[3];
  for (int a = 0; a < 3; ++a) {
    low_[a] = 0;
    width[a] = 1;
  }
  if (cell.periodic < 3) {
    double high[3];
    for (std::size_t i = 0; i < n_atoms; ++i) {
      const Vec3 u = combine(atoms.position[i], cell.inverse);
      const double coordinate[3] = {u.x, u.y, u.z};
      for (int a = cell.periodic; a < 3; ++a) {
        low_[a] = i == 0 ? coordinate[a] : std::min(low_[a], coordinate[a]);
        high[a] = i == 0 ? coordinate[a] : std::max(high[a], coordinate[a]);
      }
    }
    for (int a = cell.periodic; a < 3; ++a) width[a] = std::max(high[a] - low_[a], 1e-3);
  }
  // Bins no wider than the radius, but not many more of them than atoms.
  double wanted[3], total = 1;
  for (int a = 0; a < 3; ++a) {
    wanted[a] = std::max(1.0, std::floor(width[a] * cell.height[a] / (kSearchSlack * radius)));
    total *= wanted[a];
  }
  const double thin = std::max(1.0, std::cbrt(total / static_cast<double>(n_atoms)));
  for (int a = 0; a < 3; ++a) {
    bins_[a] = static_cast<std::int32_t>(std::min(std::max(1.0, std::floor(wanted[a] / thin)), 1024.0));
    scale_[a] = bins_[a] / width[a];
    reach_[a] = static_cast<std::int32_t>(std::ceil(kSearchSlack * radius * scale_[a] / cell.height[a]));
    if (a >= cell.periodic) reach_[a] = std::min(reach_[a], bins_[a] - 1);
  }
  std::vector<std::int64_t> bin(n_atoms);
  start_.assign(std::size_t(bins_[0]) * bins_[1] * bins_[2] + 1, 0);
  for (std::size_t i = 0; i < n_atoms; ++i) {
    bin[i] = flat(bin_of(atoms.position[i]));
    ++start_[bin[i] + 1];
  }
  squared_.resize(*std::max_element(start_.begin(), start_.end()));
  std::partial_sum(start_.begin(), start_.end(), start_.begin());
  std::vector<std::int64_t> next(start_.begin(), start_.end() - 1);
  atom_.resize(n_atoms);
  for (std::size_t i = 0; i < n_atoms; ++i) atom_[next[bin[i]]++] = static_cast<std::int64_t>(i);
  for (const std::int64_t i : atom_) points_.push_back(atoms.position[i]);
}

Int3 BinSearch::bin_of(Vec3 position) const {
  const Vec3 u = combine(position, cell_.inverse);
  const auto index = [&](double coordinate, int a) {
    const double bin = std::floor((coordinate - low_[a]) * scale_[a]);
    return static_cast<std::int32_t>(std::min(std::max(bin, 0.0), bins_[a] - 1.0));
  };
  return {index(u.x, 0), index(u.y, 1), index(u.z, 2)};
}

bool BinSearch::wrap(Int3& bin, Int3& image) const {
  const auto axis = [&](std::int32_t& b, std::int32_t& s, int a) {
    s = 0;
    if (b >= 0 && b < bins_[a]) return true;
    if (a >= cell_.periodic) return false;
    s = b >= 0 ? b / bins_[a] : -((bins_[a] - 1 - b) / bins_[a]);
    b -= s * bins_[a];
    return true;
  };
  return axis(bin.x, image.x, 0) && axis(bin.y, image.y, 1) && axis(bin.z, image.z, 2);
}

}  // namespace mgt
