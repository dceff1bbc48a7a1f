"""A method of your own: radii for medium-shot and few-shot classes. ``compare.yaml`` compares it with the shipped ones.

The few-shot classes have the fewest training samples. An objective says which samples of a batch are perturbed together
and how far. Passes, accumulation, several processes, logs and checkpoints work without another line.
"""

from torch import Tensor

from lightning_ssesam import Objective, Term


class GradedSAM(Objective):
    """Perturbs the weights for the medium-shot and for the few-shot classes. Many-shot classes are trained plainly.

    Args:
        medium_rho: Radius for the medium-shot classes, a finite number >= 0.
        few_rho: Radius for the few-shot classes, a finite number >= 0.
    """

    needs_split = True
    term_names = ("many", "medium", "few")

    def __init__(self, medium_rho: float = 0.1, few_rho: float = 0.2) -> None:
        super().__init__()
        self.medium_rho, self.few_rho = medium_rho, few_rho

    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        """Return a term for each group: the weight of each sample of the batch, and the radius."""
        assert self.split is not None
        groups = (self.split.many, self.split.medium, self.split.few)
        radii = (0.0, self.medium_rho, self.few_rho)
        return tuple(
            Term(group.to(targets.device)[targets].double() / len(targets), rho)
            for group, rho in zip(groups, radii, strict=True)
        )
