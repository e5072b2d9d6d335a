"""Looking at a quantized model: reports and profiles."""
