"""Mixed logit: a choice model whose coefficients are normal over people, found by empirical Bayes.

The probability that person u chooses the first response of a pair is sigma(x . w + z . b_u), with
differences of features x and z, and priors w ~ N(0, s^2 I) and b_u ~ N(0, diag(v_j)) (random coefficients:
Train 2009, "Discrete choice methods with simulation", chapters 6 and 11). For given variances the most
likely w and b_u are the optimum of a concave function, found by Newton's method. The variances are those
that make the choices most likely, with the posterior as normal around the optimum (MacKay 1992, "Bayesian
interpolation", Neural Computation 4, section 4.4): v_j is the sum over people of b_uj^2, divided by that
of the share of b_uj that the choices determine, which is 1 - its posterior variance / v_j.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

ROUNDS = 20
"""How often variances are set anew, each time after one step of Newton's method."""

LAST_STEPS = 5
"""Steps of Newton's method for the variances found, at most."""

LEAST_GAIN = 1e-6
"""What a step gains in nats, over all choices, before it is the last one."""

LEAST_VARIANCE = 1e-9

HALVINGS = 20


@dataclass
class MixedLogit:
    """What choices say: the weights of all people, how each person differs, and the variances of both.

    Attributes:
        shared: w, [d]. own: b_u, [U, K].
        shared_variance: s^2, []. own_variance: v, [K].
    """

    shared: Tensor
    own: Tensor
    shared_variance: Tensor
    own_variance: Tensor

    def margins(self, x: Tensor, z: Tensor, user: Tensor) -> Tensor:
        """Return x . w + z . b_u of pairs [N], with z [N, K] and user [N] from 0."""
        return x @ self.shared + (z * self.own[user]).sum(dim=1)

    def objective(self, x: Tensor, z: Tensor, user: Tensor) -> Tensor:
        """Return log-likelihood plus log-density of w and all b_u, but for a constant."""
        prior = self.shared.square().sum() / self.shared_variance
        prior = prior + (self.own.square() / self.own_variance).sum()
        return logsigmoid(self.margins(x, z, user)).sum() - 0.5 * prior


def fit_mixed_logit(
    x: Tensor, z: Tensor, user: Tensor, *, n_users: int, spread: float = 1.0
) -> MixedLogit:
    """Fit a mixed logit to choices.

    Args:
        x: features of the chosen response less those of the rejected one, [N, d]. z: the same in the
            directions in which people may differ, [N, K]. user: who chose, [N] int64 from 0.
        spread: factor of the variances v_j found. They tend to be too small where people have few pairs.

    Returns:
        The fit in float64; a person without choices has zeros.
    """
    pairs = Pairs(x.double(), z.double(), user, n_users)
    return pairs.most_likely(pairs.learn_variances(), spread=spread)


def mean_square(total: Tensor, sure: Tensor) -> Tensor:
    """Return the variance of numbers whose squares sum to `total`, of which `sure` are determined."""
    return (total / sure.clamp(min=LEAST_VARIANCE)).clamp(min=LEAST_VARIANCE)


