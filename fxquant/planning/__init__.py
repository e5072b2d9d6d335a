"""What passes decide: the plan, the precision of each layer, the timestep groups."""
