"""Measuring sub-networks on held-out text."""
