"""The inspector page: one HTML file that shows a quantized model, every pass and every decision."""
