"""Training of the sparsity predictor and of the model behind its masks."""
