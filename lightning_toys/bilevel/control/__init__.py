"""Model-based reinforcement learning on small environments."""
