"""From an instruction to the units that are kept: scores, top-k, selectors."""
