"""mgt-fast: the Multi-view Graph Transformer for crystals, compiled and fast."""
