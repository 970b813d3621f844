// Graphs as ComFormer's published builder makes them, for networks trained on those.
#pragma once

#include <cstdint>
#include <vector>

#include "crystals.hpp"
#include "neighbor_list.hpp"

namespace mgt {

struct ComformerGraph {
  // Sorted as usual. An edge between images of one atom stands here as often as the published list has it:
  // twice, or once if rounding let only one of S and -S pass.
  NeighborList edges;
  std::vector<Mat3> frames;  // rows L1, L2, L3, Å
};

// Edges: each atom keeps all with 0.15 Å < d <= d_k, compared exactly; each is listed in both directions.
// (The published search radius grows from 4 Å until every atom has k neighbours; the result does not depend
// on it.) Frame: the first atom's own images up to the longest cell vector, by length; L1 the first, L2 the
// first not parallel to it, L3 the first not coplanar; L2, then L3, is turned round if it makes more
// than 90 degrees with L1, all three if they are left-handed.
//
// Rounding decides which of equal distances come first, so distances are computed step by step as published,
// with positions from a cell rounded to 5 decimals; the vectors returned are exact.
//
// Throws what neighbor_list throws, and CrystalError for a crystal that is not periodic in three directions.
ComformerGraph comformer_graph(const Crystals& crystals, std::int64_t max_neighbors, int threads);

}  // namespace mgt
