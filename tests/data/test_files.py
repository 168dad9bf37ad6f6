from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from riemvae.data import files as files_module
from riemvae.data import read_array, write_array

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(5, 3)) * np.array([1.0, 1e-12, 1e9])
LABELS = {
    "integers": np.array([3, 1, 2, 1, 0]),
    "floats": np.array([0.5, 1.0, 2.0, 3.0, 4.0]),
    "text": np.array(["a", "b, c", 'd "e"', "line\nbreak", "é"]),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("suffix", [".npz", ".csv", ".CSV"])
def test_round_trip_with_labels(tmp_path, suffix, labels):
    path = tmp_path / f"data{suffix}"
    write_array(path, TABLE, LABELS[labels], label="site")
    read = read_array(path, label="site" if suffix != ".npz" else None)
    np.testing.assert_array_equal(read.x, TABLE)
    np.testing.assert_array_equal(read.y, LABELS[labels])
    assert read.y.dtype.kind == LABELS[labels].dtype.kind
    assert read.columns == (("x0", "x1", "x2") if suffix != ".npz" else None)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_round_trip_of_images_keeps_dtype(tmp_path, suffix, dtype):
    x = RNG.integers(0, 255, size=(4, 1, 8, 8)).astype(dtype)
    path = tmp_path / f"images{suffix}"
    write_array(path, x)
    read = read_array(str(path))
    np.testing.assert_array_equal(read.x, x)
    assert read.x.dtype == dtype and read.y is None and read.columns is None
    assert os.listdir(tmp_path) == [path.name]


def test_npz_keys(tmp_path):
    path = tmp_path / "many.npz"
    np.savez(path, train=TABLE, test=TABLE[:2], y=np.arange(5), target=np.arange(5) * 2)
    with pytest.raises(ValueError, match="keys train, test, y, target"):
        read_array(path)
    np.testing.assert_array_equal(read_array(path, key="train").y, np.arange(5))
    np.testing.assert_array_equal(read_array(path, key="train", label="target").y, np.arange(5) * 2)
    with pytest.raises(ValueError, match="expected 2 labels"):
        read_array(path, key="test")
    with pytest.raises(ValueError, match="'train', 'test', 'y', 'target'"):
        read_array(path, key="x")
    with pytest.raises(ValueError, match=r"label in many\.npz"):
        read_array(path, label="labels")
    np.savez(path, images=TABLE, y=np.arange(5))
    np.testing.assert_array_equal(read_array(path).x, TABLE)


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_files_that_could_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.savez("b.npz", x=np.array([Payload()], dtype=object))
    with open("c.npy", "wb") as file:
        pickle.dump(Payload(), file)
    for name in ("a.npy", "b.npz", "c.npy"):
        with pytest.raises(ValueError, match=f"{name}: expected a numpy"):
            read_array(name)
    assert not os.path.exists("ran")
    with pytest.raises(ValueError, match="run code"):
        write_array("d.npz", TABLE, np.array([Payload()] * 5, dtype=object))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 7, 60, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    write_array(path, TABLE)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"cut{suffix}: expected a numpy"):
        read_array(path)


CSV = {
    "header": ("a,b\n1,2\n3,4\n", ("a", "b")),
    "no_header": ("1,2\n3,4\n", None),
    "semicolons": ("a;b\n1;2\n3;4", ("a", "b")),
    "tabs": ("1\t2\n3\t4\n", None),
    "windows": ('\ufeff"a","b"\r\n1, 2\r\n\r\n3e0,+4.0\r\n', ("a", "b")),
    "blank_start": ("\n\na,b\n1,2\n3,4\n", ("a", "b")),
}


@pytest.mark.parametrize("name", CSV)
def test_csv_dialects(tmp_path, name):
    text, columns = CSV[name]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    read = read_array(path)
    np.testing.assert_array_equal(read.x, [[1.0, 2.0], [3.0, 4.0]])
    assert read.columns == columns


def test_csv_with_numbers_for_names_is_read_when_the_label_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("0,1,digit\n5,6,7\n")
    read = read_array(path, label="digit")
    np.testing.assert_array_equal(read.x, [[5.0, 6.0]])
    assert read.y.tolist() == [7] and read.columns == ("0", "1")


BAD_CSV = {
    "text": (
        "age,site\n1,2\n3,north\n",
        None,
        "t.csv, line 3, 'site': expected a number, got the text 'north'",
    ),
    "text_without_header": ("1,2\n3,north\n", None, "line 2, 'column 2'"),
    "empty_cell": ("a,b\n1,\n", None, "line 2, 'b': expected a number, got an empty cell"),
    "nan": ("a,b\n1,2\n\nnan,4\n", None, "line 4, 'a': expected a finite number, got nan"),
    "ragged": ("a,b\n1,2\n3\n", None, "line 3: expected 2 columns, got 1"),
    "long": ("1,2\n3,4,5\n", None, "line 2: expected 2 columns, got 3"),
    "header_alone": ("a,b\n", None, "a header alone"),
    "empty": ("\n \n", None, "an empty file"),
    "no_such_label": ("a,b\n1,2\n", "y", "label in t.csv: expected one of 'a', 'b'"),
    "label_without_header": ("1,2\n", "y", "without a header"),
    "labels_alone": ("y\n1\n", "y", "at least one row"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_bad_csv_is_refused_by_line_and_column(tmp_path, name):
    text, label, message = BAD_CSV[name]
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_array(path, label=label)
    assert message in str(error.value)


def test_foreign_bytes_are_refused_as_csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="UTF-8"):
        read_array(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    write_array(path, TABLE)

    def fail(file, *_args, **_kwargs):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files_module.np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_array(path, TABLE + 1)
    np.testing.assert_array_equal(read_array(path).x, TABLE)
    assert os.listdir(tmp_path) == ["a.npy"]


def test_permissions_follow_the_umask(tmp_path):
    write_array(tmp_path / "a.npy", TABLE)
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.npy").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    "call",
    [
        lambda p: read_array(p / "a.txt"),
        lambda p: write_array(p / "a.pt", TABLE),
        lambda p: write_array(p / "a.npy", TABLE, np.arange(5)),
        lambda p: write_array(p / "a.npz", TABLE, np.arange(4)),
        lambda p: write_array(p / "a.npz", TABLE[:0]),
        lambda p: write_array(p / "a.npz", TABLE, columns=("a", "b", "c")),
        lambda p: write_array(p / "a.csv", TABLE, columns=("a",)),
        lambda p: write_array(p / "a.csv", TABLE[None]),
        lambda p: write_array(p / "a.csv", TABLE) or read_array(p / "a.csv", key="x"),
        lambda p: write_array(p / "a.npy", TABLE) or read_array(p / "a.npy", key="x"),
        lambda p: write_array(p / "a.npy", TABLE) or read_array(p / "a.npy", label="y"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, call):
    with pytest.raises(ValueError, match="expected"):
        call(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        read_array(tmp_path / "nothing.npz")
