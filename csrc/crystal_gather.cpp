#include "crystal_gather.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace mgt {

namespace {

// Where one crystal of the batch stands.
struct Place {
  const Shard* shard;
  std::int64_t row, atom;
};

// A batch has crystals from all over a dataset, so nearly every read misses the caches: what a crystal this
// far ahead needs is fetched while others are copied.
constexpr std::int64_t kAhead = 8;

template <class T>
T read(const T* from) {
  T value;
  std::memcpy(&value, static_cast<const void*>(from), sizeof value);
  return value;
}

void prefetch(const void* from) { __builtin_prefetch(from); }

void prefetch_lines(const void* from, std::size_t bytes) {
  constexpr std::size_t kLine = 64, kMost = 16 * kLine;
  const char* begin = static_cast<const char*>(from);
  for (std::size_t k = 0; k < std::min(bytes, kMost); k += kLine) prefetch(begin + k);
}

}  // namespace

CrystalReader::CrystalReader(std::vector<Shard> shards) : shards_(std::move(shards)), first_crystal_{0} {
  for (const Shard& shard : shards_) first_crystal_.push_back(first_crystal_.back() + shard.count);
}

GatheredCrystals CrystalReader::gather(const std::int64_t* indices, std::int64_t count) const {
  std::vector<Place> places(static_cast<std::size_t>(count));
  for (std::int64_t b = 0; b < count; ++b) {
    const auto next = std::upper_bound(first_crystal_.begin(), first_crystal_.end(), indices[b]);
    const auto s = static_cast<std::size_t>(next - first_crystal_.begin() - 1);
    places[b] = {&shards_[s], indices[b] - first_crystal_[s], 0};
    prefetch(places[b].shard->atom_ptr + places[b].row);
  }

  GatheredCrystals batch;
  batch.batch_ptr.resize(static_cast<std::size_t>(count) + 1);
  batch.batch_ptr[0] = 0;
  for (std::int64_t b = 0; b < count; ++b) {
    Place& place = places[b];
    place.atom = read(place.shard->atom_ptr + place.row);
    const std::int64_t end = read(place.shard->atom_ptr + place.row + 1);
    if (place.atom < 0 || end < place.atom || end > place.shard->num_atoms) throw ShardChanged(indices[b]);
    batch.batch_ptr[b + 1] = batch.batch_ptr[b] + (end - place.atom);
  }

  const auto atoms = static_cast<std::size_t>(batch.batch_ptr[count]);
  batch.numbers.resize(atoms);
  batch.frac_coords.resize(atoms);
  batch.cell.resize(static_cast<std::size_t>(count));
  batch.pbc.resize(3 * static_cast<std::size_t>(count));
  for (std::int64_t b = 0; b < count; ++b) {
    if (b + kAhead < count) {
      const Place& ahead = places[b + kAhead];
      const auto n = static_cast<std::size_t>(batch.batch_ptr[b + kAhead + 1] - batch.batch_ptr[b + kAhead]);
      prefetch_lines(ahead.shard->frac_coords + 3 * ahead.atom, n * sizeof(Vec3));
      prefetch_lines(ahead.shard->cell + 9 * ahead.row, sizeof(Mat3));
      prefetch(ahead.shard->numbers + ahead.atom);
      prefetch(ahead.shard->pbc + ahead.row);
    }
    const Place& place = places[b];
    const Shard& shard = *place.shard;
    const std::int64_t first = batch.batch_ptr[b], n = batch.batch_ptr[b + 1] - first;
    std::copy_n(shard.numbers + place.atom, n, batch.numbers.data() + first);
    std::memcpy(static_cast<void*>(batch.frac_coords.data() + first),
                static_cast<const void*>(shard.frac_coords + 3 * place.atom), n * sizeof(Vec3));
    std::memcpy(static_cast<void*>(batch.cell.data() + b),
                static_cast<const void*>(shard.cell + 9 * place.row), sizeof(Mat3));
    for (int axis = 0; axis < 3; ++axis) batch.pbc[3 * b + axis] = shard.pbc[place.row] >> axis & 1;
  }
  return batch;
}

}  // namespace mgt
