"""A metric: the largest error anywhere.

lightning-toys fit -c flow_vs_regression/flow --model.metrics my_metric.Worst
"""

from torch import Tensor

from lightning_toys.flow_vs_regression import Metric


class Worst(Metric):
    """max |prediction - truth| over points and outputs, mean over the draws of x0."""

    name = "worst"

    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        """Map predictions (R, K, M, D) and truth (M, D) to (R,)."""
        return (prediction - truth).abs().amax((2, 3)).mean(1)
