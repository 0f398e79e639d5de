"""Files: checkpoints and their tensors, whole-or-nothing writing, where things are kept."""

import os

# What reads tokenizers advises to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
