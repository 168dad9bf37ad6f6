"""What the geometry is for, on the small sets of the thesis and the talk: long tests that need data.

The folder with ``shapes180.npz`` is named by the environment variable RIEMVAE_DATA.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import riemvae as rv
from riemvae.distributions import InverseVolume, RiemannianUniform
from riemvae.evaluation import clustering_f1, nearest, precision_recall
from riemvae.geometry import VolumeWeightedMetric, distance_matrix, geodesic, k_medoids
from riemvae.sampling import HMC, BatchedMCMC

pytestmark = pytest.mark.slow

PAIRS, INNER_POINTS = 200, 10


def arrays(name):
    """The arrays of a file of the data folder; skips where it is not there."""
    folder = os.environ.get("RIEMVAE_DATA")
    if not folder:
        pytest.skip("RIEMVAE_DATA is not set: it names the folder with the data of the slow tests")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"no file {name} in the folder that RIEMVAE_DATA names")
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def binary(images, threshold):
    return torch.from_numpy(images > threshold).float().unsqueeze(1)


def trained(x, epochs, seed=0, **options):
    ae = rv.zoo.build("rhvae", x.shape[1:], 2, likelihood="bernoulli", seed=seed, **options)
    return ae.fit(x, max_epochs=epochs, batch_size=len(x), learning_rate=1e-3, seed=seed, progress=False)


@pytest.fixture(scope="module")
def shapes():
    """The 180 disks and rings, and a two-dimensional RHVAE of them."""
    x = binary(arrays("shapes180.npz")["x"], 127)
    return x, trained(x, 800, step_size=5e-4, temperature=0.4, regularization=1e-4)


def clearly_positive(differences):
    """The mean of paired differences exceeds two of its standard errors."""
    return float(differences.mean()) > 2 * float(differences.std()) / math.sqrt(len(differences))


@pytest.mark.parametrize("curve", ["geodesic", "volume"])
def test_curves_keep_nearer_to_the_training_images_than_straight_lines(shapes, curve):
    x, ae = shapes
    z = ae.encode(x)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(len(z), (PAIRS,), generator=generator)
    second = (first + 1 + torch.randint(len(z) - 1, (PAIRS,), generator=generator)) % len(z)
    metric = ae.metric if curve == "geodesic" else VolumeWeightedMetric(ae.posterior_metric())
    t = torch.linspace(0, 1, INNER_POINTS + 2)[1:-1]
    straight = z[first] + t[:, None, None] * (z[second] - z[first])

    def along(points):
        decoded = ae.decode(points.flatten(0, 1))
        return nearest(decoded, x).distances.reshape(INNER_POINTS, PAIRS).mean(0)

    assert clearly_positive(
        along(straight) - along(geodesic(metric, z[first], z[second], tolerance=1e-4).evenly(t))
    )


@pytest.mark.parametrize("sampler", ["manifold", "uniform"])
def test_sampling_along_the_metric_beats_the_prior_in_nearness_and_in_reach(shapes, sampler):
    x, ae = shapes
    scores = {}
    for name in ("prior", sampler):
        draws = [ae.sample(len(x), name, seed=seed) for seed in range(5)]
        reach = [precision_recall(x, drawn) for drawn in draws]
        scores[name] = torch.tensor(
            [
                [-float(nearest(drawn, x).distances.mean()) for drawn in draws],
                [score.recall for score in reach],
                [score.coverage for score in reach],
            ]
        )
    for gain in scores[sampler] - scores["prior"]:
        assert clearly_positive(gain)


def inverse_volume(ae):
    return InverseVolume(ae.metric), 30


def filled_uniform(ae):
    """The floor of the posterior metric raised, on a tight ball: with less its modes are too far apart."""
    metric = ae.posterior_metric(regularization=10.0)
    radius = 1.2 * float(torch.linalg.vector_norm(metric.centroids, dim=-1).max())
    return RiemannianUniform(metric, radius), 20


@pytest.mark.parametrize("target", [inverse_volume, filled_uniform])
def test_chains_of_hmc_mix(shapes, target):
    density, leapfrog = target(shapes[1])
    torch.manual_seed(0)
    kernel = HMC(
        density.log_density_and_gradient, 0.05, leapfrog, jitter=0.2, gradient=density.log_density_gradient
    )
    # Exact starts do not make it easier: R-hat is large unless each chain finds every mode by itself.
    mcmc = BatchedMCMC(kernel, 1000, 500, start=density.sample((16,)), thin=40, target_accept=0.8)
    mcmc.run()
    assert float(mcmc.diagnostics()["z"]["r_hat"].max()) < 1.01


def digits_subset(seed):
    """Three random classes of the digits, 40 images of each."""
    digits = load_digits()
    generator = np.random.default_rng(seed)
    classes = generator.choice(10, 3, replace=False)
    index = chosen(digits.target, classes, generator)
    return binary(digits.images[index], 7), digits.target[index]


def chosen(y, classes, generator):
    return np.concatenate([generator.choice(np.flatnonzero(y == c), 40, replace=False) for c in classes])


def test_geodesic_medoids_find_the_classes_of_digits_as_well_as_linear_ones():
    # The configuration was chosen on subsets of other seeds. It does not hold for 0, 1 and 2 of MNIST.
    gains = []
    for seed in range(3):
        x, y = digits_subset(seed)
        ae = trained(x, 400, step_size=2e-3)
        z = ae.encode(x)
        scores = []
        for distances in (torch.cdist(z, z), distance_matrix(ae.covariance_metric(), z)):
            found = [k_medoids(None, 3, distances=distances, seed=start).labels for start in range(3)]
            scores.append(np.mean([clustering_f1(labels, y) for labels in found]))
        gains.append(scores[1] - scores[0])
    assert np.mean(gains) >= 0
