"""A guidance rule for mirror_descent: Q of the noised action, held back by abar.

``--model.samplers '[{class_path: Predictor, init_args: {rule: own_rule.Delayed}}]'``
"""

from lightning_toys.mirror_descent import GuidanceRule, action_gradient


class Delayed(GuidanceRule):
    """Adds abar beta grad Q(a) to the score."""

    def affine_term(self, level, beta):
        """Return G and g of the term G x + g."""
        Q = self.reward.action_value(level)
        return action_gradient(level.abar * beta * Q.A, level.abar * beta * Q.b)
