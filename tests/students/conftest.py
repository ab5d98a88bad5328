"""Settings of the student tests."""

import torch

# Test processes run side by side: with one thread for every core in each of them they wait for one
# another, and networks this small become many times slower.
torch.set_num_threads(1)
