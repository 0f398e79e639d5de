"""IFP adapters: what training changed in a model, and those that this package ships."""
