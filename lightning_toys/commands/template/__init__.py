"""The files that `lightning-toys new NAME` writes, with NAME in the place of "mine"."""
