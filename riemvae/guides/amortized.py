"""What all amortised guides share: the model's structure, plates, what the encoder sees, global values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to

from riemvae._checks import argument_error
from riemvae.guides.log_joint import (
    BATCH_DIM,
    ModelStructure,
    component_support,
    examine,
    is_real,
    is_subsample,
    unconditioned,
)

Given = Mapping[str, Tensor] | Callable[..., Any]


class GuideCall:
    """One call of a guide: the frames of this call's data, entered as often as needed."""

    def __init__(self, structure: ModelStructure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.structure, self.args, self.kwargs = structure, args, kwargs
        self.values: dict[str, Tensor] = {}
        self._plates = [self._plate(frame) for frame in sorted(structure.frames, key=lambda f: f.dim or 0)]

    def _plate(self, frame: Any) -> pyro.plate:
        full_size = frame.full_size or frame.size
        if frame.name in self.structure.subsampled:
            plate = pyro.plate(frame.name, full_size, subsample_size=frame.size, dim=frame.dim)
            self.values[frame.name] = plate.indices
            return plate
        if full_size != frame.size:  # the model was handed its subsample: the same scale, whichever indices
            return pyro.plate(frame.name, full_size, subsample=torch.arange(frame.size), dim=frame.dim)
        return pyro.plate(frame.name, full_size, dim=frame.dim)

    @contextmanager
    def plates(self) -> Iterator[None]:
        """All plates around the latent."""
        with ExitStack() as stack:
            for plate in self._plates:
                stack.enter_context(plate)
            yield

    def subsample(self, x: Any) -> Any:
        """The rows of ``x`` that this call is about, where the model draws its own subsample of it."""
        for plate in self._plates:
            drawn = plate.name in self.structure.subsampled and plate.dim == BATCH_DIM
            if drawn and isinstance(x, Tensor) and x.shape[:1] == (plate.size,):
                return x[plate.indices]
        return x


class AmortizedGuide(PyroModule):
    """A guide of one latent of a Pyro model, amortised by an encoder of the data.

    Args:
        model: The model itself: a module or a function (not a bound method).
        latent: The name of the latent site, with an event ``(d,)`` inside a data plate at dim -1.
        given: What the model's other latents are: a mapping of values, or a guide of them (called with the
            model's arguments, outside the plate). None where there are no others.
    """

    def __init__(self, model: Callable[..., Any], *, latent: str = "z", given: Given | None = None) -> None:
        super().__init__(type(self).__name__)
        if inspect.ismethod(model) and isinstance(model.__self__, nn.Module):
            raise argument_error(
                "model",
                "the module itself",
                f"its bound method {model.__name__!r}, whose parameters nothing would train",
                "pass the module",
            )
        if not callable(model):
            raise argument_error("model", "a Pyro model: a module or a function", model)
        self._model_reference = (model,)  # in a tuple: the model is not a part of the guide
        self.latent = latent
        self.given = given
        self._structures: dict[Any, ModelStructure] = {}

    @property
    def model(self) -> Callable[..., Any]:
        """The model that the guide is of."""
        return self._model_reference[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The model is shared, not copied, unless it was copied before in the same call, as in
        # copy.deepcopy((model, guide)).
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = {k: v for k, v in self.__dict__.items() if k != "_model_reference"}
        new.__dict__.update(copy.deepcopy(state, memo))
        new.__dict__["_model_reference"] = (memo.get(id(self.model), self.model),)
        return new

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self._run(self._begin(args, kwargs))

    def _run(self, call: GuideCall) -> dict[str, Tensor]:
        """Draws the latent within a call, its own or that of the guide that it is the start of."""
        raise NotImplementedError

    def _part(self, name: str) -> Any:
        """A module of the guide without registering it with Pyro, as each plain access would do again."""
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(self, name)

    # -- the data ----------------------------------------------------------------------------------------

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuideCall:
        if not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise argument_error(
                "x",
                "data for the encoder",
                "no tensor at all",
                "to draw from the prior, call the model without this guide",
            )
        structure = self.structure(*args, **kwargs)
        call = GuideCall(structure, args, kwargs)
        call.values.update(self._given_values(structure, args, kwargs))
        return call

    def structure(self, *args: Any, **kwargs: Any) -> ModelStructure:
        """The structure of the model for arguments of these shapes, looked up or read from one run of it."""
        key = (tuple(map(_signature, args)), tuple((k, _signature(v)) for k, v in sorted(kwargs.items())))
        structure = self._structures.get(key)
        if structure is None:
            structure = examine(self.model, self.latent, args, kwargs)
            if len(self._structures) > 64:  # ragged batches: do not grow for ever
                self._structures.clear()
            self._structures[key] = structure
        return structure

    def _given_values(
        self, structure: ModelStructure, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        if not structure.others:
            return {}
        if self.given is None:
            raise unconditioned(list(structure.others))
        values: dict[str, Any]
        if isinstance(self.given, Mapping):
            values = dict(self.given)
            for name in structure.others:
                if name in values:
                    value = torch.as_tensor(values[name])
                    values[name] = pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
        else:
            with poutine.trace() as captured:
                self.given(*args, **kwargs)
            values = {
                name: site["value"]
                for name, site in captured.trace.nodes.items()
                if site["type"] == "sample" and not is_subsample(site)
            }
        missing = [name for name in structure.others if name not in values]
        if missing:
            raise unconditioned(missing)
        return {name: values[name] for name in structure.others}

    def _inputs(self, call: GuideCall) -> list[Any]:
        """The model's arguments in its own order, rows subsampled: what encoders choose from."""
        try:
            bound = inspect.signature(_callable(self.model)).bind(*call.args, **call.kwargs).arguments
            ordered: list[Any] = []
            for value in bound.values():
                ordered.extend(value) if isinstance(value, tuple) else ordered.append(value)
        except (TypeError, ValueError):
            ordered = [*call.args, *call.kwargs.values()]
        return [call.subsample(value) for value in ordered]

    @staticmethod
    def _encode(encoder: Callable[..., Any], inputs: list[Any]) -> Any:
        """Calls ``encoder`` with as many of the model's arguments as it requires (at least one)."""
        return encoder(*inputs[: _required_arguments(encoder)])

    def current_posterior(self, call: GuideCall) -> Any:
        """The encoder's distribution for this call; None for a guide without one."""
        return None

    # -- the support ------------------------------------------------------------------------------------

    @staticmethod
    def _transform(structure: ModelStructure) -> Any:
        """The bijection from ``ℝᵈ`` to the latent's support, None where that is ``ℝᵈ``."""
        if is_real(structure.support):
            return None
        transform = biject_to(component_support(structure.support))
        if transform.inverse_shape(structure.event_shape) != structure.event_shape:
            raise argument_error(
                "model",
                "a latent whose support has as many dimensions as its event",
                f"{structure.latent!r} on {structure.support}",
                "reparametrise it in unconstrained coordinates",
            )
        return transform

    def encoder_posterior(self, encoder: Callable[..., Any], call: GuideCall) -> TorchDistribution:
        """``q(·|x)`` in unconstrained coordinates: the encoder's distribution, or the normal of its pair."""
        posterior = as_posterior(self._encode(encoder, self._inputs(call)))
        if posterior.event_shape != call.structure.event_shape:
            raise argument_error(
                "encoder",
                f"a posterior with event shape {tuple(call.structure.event_shape)}, as the model's latent",
                f"event shape {tuple(posterior.event_shape)}",
            )
        return posterior

    def encoder_distribution(self, *args: Any) -> TorchDistribution:
        """What the encoder says of ``x``, ``(B, d)``: the start of the guide, whatever flow follows.

        Args:
            args: The model's arguments, ``x`` first.
        """
        encoder: Any = self
        while isinstance(encoder, AmortizedGuide):
            encoder = encoder.encoder
        with poutine.block():
            return as_posterior(self._encode(encoder, list(args)))


def as_posterior(result: Any) -> TorchDistribution:
    """An encoder's result as a distribution with event ``(d,)``."""
    if isinstance(result, torch.distributions.Distribution):
        vector: Any = result
        return vector if len(result.event_shape) else vector.to_event(1)  # type: ignore[no-any-return]
    try:
        loc, scale = result
    except (TypeError, ValueError):
        raise argument_error(
            "encoder",
            "a callable x -> (loc, scale) or x -> Distribution",
            f"one that returned {type(result)}",
        ) from None
    return dist.Normal(loc, scale, validate_args=False).to_event(1)  # type: ignore[no-any-return]


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    try:
        hash(value)
    except TypeError:
        return type(value)
    return value


def _callable(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn.forward if isinstance(fn, nn.Module) else fn


def _required_arguments(encoder: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(_callable(encoder)).parameters.values()
    except (TypeError, ValueError):
        return 1
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return max(1, len(required))