class Pairs:
    """Choices in the order of who chose, people with equally many choices together.

    Args:
        x, z, user, n_users: of `fit_mixed_logit`.
    """

    def __init__(self, x: Tensor, z: Tensor, user: Tensor, n_users: int) -> None:
        self.counts = user.bincount(minlength=n_users)
        self.people = self.counts.argsort(stable=True)  # [U]
        order = self.people.argsort()[user].argsort(stable=True)
        self.x, self.z, self.user = x[order], z[order], user[order]
        self.low = self.x.float()  # for the curvature, which only says which way to go
        # Of people with equally many choices, how many each has, and how many people there are.
        sizes, numbers = self.counts.unique(return_counts=True)
        self.alike = list(zip(sizes.tolist(), numbers.tolist(), strict=True))

    def learn_variances(self) -> MixedLogit:
        """Return the variances under which the choices are most likely, with weights close to theirs."""
        n_users, (n_own, n_shared) = len(self.counts), (self.z.shape[1], self.x.shape[1])
        fit = MixedLogit(
            shared=torch.zeros(n_shared).double(),
            own=torch.zeros(n_users, n_own).double(),
            shared_variance=1.0 / self.x.square().sum(dim=1).mean(),
            own_variance=torch.ones(n_own).double() / self.z.square().sum(dim=1).mean(),
        )
        for _ in range(ROUNDS):
            shared_spread, own_spread = self.newton_step(fit)
            sure = (1.0 - own_spread / fit.own_variance).sum(dim=0)
            fit.own_variance = mean_square(fit.own.square().sum(dim=0), sure)
            sure = (1.0 - shared_spread / fit.shared_variance).sum()
            fit.shared_variance = mean_square(fit.shared.square().sum(), sure)
        return fit

    def most_likely(self, learned: MixedLogit, *, spread: float) -> MixedLogit:
        """Return the weights that are most likely for learned variances, those of people times `spread`."""
        fit = replace(learned, own_variance=spread * learned.own_variance)
        for _ in range(LAST_STEPS):
            before = fit.objective(self.x, self.z, self.user)
            self.newton_step(fit)
            if fit.objective(self.x, self.z, self.user) - before < LEAST_GAIN:
                break
        return fit

    def newton_step(self, fit: MixedLogit) -> tuple[Tensor, Tensor]:
        """Move a fit towards the optimum for its variances, in place.

        The Hessian is a block for w, one for each b_u, and one for w and each b_u: w is solved for first
        (Schur complement).

        Returns:
            Posterior variances of w, [d], and of each b_u for the w found, [U, K].
        """
        chance = fit.margins(self.x, self.z, self.user).sigmoid()
        root, slope = (chance * (1 - chance)).sqrt()[:, None], (1 - chance)[:, None]
        z = root * self.z
        half, block = self._without_own(root.float() * self.low, z, fit.own_variance)
        pull = self._by_user(slope * self.z) - fit.own / fit.own_variance
        one = torch.eye(half.shape[1]).double()
        hessian = (half.T @ half).double() + one / fit.shared_variance
        gradient = self.x.T @ slope[:, 0] - fit.shared / fit.shared_variance
        of_own = (z * torch.einsum("uij,uj->ui", block, pull)[self.user]).sum(dim=1)
        gradient -= self.x.T @ (root[:, 0] * of_own)
        spread = torch.linalg.inv(hessian)
        step = spread @ gradient
        pull -= self._by_user(z * root * (self.x @ step)[:, None])
        self._move(fit, step, torch.einsum("uij,uj->ui", block, pull))
        return spread.diagonal(), block.diagonal(dim1=1, dim2=2)

    def _without_own(self, x: Tensor, z: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return `without_own` of all people: H of all choices [N, d], and covariances [U, K, K]."""
        halves, blocks, start = [], [], 0
        for size, number in self.alike:
            at = slice(start, start + size * number)
            of_x, of_z = (one[at].view(number, size, one.shape[1]) for one in (x, z))
            half, block = without_own(of_x, of_z, variance)
            halves.append(half.flatten(0, 1))
            blocks.append(block)
            start = at.stop
        return torch.cat(halves), torch.cat(blocks)[self.people.argsort()]

    def _by_user(self, values: Tensor) -> Tensor:
        """Sum values of pairs [N, K] over each person's pairs, [U, K]."""
        found = values.new_zeros(len(self.counts), values.shape[1])
        return found.index_add_(0, self.user, values)

    def _move(self, fit: MixedLogit, step: Tensor, steps: Tensor) -> None:
        """Take a step, halved until it does not lead down."""
        before, shared, own = fit.objective(self.x, self.z, self.user), fit.shared, fit.own
        for halving in range(HALVINGS):
            size = 0.5**halving
            fit.shared, fit.own = shared + size * step, own + size * steps
            if fit.objective(self.x, self.z, self.user) >= before:
                return
        fit.shared, fit.own = shared, own


def without_own(x: Tensor, z: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate own weights b ~ N(0, D) of people out of n observations x . w + z . b of variance 1 each.

    Args:
        x: [..., n, d], of any precision, which H has. z: [..., n, K]. variance: the diagonal of D, [K].

    Returns:
        H [..., n, d] with H^T H = x^T (I + z D z^T)^-1 x, the curvature that is left for w, and the
        posterior covariance of b given w, (z^T z + D^-1)^-1 [..., K, K]. The smaller one of n and K is
        factorised, the latter as in Andrews 1968 ("A square root formulation of the Kalman covariance
        equations").
    """
    n, n_own = z.shape[-2:]
    if n < n_own:
        scaled = z * variance
        root = torch.linalg.cholesky(torch.eye(n).to(z) + scaled @ z.mT)
        half = torch.linalg.solve_triangular(root.to(x), x, upper=False)
        own = torch.linalg.solve_triangular(root, scaled, upper=False)
        return half, variance.diag() - own.mT @ own
    scale, one = variance.sqrt(), torch.eye(n_own).to(z)
    scaled = z * scale
    root = torch.linalg.cholesky(one + scaled.mT @ scaled)
    covariance = scale[:, None] * torch.cholesky_inverse(root) * scale
    root, scaled, one = root.to(x), scaled.to(x), one.to(x)
    known = torch.linalg.solve_triangular(root, scaled.mT @ x, upper=False)
    known = torch.linalg.solve_triangular(root.mT + one, known, upper=True)
    return x - scaled @ known, covariance
