"""The comparison of arms over seeds: what there is to compare, running it, and the statistics."""
