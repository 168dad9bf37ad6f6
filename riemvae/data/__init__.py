"""Data: arrays and files in, undoable preprocessing, small real data sets."""

from riemvae.data.arrays import as_tensor
from riemvae.data.binarization import DynamicBinarization, binarize
from riemvae.data.files import ArrayFile, read_array, write_array, write_json
from riemvae.data.preprocessing import Affine, Identity, Preprocessing, Standardize, infer_preprocessing
from riemvae.data.small import DigitsSplit, load_digits_split

__all__ = [
    "Affine",
    "ArrayFile",
    "DigitsSplit",
    "DynamicBinarization",
    "Identity",
    "Preprocessing",
    "Standardize",
    "as_tensor",
    "binarize",
    "infer_preprocessing",
    "load_digits_split",
    "read_array",
    "write_array",
    "write_json",
]
