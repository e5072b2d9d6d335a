"""Running the observed graph in calls of the model."""
