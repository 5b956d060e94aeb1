"""What frozen embeddings are good for: linear probe, nearest neighbours, few shots.

Labels are ``(N,)`` class numbers (multi-class), or ``(N, L)`` of 0 and 1 (multi-label). Vectors are ``(N, D)``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger("medvit")

L2 = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # candidates, strongest first
TOLERANCE = 1e-8  # of the greatest component of the gradient
ROWS = 1024  # of the table of cosines made at a time
Metric = Callable[[Tensor, Tensor], float]
Groups = Sequence[Any] | None


# --- linear probe


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on standardised vectors; float64.

    Attributes:
        mean, scale: ``(D,)``, of the training vectors.
        weight, bias: ``(C, D)`` and ``(C,)``.
        l2: penalty it was fitted with.
        multi_label: one sigmoid per label; otherwise one softmax over the classes.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    l2: float
    multi_label: bool

    def logits(self, x: Tensor) -> Tensor:
        """Vectors ``(N, D)`` to ``(N, C)``."""
        return ((x.to(self.mean) - self.mean) / self.scale) @ self.weight.T + self.bias

    def probabilities(self, x: Tensor) -> Tensor:
        """Vectors ``(N, D)`` to ``(N, C)``."""
        logits = self.logits(x)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def fit_linear_probe(
    x: Tensor,
    y: Tensor,
    *,
    l2: float | None = None,
    classes: int | None = None,
    groups: Groups = None,
    folds: int = 5,
    seed: int = 0,
) -> LinearProbe:
    """Fit ``mean cross-entropy + l2 / 2 * |weight|^2`` by L-BFGS; of several labels the cross-entropies are summed.

    Args:
        x: ``(N, D)``.
        y: labels, see the module.
        l2: penalty above 0; None: the one of :data:`L2` with the least cross-entropy on left-out folds, the stronger of
            equals, sought from the strongest on until one is worse. In scikit-learn's terms ``C = 1 / (l2 * N)``.
        classes: their number, if ``y`` may lack the last; None: what ``y`` holds.
        groups: N names, such as patients; a group is never both in a fold and in what is fitted for it.
        folds: number of folds.
        seed: of the folds.

    Raises:
        ValueError: vectors or labels that do not fit, fewer cases or groups than folds, ``l2`` not above 0.
    """
    x, y, outputs = _checked(x, y, classes)
    if l2 is None:
        l2 = _select_l2(x, y, outputs, grouped_folds(len(x), folds, seed=seed, groups=groups))
    elif l2 <= 0:
        raise ValueError(f"l2 must be above 0, got {l2}; without it separable classes have no solution. Use 0.01")
    mean, scale = _standardisation(x)
    coefficients = _solve((x - mean) / scale, y, outputs, l2)
    return LinearProbe(mean, scale, coefficients[:, :-1], coefficients[:, -1], l2, y.dim() == 2)


def grouped_folds(cases: int, folds: int, *, seed: int = 0, groups: Groups = None) -> Tensor:
    """Number of the fold of each case, ``(N,)``: groups are shuffled and dealt out in turn.

    Raises:
        ValueError: fewer than two folds, or fewer groups than folds.
    """
    if groups is not None and len(groups) != cases:
        raise ValueError(f"groups need one name per case, got {len(groups)} for {cases} cases")
    numbers: dict[Any, int] = {}
    of = [numbers.setdefault(name, len(numbers)) for name in (range(cases) if groups is None else groups)]
    if not 2 <= folds <= len(numbers):
        raise ValueError(
            f"folds must be at least 2 and at most the number of independent groups, got {folds} folds of "
            f"{len(numbers)} groups; use fewer folds, or give l2"
        )
    dealt = torch.empty(len(numbers), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    dealt[torch.randperm(len(numbers), generator=generator)] = torch.arange(len(numbers)) % folds
    return dealt[of]


def _select_l2(x: Tensor, y: Tensor, outputs: int, fold: Tensor) -> float:
    """From the strongest penalty on, as long as that helps: the weaker one is, the longer the solver takes."""
    parts = []
    for number in range(int(fold.max()) + 1):
        inside = fold != number
        mean, scale = _standardisation(x[inside])
        parts.append(((x[inside] - mean) / scale, y[inside], (x[~inside] - mean) / scale, y[~inside]))
    starts: list[Tensor | None] = [None] * len(parts)
    best, least = L2[0], float("inf")
    for l2 in L2:
        loss = 0.0
        for i, (fitted, known, held_out, truth) in enumerate(parts):
            coefficients = starts[i] = _solve(fitted, known, outputs, l2, start=starts[i])
            loss += float(_cross_entropy(_apply(coefficients, held_out), truth).sum())
        if loss > least:
            break
        if loss < least:
            best, least = l2, loss
    return best


def _solve(x: Tensor, y: Tensor, outputs: int, l2: float, start: Tensor | None = None) -> Tensor:
    """Coefficients ``(outputs, D + 1)``, the bias last; the problem is convex, where it starts does not matter."""
    if x.shape[1] > 4 * len(x):  # a weight across all vectors would change no logit: few directions are enough
        span = torch.linalg.qr(x.T).Q
        within = None if start is None else torch.cat([start[:, :-1] @ span, start[:, -1:]], 1)
        found = _solve(x @ span, y, outputs, l2, within)
        return torch.cat([found[:, :-1] @ span.T, found[:, -1:]], 1)
    coefficients = x.new_zeros(outputs, x.shape[1] + 1) if start is None else start.clone()
    coefficients.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [coefficients],
        max_iter=1000,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = _cross_entropy(_apply(coefficients, x), y).mean() + l2 / 2 * coefficients[:, :-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        objective()
    gradient = coefficients.grad
    if gradient is not None and gradient.abs().max() > 1000 * TOLERANCE:
        logger.warning("linear probe with l2=%g: L-BFGS stopped at a gradient of %.2g", l2, gradient.abs().max())
    return coefficients.detach()


def _apply(coefficients: Tensor, x: Tensor) -> Tensor:
    return x @ coefficients[:, :-1].T + coefficients[:, -1]


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each case, ``(N,)``."""
    if y.dim() == 1:
        return F.cross_entropy(logits, y, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(dim=1)


def _standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each component, 1 where it is constant."""
    scale = x.std(dim=0, correction=0)
    return x.mean(dim=0), torch.where(scale > 1e-12 * x.abs().amax(dim=0), scale, 1.0)


def _checked(x: Tensor, y: Tensor, classes: int | None) -> tuple[Tensor, Tensor, int]:
    """Float64 vectors, int64 class numbers or float64 labels, and the number of outputs."""
    if x.dim() != 2 or len(x) != len(y) or not len(x):
        raise ValueError(f"vectors (N, D) need as many labels, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.isfinite().all():
        raise ValueError("vectors must be finite, got NaN or infinity")
    x = x.detach().cpu().double()
    y = y.detach().cpu()
    if y.dim() == 2:
        if not ((y == 0) | (y == 1)).all() or not y.shape[1]:
            raise ValueError(f"labels (N, L) must be 0 or 1, got {sorted(set(y.flatten().tolist()))[:5]}")
        return x, y.double(), y.shape[1]
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.min() < 0:
        raise ValueError(f"class numbers must be whole numbers from 0, (N,), got {y.dtype} of shape {tuple(y.shape)}")
    y = y.long()
    outputs = max(2, int(y.max()) + 1) if classes is None else classes
    if int(y.max()) >= outputs:
        raise ValueError(f"class numbers must be below classes={outputs}, got {int(y.max())}")
    return x, y, outputs


# --- nearest neighbours


def knn(
    x: Tensor, y: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07, classes: int | None = None
) -> Tensor:
    """Vote of the k nearest vectors by cosine, each weighing ``exp(cosine / temperature)``, as DINO is evaluated.

    Args:
        x: ``(N, D)``, vectors that vote.
        y: their labels, see the module.
        queries: ``(M, D)``.
        k: number of neighbours.
        temperature: see above.
        classes: see :func:`fit_linear_probe`.

    Returns:
        ``(M, C)`` shares of the votes: they sum to 1 over classes; of labels each lies in [0, 1].

    Raises:
        ValueError: vectors or labels that do not fit, ``k`` beyond the number of vectors.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018), 3.4;
    facebookresearch/dino.
    """
    x, y, outputs = _checked(x, y, classes)
    if not 1 <= k <= len(x):
        raise ValueError(f"k must be from 1 to the number of vectors {len(x)}, got {k}")
    if queries.dim() != 2 or queries.shape[1] != x.shape[1] or not queries.isfinite().all():
        raise ValueError(f"queries must be finite, (M, {x.shape[1]}), got shape {tuple(queries.shape)}")
    votes = F.one_hot(y, outputs).double() if y.dim() == 1 else y
    known = F.normalize(x, dim=1)
    asked = F.normalize(queries.detach().cpu().double(), dim=1)
    shares = asked.new_empty(len(asked), outputs)
    for i in range(0, len(asked), ROWS):
        cosine, nearest = (asked[i : i + ROWS] @ known.T).topk(k, dim=1)
        weight = (cosine / temperature).softmax(dim=1)
        shares[i : i + ROWS] = (weight[..., None] * votes[nearest]).sum(dim=1)
    return shares


# --- few shots


class FewShot(NamedTuple):
    """A metric over draws of the training cases, the test cases being the same.

    Attributes:
        mean: over the draws.
        low, high: 95 % interval of that mean (Student's t): it speaks of draws, not of other test cases.
        deviation: standard deviation over the draws: how far one draw strays.
        values: one per draw.
    """

    mean: float
    low: float
    high: float
    deviation: float
    values: tuple[float, ...]


def draw_shots(y: Tensor, k: int, draws: int, *, seed: int = 0, groups: Groups = None) -> list[Tensor]:
    """Indices of ``k`` cases of every class, ``draws`` times; of multi-label data draw for one label at a time.

    Args:
        y: ``(N,)`` class numbers.
        k: cases per class.
        draws: number of draws.
        seed: of the draws.
        groups: N names, such as patients: the ``k`` cases of a class are of ``k`` different ones.

    Raises:
        ValueError: a class with too few cases or groups, labels of another shape, ``k`` or ``draws`` below 1.
    """
    if y.dim() != 1 or not len(y):
        raise ValueError(
            f"shots need one class number per case, got shape {tuple(y.shape)}; draw for one label at a time"
        )
    if k < 1 or draws < 1:
        raise ValueError(f"k and draws must be at least 1, got k={k} and draws={draws}")
    if groups is not None and len(groups) != len(y):
        raise ValueError(f"groups need one name per case, got {len(groups)} for {len(y)} cases")
    generator = torch.Generator().manual_seed(seed)
    shots = []
    for _ in range(draws):
        order = torch.randperm(len(y), generator=generator).tolist()
        chosen: list[int] = []
        for label in sorted(set(y.tolist())):
            # of a group the case that comes first in this order
            first = {(i if groups is None else groups[i]): i for i in reversed(order) if y[i] == label}
            if len(first) < k:
                raise ValueError(f"k={k} needs as many cases or groups of every class, class {label} has {len(first)}")
            ranked = sorted(first.values(), key=order.index)
            chosen += ranked[:k]
        shots.append(torch.tensor(chosen))
    return shots


def few_shot(
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    metric: Metric,
    *,
    k: int,
    draws: int = 20,
    seed: int = 0,
    groups: Groups = None,
    l2: float | None = None,
) -> FewShot:
    """Linear probes on ``k`` cases per class, each judged on the same test cases.

    Args:
        x: ``(N, D)``, what is drawn from.
        y: ``(N,)`` class numbers.
        test_x: ``(M, D)``.
        test_y: ``(M,)``.
        metric: of ``test_y`` and the probabilities ``(M, C)``.
        k: cases per class.
        draws: number of draws, at least 2.
        seed: of the draws, and of the folds within them.
        groups: see :func:`draw_shots`.
        l2: see :func:`fit_linear_probe`; None chooses within each draw, which needs some shots.

    Raises:
        ValueError: see :func:`draw_shots` and :func:`fit_linear_probe`; a single draw.
    """
    if draws < 2:
        raise ValueError(f"an interval over draws needs at least 2 of them, got {draws}; use 20")
    classes = max(int(y.max()), int(test_y.max()), 1) + 1
    values = []
    for shots in draw_shots(y, k, draws, seed=seed, groups=groups):
        of = None if groups is None else [groups[i] for i in shots.tolist()]
        probe = fit_linear_probe(x[shots], y[shots], l2=l2, classes=classes, groups=of, seed=seed)
        values.append(float(metric(test_y, probe.probabilities(test_x))))
    drawn = torch.tensor(values, dtype=torch.float64)
    mean, deviation = float(drawn.mean()), float(drawn.std())
    reach = float(stats.t.ppf(0.975, draws - 1)) * deviation / draws**0.5
    return FewShot(mean, mean - reach, mean + reach, deviation, tuple(values))
