"""The quantized model that stands where the original stood."""
