"""The pass my-pass for fxquant."""
