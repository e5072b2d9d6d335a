"""Lets ``from_pretrained`` of diffusers quantize models and read quantized ones: config, quantizer, registration."""
