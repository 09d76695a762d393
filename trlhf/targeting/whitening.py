"""The scale on which features of responses are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray


@dataclass(frozen=True)
class Whitening:
    """Features → points on a sphere: whitened (mean 0, variance 1, uncorrelated), then scaled to length √D.

    The length is dropped because it says how unusual a response is, and little else: with it, the optimal designs
    spend their labels on what is rare (benchmarks/LOG.md).

    Attributes:
        mean: of the features, [F].
        map: [F, D]; whitened = (features - mean) @ map.
    """

    mean: Float[ndarray, " F"]
    map: Float[ndarray, "F D"]

    @classmethod
    def fit(cls, features: Float[ndarray, "N F"], most: int = 512, smallest: float = 0.02) -> Whitening:
        """Fit to features: principal components, without those below ``smallest`` times the largest in spread.

        Args:
            features: N rows of any scale, at least one.
            most: directions kept at most.
            smallest: singular values below this share of the largest are noise, and are left out.
        """
        features = np.asarray(features, float)
        mean = features.mean(0)
        _, spread, directions = np.linalg.svd(features - mean, full_matrices=False)
        kept = min(most, int((spread > smallest * max(spread[0], 1e-12)).sum()))
        return cls(mean, directions[:kept].T / np.maximum(spread[:kept], 1e-12) * np.sqrt(len(features)))

    def __call__(self, features: Float[ndarray, "N F"]) -> Float[ndarray, "N D"]:
        """Return the features on the sphere."""
        white = (np.asarray(features, float) - self.mean) @ self.map
        length = np.linalg.norm(white, axis=1, keepdims=True)
        return np.asarray(white / np.maximum(length, 1e-12) * np.sqrt(white.shape[1]))
