"""From a model and one call of it to an FX graph of ATen ops, compared with the model."""
