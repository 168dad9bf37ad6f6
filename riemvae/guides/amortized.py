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
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from riemvae._checks import argument_error
from riemvae.distributions.charts import is_all_of_space, pointwise
from riemvae.flows.flow import summed_log_det
from riemvae.guides.log_joint import (
    BATCH_DIM,
    ModelStructure,
    examine,
    in_batch,
    is_subsample,
    per_datum,
    site_log_prob,
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
        if full_size != frame.size:
            # The model was handed its subsample: the same scale, whichever indices. They are hidden, or the
            # model would be replayed with them in place of its own.
            with poutine.block(hide=[frame.name]):
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

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if isinstance(module, PyroModule):
            _release(module)
        super().add_module(name, module)

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        _release(self)
        super()._pyro_set_supermodule(name, context)

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
            signature = inspect.signature(_callable(self.model))
            bound = signature.bind(*call.args, **call.kwargs)
            given = set(bound.arguments)
            bound.apply_defaults()  # an argument left out keeps its place
            ordered: list[Any] = []
            for name, value in bound.arguments.items():
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    ordered.extend(value)
                elif name in given or kind is not inspect.Parameter.KEYWORD_ONLY:
                    ordered.append(value)
        except (TypeError, ValueError):
            ordered = [*call.args, *call.kwargs.values()]
        return [call.subsample(value) for value in ordered]

    @staticmethod
    def _encode(encoder: Callable[..., Any], inputs: list[Any]) -> Any:
        """Calls ``encoder`` with as many of the model's arguments as it requires (at least one)."""
        return encoder(*inputs[: required_arguments(encoder)])

    def current_posterior(self, call: GuideCall) -> Any:
        """The encoder's distribution for this call; None for a guide without one."""
        return None

    # -- the support ------------------------------------------------------------------------------------

    @staticmethod
    def _transform(structure: ModelStructure) -> Any:
        """The bijection from ``ℝᵏ`` to the latent's support, None where that is ``ℝᵈ``."""
        if is_all_of_space(structure.support):
            return None
        transform = biject_to(pointwise(structure.support))
        if len(transform.inverse_shape(structure.event_shape)) != 1:
            raise argument_error(
                "model",
                "a latent whose unconstrained coordinates are a vector",
                f"{structure.latent!r} on {structure.support}",
                "reparametrise it in unconstrained coordinates",
            )
        return transform

    def _unconstrained_shape(self, structure: ModelStructure) -> torch.Size:
        """The event shape in unconstrained coordinates: ``(d - 1,)`` for a simplex ``(d,)``."""
        transform = self._transform(structure)
        if transform is None:
            return structure.event_shape
        return torch.Size(transform.inverse_shape(structure.event_shape))

    def encoder_posterior(self, encoder: Callable[..., Any], call: GuideCall) -> TorchDistribution:
        """``q(·|x)`` in unconstrained coordinates: the encoder's distribution, or the normal of its pair."""
        posterior = as_posterior(self._encode(encoder, self._inputs(call)))
        expected = self._unconstrained_shape(call.structure)
        if posterior.event_shape != expected:
            raise argument_error(
                "encoder",
                f"a posterior with event shape {tuple(expected)}, as the model's latent unconstrained",
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


def _release(module: PyroModule) -> None:
    """Makes a module that has run on its own fit to become a part: Pyro knows it by no name afterwards.

    Pyro refuses parts of which parts have run. What it keeps of them is registered anew by the names inside
    the whole; left by the old ones, it could be taken for parameters of the whole.
    """
    parts = [part for part in module.modules() if isinstance(part, PyroModule)]
    if not any(part._pyro_context.used for part in parts):
        return
    for part in parts:
        part._pyro_context = type(part._pyro_context)()
    own = {id(parameter) for parameter in module.parameters()}
    prefix = f"{module._pyro_name}." if module._pyro_name else ""
    store = pyro.get_param_store()
    state: Any = store.get_state()
    old = {n for n, value in state["params"].items() if n.startswith(prefix) and id(value) in own}
    if old:
        # Not name by name: the store fails to delete the second name of a parameter.
        kept: Any = {p: {n: v for n, v in values.items() if n not in old} for p, values in state.items()}
        store.clear()
        store.set_state(kept)


class _Rename(Messenger):
    """Makes the sites of a base guide auxiliary and gives them other names."""

    def __init__(self, suffix: str) -> None:
        super().__init__()
        self.suffix = suffix

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            msg["name"] = msg["name"] + self.suffix
            msg["infer"] = {**(msg["infer"] or {}), "is_auxiliary": True}


class EncodedGuide(AmortizedGuide):
    """A guide that starts from an encoder's draw, or from the draw of another guide of the same latent.

    Args:
        model: The model itself: a module or a function.
        encoder: ``x -> (loc, scale)`` or ``x -> Distribution``, or a guide.
        latent: The name of the latent site.
        given: Values of the model's other latents, or a guide of them.
    """

    # Whether a draw differentiates something, and so has to leave inference mode.
    _differentiates = False

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        *,
        latent: str = "z",
        given: Given | None = None,
    ) -> None:
        super().__init__(model, latent=latent, given=given)
        self.encoder = encoder

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self._differentiates and torch.is_inference_mode_enabled():
            # It leaves the mode and still drops the graph.
            with torch.inference_mode(False), torch.no_grad():
                return super().forward(*map(_ordinary, args), **{k: _ordinary(v) for k, v in kwargs.items()})
        return super().forward(*args, **kwargs)

    def _start(
        self, call: GuideCall, transform: Any
    ) -> tuple[Tensor, Any, Tensor | float, Callable[[], Tensor]]:
        """``u_0``, the encoder's posterior (None where a base guide drew), and the density of its sites.

        That of a base guide is a density of ``z_0 = T(u_0)``: the third value is what has to be added to
        make it one of ``u_0``, the fourth gives it as registered.
        """
        encoder = self.encoder
        name = f"{self.latent}_0"
        if not isinstance(encoder, AmortizedGuide):
            posterior = self.encoder_posterior(encoder, call)
            with call.plates():
                u = pyro.sample(name, posterior, infer={"is_auxiliary": True})
            return u, posterior, 0.0, lambda: posterior.log_prob(u)
        # A guide that is a part of two registers its parameters by the name in the later one, in both.
        with poutine.trace() as captured, _Rename("_0"), encoder._pyro_context:
            # Not looked up in the trace: a guide around this one has renamed its sites once more.
            z: Any = encoder._run(call)[self.latent]
        trace = captured.trace
        u = z if transform is None else transform.inv(z)
        offset = 0.0 if transform is None else log_det(transform, u, z)

        def log_prob() -> Tensor:
            sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not is_subsample(s)]
            kept = call.structure.dims
            terms = [site_log_prob(s, kept) for s in sites if in_batch(s, call.structure.plate)]
            return per_datum(sum(terms[1:], terms[0]), u.shape[:-1])

        return u, None, offset, log_prob

    def _end(self, call: GuideCall, z: Tensor, factor: Tensor, name: str) -> dict[str, Tensor]:
        """Registers ``z``, and by a factor, which every ELBO of Pyro keeps, what its sites lack of it."""
        with call.plates():
            pyro.factor(f"{self.latent}_{name}", factor, has_rsample=True)
            return {self.latent: pyro.sample(self.latent, dist.Delta(z, event_dim=1))}

    def current_posterior(self, call: GuideCall) -> Any:
        """The encoder's distribution for this call, through any guides in between."""
        if isinstance(self.encoder, AmortizedGuide):
            return self.encoder.current_posterior(call)
        return self.encoder_posterior(self.encoder, call)


def log_det(transform: Any, u: Tensor, z: Tensor) -> Tensor:
    """``log|det ∂T/∂u|`` per datum, whatever event the bijection itself declares."""
    return summed_log_det(transform, transform.log_abs_det_jacobian(u, z), u)


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


def rows_of(value: Any, rows: Tensor, n: int) -> Any:
    """Rows of an argument that has one a datum, ``n`` in all; any other as it is."""
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (n,) else value


def _ordinary(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _callable(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn.forward if isinstance(fn, nn.Module) else fn


def required_arguments(encoder: Callable[..., Any]) -> int:
    """How many of the model's arguments an encoder asks for, at least one."""
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
