"""Data: arrays and files in, undoable preprocessing, small real data sets."""

from riemvae.data import generators
from riemvae.data.arrays import as_tensor
from riemvae.data.binarization import DynamicBinarization, binarize
from riemvae.data.files import ArrayFile, read_array, write_array, write_json
from riemvae.data.gathering import in_memory
from riemvae.data.preprocessing import Affine, Identity, Preprocessing, Standardize, infer_preprocessing
from riemvae.data.sequence_files import read_sequences, write_sequences
from riemvae.data.sequence_table import read_long_table, write_long_table
from riemvae.data.sequences import SPLITS, Sequences, SplitSizes
from riemvae.data.small import DigitsSplit, load_digits_split

__all__ = [
    "Affine",
    "ArrayFile",
    "DigitsSplit",
    "DynamicBinarization",
    "Identity",
    "Preprocessing",
    "SPLITS",
    "Sequences",
    "SplitSizes",
    "Standardize",
    "as_tensor",
    "binarize",
    "generators",
    "in_memory",
    "infer_preprocessing",
    "load_digits_split",
    "read_array",
    "read_long_table",
    "read_sequences",
    "write_array",
    "write_json",
    "write_long_table",
    "write_sequences",
]
