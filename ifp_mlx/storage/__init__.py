"""Files: checkpoints and their tensors, whole-or-nothing writing, where things are kept."""
