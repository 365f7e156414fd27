"""A window of weights over a drifting stream."""
