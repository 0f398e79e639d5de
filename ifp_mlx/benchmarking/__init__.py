"""Measurements of latency: models of given shapes with random weights, timed side by side."""
