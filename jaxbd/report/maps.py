"""Two-dimensional maps of trigger distributions (Qiao et al. 2019, Figs. 1b, 3, 5). Pure functions
in NumPy."""

import numpy as np

TSNE_LIMIT = 300
"""Most points for which t-SNE takes only a second or two."""


def pca(samples: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
    """The first two principal components, fitted on `samples` [N, d]; `extra` [M, d] is projected,
    not fitted.

    Returns: [N + M, 2] float, extra points last. A direction without spread is all 0.
    """
    # Differs from released code: the data are centred, as PCA requires; the release does not
    # subtract the mean.
    from sklearn.decomposition import PCA

    fitted, points = _stack(samples, extra)
    if len(fitted) < 2 or not np.ptp(fitted, axis=0).any():
        return np.zeros((len(points), 2))
    return PCA(n_components=2, svd_solver="full").fit(fitted).transform(points)


def tsne(samples: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
    """t-SNE of `samples` [N, d] and `extra` [M, d] together, started from their PCA, seed 0.

    The perplexity is 30, or a third of the number of other points if that is less. Fewer than 4
    points, or points that are all equal, have no neighbourhoods to preserve: their PCA is returned.

    Returns: [N + M, 2] float, extra points last.
    """
    import threadpoolctl
    from sklearn.manifold import TSNE

    _, points = _stack(samples, extra)
    if len(points) < 4 or not np.ptp(points, axis=0).any():
        return pca(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    model = TSNE(n_components=2, init="pca", random_state=0, perplexity=perplexity)
    # t-SNE's loops are short: on a busy machine, waiting for threads costs ten times what they save
    with threadpoolctl.threadpool_limits(1):
        return model.fit_transform(points).astype(float)


def unit_square(points: np.ndarray) -> np.ndarray:
    """Points [N, 2] centred in [0, 1] x [0, 1] and scaled so that the longer axis fills it; both
    axes have the same scale."""
    # Differs from released code: it stretches each axis separately, which distorts distances.
    low, spread = points.min(0), np.ptp(points, axis=0)
    longest = spread.max()
    return 0.5 + (points - low - spread / 2) / (longest if longest > 0 else 1)


def spread_out(points: np.ndarray, min_distance: float) -> np.ndarray:
    """Indices [n] of the `points` [N, 2] to draw: in order, skipping those closer than
    `min_distance` to one already chosen."""
    points = np.asarray(points, float)
    skipped, chosen = np.zeros(len(points), bool), []
    for i, point in enumerate(points):
        if not skipped[i]:
            chosen.append(i)
            skipped |= np.square(points - point).sum(-1) < min_distance**2
    return np.array(chosen, int)


def _stack(samples: np.ndarray, extra: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(`samples`, `samples` followed by `extra`) as finite float64, padded to two columns if
    d = 1."""
    samples = np.asarray(samples, float)
    points = samples if extra is None else np.concatenate([samples, np.asarray(extra, float)])
    points = np.nan_to_num(points, posinf=1.0, neginf=0.0)
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
    return points[: len(samples)], points
