"""The quantized model that replaces the original model."""
