"""Where a run begins: a decoder's weights, a new vocabulary."""
