"""Small, exact research experiments in PyTorch Lightning."""

__version__ = "0.2.0"
