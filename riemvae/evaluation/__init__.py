"""Scores and pictures of trained models, samplers and latent spaces."""

from riemvae.evaluation.clustering_scores import ClusterMatch, clustering_f1, match_clusters
from riemvae.evaluation.coverage import PrecisionRecall, precision_recall
from riemvae.evaluation.neighbours import Nearest, nearest
from riemvae.evaluation.overfitting import OverfittingCheck, overfitting_check
from riemvae.evaluation.pictures import (
    draw_clusters,
    draw_distance_map,
    draw_geodesic_balls,
    draw_geodesics,
    draw_latent_space,
    draw_overfitting,
    draw_overfitting_distances,
    draw_ranks,
    draw_rows,
    draw_samples,
    draw_strip,
    draw_traces,
    draw_trajectories,
)
from riemvae.evaluation.pictures.likelihood import (
    draw_calibration,
    draw_comparison,
    draw_khat,
    draw_predictive_check,
)
from riemvae.evaluation.pictures.longitudinal import (
    draw_imputation_error,
    draw_latent_trajectories,
    draw_score_intervals,
)
from riemvae.evaluation.pictures.sequences import draw_generated_neighbours, draw_imputation, draw_sequences
from riemvae.evaluation.sequence_neighbours import nearest_sequences

__all__ = [
    "ClusterMatch",
    "Nearest",
    "OverfittingCheck",
    "PrecisionRecall",
    "clustering_f1",
    "draw_calibration",
    "draw_clusters",
    "draw_comparison",
    "draw_distance_map",
    "draw_generated_neighbours",
    "draw_geodesic_balls",
    "draw_geodesics",
    "draw_imputation",
    "draw_imputation_error",
    "draw_khat",
    "draw_latent_space",
    "draw_latent_trajectories",
    "draw_overfitting",
    "draw_overfitting_distances",
    "draw_predictive_check",
    "draw_ranks",
    "draw_rows",
    "draw_samples",
    "draw_score_intervals",
    "draw_sequences",
    "draw_strip",
    "draw_traces",
    "draw_trajectories",
    "match_clusters",
    "nearest",
    "nearest_sequences",
    "overfitting_check",
    "precision_recall",
]
