"""Random-walk Metropolis for mirror_descent: ``--model.samplers '[own_sampler.RandomWalk,pc_mala]'``."""

from lightning_toys.mirror_descent import Cost, Draws, Sampler


class RandomWalk(Sampler):
    """Random-walk Metropolis on the action, then s' drawn given it; in every problem."""

    def __init__(self, problem, step: float = 1.0, steps: int = 60):
        super().__init__(problem)
        self.step, self.steps = step, steps

    def draw(self, noise):
        """Return pairs (a, s') of as many chains as the noise has."""
        model, clean = self.problem.model, self.problem.joint.clean
        target, a = model.action_target(self.problem.tilted), model.draw_action(noise, clean)
        for _ in range(self.steps):
            new = a + self.step * noise.normal(len(a))
            ratio = (target(new)[0] - target(a)[0]).exp()
            a = new.where(noise.uniform()[0] < ratio, a)
        return Draws(a, model.draw_state(noise, clean, a))

    def cost(self):
        """Return the evaluations per sample."""
        return Cost(prior=1, score=self.steps + 1, value=self.steps + 1, refresh=1)
