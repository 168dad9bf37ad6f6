"""Sequences: a latent a subject, a dynamics to its visits, guides that see only what was observed."""

from riemvae.longitudinal.anchor_posteriors import AnchorMixture, AnchorPosterior
from riemvae.longitudinal.anchored import AnchoredGuide
from riemvae.longitudinal.clustering import (
    cluster_trajectories,
    fit_mixture,
    fit_motions,
    responsibilities,
)
from riemvae.longitudinal.counterfactual import Contrast, contrast, counterfactual, one_hot
from riemvae.longitudinal.dynamics import Dynamics, Trajectory
from riemvae.longitudinal.features import FeatureDecoder, OnFeatures, encode_features
from riemvae.longitudinal.flow_chain import FlowChain
from riemvae.longitudinal.fused import fit_fused_guide
from riemvae.longitudinal.generation import generate
from riemvae.longitudinal.imputation import (
    Imputation,
    ImputationError,
    central_interval,
    imputation_error,
    impute,
)
from riemvae.longitudinal.length_averaged import LengthAveraged
from riemvae.longitudinal.linear_trajectory import LinearTrajectory, TrajectoryEncoder, trajectory_prior
from riemvae.longitudinal.model import LongitudinalVAE
from riemvae.longitudinal.motion import MotionMixture
from riemvae.longitudinal.ode import OdeFlow, VectorField
from riemvae.longitudinal.posterior_draws import LatentDraws, draw_posterior
from riemvae.longitudinal.time_features import TimeFeatures
from riemvae.longitudinal.time_flow import TimeFlow, time_flow
from riemvae.longitudinal.topographic import TopographicLatents, coherence_length
from riemvae.longitudinal.trajectories import ConditionalTrajectories, conditional_trajectories
from riemvae.longitudinal.trajectory_samples import extrapolate, sample_trajectories
from riemvae.longitudinal.visit_dropout import VisitDropout
from riemvae.longitudinal.visit_encoders import GaussianProcessEncoder, TopographicEncoder, VisitEncoder
from riemvae.longitudinal.visits import RepeatedPrior, VisitLatents

__all__ = [
    "AnchorMixture",
    "AnchorPosterior",
    "AnchoredGuide",
    "ConditionalTrajectories",
    "Contrast",
    "Dynamics",
    "FeatureDecoder",
    "FlowChain",
    "GaussianProcessEncoder",
    "Imputation",
    "ImputationError",
    "LatentDraws",
    "LengthAveraged",
    "LinearTrajectory",
    "LongitudinalVAE",
    "MotionMixture",
    "OdeFlow",
    "OnFeatures",
    "RepeatedPrior",
    "TimeFeatures",
    "TimeFlow",
    "TopographicEncoder",
    "TopographicLatents",
    "Trajectory",
    "TrajectoryEncoder",
    "VectorField",
    "VisitDropout",
    "VisitEncoder",
    "VisitLatents",
    "central_interval",
    "cluster_trajectories",
    "coherence_length",
    "conditional_trajectories",
    "contrast",
    "counterfactual",
    "draw_posterior",
    "encode_features",
    "extrapolate",
    "fit_fused_guide",
    "fit_mixture",
    "fit_motions",
    "generate",
    "imputation_error",
    "impute",
    "one_hot",
    "responsibilities",
    "sample_trajectories",
    "time_flow",
    "trajectory_prior",
]
