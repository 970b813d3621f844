// Crystals picked from the shards of a dataset into one batch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "buffer.hpp"
#include "geometry.hpp"

namespace mgt {

// The columns of one shard: n crystals with N atoms. They are borrowed, may be a file that is mapped into
// memory, and need not be aligned.
struct Shard {
  std::int64_t count, num_atoms;  // n, N
  const std::int32_t* atom_ptr;   // (n + 1) first atom of each crystal, and N at the end
  const std::uint8_t* numbers;    // (N) atomic numbers
  const double* frac_coords;      // (N, 3)
  const double* cell;             // (n, 3, 3) lattice vectors as rows, Å
  const std::uint8_t* pbc;        // (n) bit i: periodic along lattice vector i
};

struct GatheredCrystals {
  Buffer<std::int64_t> numbers;    // (N)
  Buffer<Vec3> frac_coords;        // (N)
  Buffer<Mat3> cell;               // (B)
  Buffer<std::int64_t> batch_ptr;  // (B + 1)
  Buffer<bool> pbc;                // (B, 3)
};

// A shard whose columns do not fit together any more: its file was changed while it was mapped.
class ShardChanged : public std::runtime_error {
 public:
  explicit ShardChanged(std::int64_t crystal)
      : std::runtime_error("the dataset was changed while it was open"), crystal(crystal) {}
  std::int64_t crystal;
};

class CrystalReader {
 public:
  explicit CrystalReader(std::vector<Shard> shards);

  std::int64_t size() const { return first_crystal_.back(); }

  // The crystals at `indices`, each in [0, size()), in that order. Never reads outside the columns, whatever
  // they hold. Throws ShardChanged.
  GatheredCrystals gather(const std::int64_t* indices, std::int64_t count) const;

 private:
  std::vector<Shard> shards_;
  std::vector<std::int64_t> first_crystal_;  // of each shard, and size() at the end
};

}  // namespace mgt
