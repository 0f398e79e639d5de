"""Text for training, calibration and measuring, from files or the hub."""
