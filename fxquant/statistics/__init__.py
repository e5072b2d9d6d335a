"""What observers record of each layer and timestep."""
