"""Training: data sets, configuration, the loops, and the counting of right and wrong answers."""
