"""The Gauss error scheduler of BHCNet."""

import math

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer


class GaussErrorScheduler(Scheduler):
    r"""Lower the learning rate along the Gauss error function.

    \[ \eta(e) = \eta_{\min} + \frac{\eta_{\max} - \eta_{\min}}{2}
       \Big(1 - \operatorname{erf}\big((\beta - \alpha)\, e / E + \alpha\big)\Big) \]

    with e the epochs or updates so far, E = `t_initial`, \(\eta_{\max}\) the rate of the optimiser, \(\eta_{\min}\) =
    `lr_min`. A larger |alpha| stays longer at the first rate, a larger beta longer at the last one.

    Source: Jiang, Chen, Zhang, Xiao (2019), PLoS ONE 14(3): e0214587, doi 10.1371/journal.pone.0214587. Fidelity:
    exact. Differs from the paper: a linear warm-up may precede the curve, and `step_update` follows it within an epoch.

    Args:
        optimizer: The optimiser; its rates are the first ones.
        t_initial: Length of the curve, in epochs or updates; afterwards the rate stays at its end.
        alpha: Start of the piece of the error function, below 0.
        beta: End of this piece, above 0.
        lr_min: Last rate.
        warmup_t: Length of the warm-up, in epochs or updates, before the curve starts.
        warmup_lr_init: First rate of the warm-up.
        t_in_epochs: Whether lengths are epochs, and `step` counts; else they are updates, and `step_update` counts.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        t_initial: float,
        *,
        alpha: float = -3,
        beta: float = 3,
        lr_min: float = 0.0,
        warmup_t: float = 0,
        warmup_lr_init: float = 0.0,
        t_in_epochs: bool = True,
    ) -> None:
        if not t_initial > 0:
            raise ValueError(f"t_initial must be positive, got {t_initial}")
        if not alpha < 0 < beta:
            raise ValueError(f"alpha must be below 0 and beta above it, got {alpha} and {beta}")
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=t_in_epochs)
        self.t_initial, self.alpha, self.beta, self.lr_min = t_initial, alpha, beta, lr_min
        self.warmup_t, self.warmup_lr_init = warmup_t, warmup_lr_init
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: float) -> list[float]:
        """Return the rate of each group of parameters after `t` epochs or updates."""
        if t < self.warmup_t:
            start, share = self.warmup_lr_init, t / self.warmup_t
        else:
            progress = min((t - self.warmup_t) / self.t_initial, 1)
            start, share = self.lr_min, (1 - math.erf((self.beta - self.alpha) * progress + self.alpha)) / 2
        return [start + (lr - start) * share for lr in self.base_values]
