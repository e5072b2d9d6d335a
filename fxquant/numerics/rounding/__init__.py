"""Which of its two neighbours each weight is rounded to, decided from what the layer's inputs are like."""
