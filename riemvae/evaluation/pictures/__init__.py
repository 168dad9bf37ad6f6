"""Pictures of latent spaces, curves, samples, chains and images; every function returns its axes."""

from riemvae.evaluation.pictures.chains import draw_ranks, draw_traces
from riemvae.evaluation.pictures.curves import draw_distance_map, draw_geodesic_balls, draw_geodesics
from riemvae.evaluation.pictures.images import (
    draw_overfitting,
    draw_overfitting_distances,
    draw_rows,
    draw_strip,
)
from riemvae.evaluation.pictures.latent import (
    draw_clusters,
    draw_latent_space,
    draw_samples,
    draw_trajectories,
)
from riemvae.evaluation.pictures.longitudinal import (
    draw_imputation_error,
    draw_latent_trajectories,
    draw_score_intervals,
)
from riemvae.evaluation.pictures.sequences import draw_generated_neighbours, draw_imputation, draw_sequences

__all__ = [
    "draw_clusters",
    "draw_distance_map",
    "draw_generated_neighbours",
    "draw_geodesic_balls",
    "draw_geodesics",
    "draw_imputation",
    "draw_imputation_error",
    "draw_latent_space",
    "draw_latent_trajectories",
    "draw_overfitting",
    "draw_overfitting_distances",
    "draw_ranks",
    "draw_rows",
    "draw_samples",
    "draw_score_intervals",
    "draw_sequences",
    "draw_strip",
    "draw_traces",
    "draw_trajectories",
]
