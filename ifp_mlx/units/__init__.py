"""What can be kept or left out of a model: kinds of units, model families, masks over units."""
