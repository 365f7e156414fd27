"""A reward of any form and a guidance rule for mirror_descent's mixtures: MixtureSampling.

``--model.reward own_reward.Distance --model.samplers '[mala, {class_path: Predictor, init_args: {rule:
own_reward.Clipped}}]'``
"""

from lightning_toys.mirror_descent import GuidanceRule, Reward


class Distance(Reward):
    """Q(a) = -slope |a - optimum|, whose derivative jumps at the optimum."""

    def __init__(self, slope: float = 2.0, optimum: float = 1.0):
        self.slope, self.optimum = slope, optimum
        self.jumps = (optimum,)

    def value(self, a):
        """Return Q of actions, one row a coordinate."""
        return -self.slope * (a[0] - self.optimum).abs()

    @property
    def breakpoints(self):
        """Return where quadrature has to begin anew."""
        return self.jumps


class Clipped(GuidanceRule):
    """The gradient of Q at the noised action, at most 1 in size, in every problem."""

    def guided_score(self, model, level, beta, x):
        """Return the score with the rule's term added to the action's row."""
        out = model.score(level, x)
        out[:1] += level.value_of(self.reward).scaled(beta).gradient(x[:1]).clamp(-1, 1)
        return out
