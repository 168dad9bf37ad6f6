"""Transforms of data that can be undone, described in JSON, and saved with the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from riemvae._checks import argument_error, check_choice, check_count, check_finite, check_last_dim
from riemvae._recipe import recipe
from riemvae.data.sequences import Sequences


class Preprocessing(nn.Module):
    """A declared, invertible map from raw data to what the model sees.

    Integer and boolean data become floating-point numbers of torch's default dtype; floating-point data keep
    their dtype. A preprocessing never looks at the batch it is applied to.
    """

    def apply(self, x):  # type: ignore[no-untyped-def]
        """Raw data to model data, of the same shape (a function is applied to the module, as torch does)."""
        # torch's Module.apply(fn) visits every submodule, so that meaning must survive beside ours.
        return self(x) if isinstance(x, Tensor) else super().apply(x)

    def forward(self, x: Tensor) -> Tensor:
        """Raw data to model data."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x)")

    def undo(self, x: Tensor) -> Tensor:
        """Model data to raw data, as floating-point numbers."""
        raise NotImplementedError(f"{type(self).__name__} must define undo(x)")


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


@recipe
class Identity(Preprocessing):
    """Leaves the values alone; integers become floating-point numbers.

    Example:
        >>> Identity().apply(torch.tensor([1, 2]))
        tensor([1., 2.])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return _floating(x)

    def undo(self, x: Tensor) -> Tensor:
        return x


@recipe
class Affine(Preprocessing):
    """``x -> scale x + offset`` with two numbers.

    Args:
        scale: A finite number other than 0.
        offset: A finite number.

    Raises:
        ValueError: A number is not finite, or ``scale`` is 0.

    Example:
        >>> Affine(1 / 255).apply(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([0., 1.])
    """

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("offset", offset)):
            check_finite(name, torch.tensor(float(value)), "pass a number")
        if scale == 0:
            raise argument_error("scale", "a number other than 0", scale, "it could not be undone")
        self.scale = float(scale)
        self.offset = float(offset)

    def forward(self, x: Tensor) -> Tensor:
        return _floating(x) * self.scale + self.offset

    def undo(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"scale={self.scale:g}, offset={self.offset:g}"


@recipe
class Standardize(Preprocessing):
    """Each column to mean 0 and standard deviation 1 over the training set; the numbers are buffers.

    Columns that are constant in the training set are only centred. Columns of codes or binary values belong
    in `skip`.

    Args:
        num_columns: Length of the last dimension.
        skip: Indices of columns left as they are; negative ones count from the end.

    Raises:
        ValueError: A count or an index is out of range; in a call, another number of columns.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> Standardize(2, skip=(1,)).fit(x).apply(x)
        tensor([[-1.,  0.],
                [ 1.,  1.]])
        >>> visits = Sequences.of([[[1.0], [float("nan")], [3.0]]])
        >>> Standardize(1).fit(visits).loc
        tensor([2.], dtype=torch.float64)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, num_columns: int, skip: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_columns = check_count("num_columns", num_columns)
        self.skip = tuple(skip)
        for index in self.skip:
            if not -num_columns <= index < num_columns:
                raise argument_error("skip", f"indices of {num_columns} columns", index)
        self.register_buffer("loc", torch.zeros(num_columns, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(num_columns, dtype=torch.float64))

    def fit(self, x: Tensor | Sequences, nan_policy: str = "raise") -> Standardize:
        """Takes means and population standard deviations from ``x (N, ..., num_columns)``; returns itself.

        Args:
            x: The training set; of :class:`~riemvae.data.Sequences`, what is seen.
            nan_policy: ``"raise"``, or ``"omit"``: NaN is missing, as in sequences, and does not count.

        Raises:
            ValueError: Another number of columns, values that are not finite, a column without values.
        """
        if isinstance(x, Sequences):  # which hold zeros where nothing was seen
            x, nan_policy = torch.where(x.seen, x.x.to(self.loc.dtype), torch.nan), "omit"
        check_last_dim("x", x, self.num_columns)
        check_choice("nan_policy", nan_policy, ["raise", "omit"])
        rows = x.reshape(-1, self.num_columns).to(self.loc.dtype)
        present = ~rows.isnan() if nan_policy == "omit" else torch.ones_like(rows, dtype=torch.bool)
        check_finite("x", rows[present])
        count = present.sum(0)
        if bool((count == 0).any()):
            raise argument_error(
                "x", "at least one value in each column", f"none in column {int(count.argmin())}"
            )
        loc = torch.where(present, rows, 0.0).sum(0) / count
        scale = (torch.where(present, rows - loc, 0.0).square().sum(0) / count).sqrt()
        # Rounding leaves a constant column with a spread of about eps times its mean.
        constant = scale <= 1e-12 * loc.abs().clamp_min(1.0)
        scale = torch.where(constant, 1.0, scale)
        for index in self.skip:
            loc[index], scale[index] = 0.0, 1.0
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        return self

    def forward(self, x: Tensor) -> Tensor:
        check_last_dim("x", x, self.num_columns)
        x = _floating(x)
        return (x - self.loc.to(x.dtype)) / self.scale.to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        check_last_dim("x", x, self.num_columns)
        return x * self.scale.to(x.dtype) + self.loc.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"num_columns={self.num_columns}, skip={self.skip}"


def infer_preprocessing(x: Tensor) -> Preprocessing:
    """The preprocessing that the dtype declares: unsigned 8-bit integers are images, divided by 255.

    Args:
        x: Raw data.

    Returns:
        ``Affine(1 / 255)`` for ``torch.uint8``, `Identity` for every other dtype.

    Example:
        >>> infer_preprocessing(torch.zeros(2, 3, dtype=torch.uint8)), infer_preprocessing(torch.zeros(2, 3))
        (Affine(scale=0.00392157, offset=0), Identity())
    """
    return Affine(1 / 255) if x.dtype == torch.uint8 else Identity()
