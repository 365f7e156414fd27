"""Training steps of small networks with their backward pass written out, in place of autograd's.

A step of a small network is mostly overhead: autograd builds a graph and allocates, the optimiser looks its state up,
and weights, gradients and moments of many replicas do not fit in a cache together. Here forward, backward and AdamW
write into standing buffers, and a few replicas at a time run a whole block of steps.

What is written out is the network alone: the objective's mathematics is asked of the objective itself
(:func:`~lightning_toys.manual_steps.terms.record_terms`). Results are those of autograd up to rounding, which the tests
hold for every mode, loss and network option. To take this package out: delete it, and the lines that import it.
"""

from lightning_toys.manual_steps.steps import ManualSteps, is_plain, is_plain_adamw
from lightning_toys.manual_steps.terms import Term, record_terms

__all__ = ["ManualSteps", "Term", "is_plain", "is_plain_adamw", "record_terms"]
