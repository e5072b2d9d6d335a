"""The memory of the process: a bound on its resident set, and files in which tensors lie meanwhile."""
