"""Four passes outside of fxquant, written with its public names only."""
