#include "lattice_frame.hpp"

#include "cell_reduction.hpp"
#include "parallel.hpp"

namespace mgt {

std::vector<Mat3> lattice_frames(const Crystals& crystals, const Motif&, int threads) {
  std::vector<Mat3> frames(crystals.count);
  for_each_crystal(crystals.count, threads, [&](std::int64_t b) {
    Mat3 frame = reduce_cell(crystals, b).basis;
    if (determinant(frame) < 0) frame = {{-frame.row[0], -frame.row[1], -frame.row[2]}};
    frames[b] = frame;
  });
  return frames;
}

}  // namespace mgt
