"""Small, exact research experiments in PyTorch Lightning."""

__version__ = "0.1.0"
