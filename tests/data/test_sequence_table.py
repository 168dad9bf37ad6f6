"""Tables with one row a visit: read back as written, sorted, and refused where they contradict themselves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from riemvae.data.sequence_table import read_long_table, write_long_table
from riemvae.data.sequences import Sequences

TABLE = """id,age,score,memory,arm,group
b,70.5,1.5,9,0,control
a,61,NA,8,1,case
b,72,2.5,,0,control
a,60,3.5,7,,case
c,50,,,0,case
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "visits.csv"
    path.write_text(TABLE)
    return path


def read(path, **options):
    return read_long_table(path, "id", "age", features=["score", "memory"], **options)


def check(data):
    assert data.subjects == ("b", "a", "c")
    assert data.times.tolist() == [[70.5, 72.0], [60.0, 61.0], [50.0, 50.0]]
    assert data.observed.tolist() == [[True, True], [True, True], [False, False]]
    assert data.pixel_mask[:2].tolist() == [[[True, True], [True, False]], [[True, True], [False, True]]]
    assert data.batch()["x"].tolist() == [[[1.5, 9], [2.5, 0]], [[3.5, 7], [0, 8]], [[0, 0], [0, 0]]]
    assert data.covariates.tolist() == [[0.0], [1.0], [0.0]]
    assert (data.labels.tolist(), data.label_names) == ([1, 0, 0], ("case", "control"))
    assert data.x.dtype == data.covariates.dtype == torch.float32
    assert data.times.dtype == torch.float64


def test_rows_in_any_order_become_sorted_visits(table):
    check(read(table, covariates=["arm"], label="group"))


@pytest.mark.parametrize("sign", [";", "\t"])
def test_other_separators_and_a_byte_order_mark(tmp_path, sign):
    path = tmp_path / "visits.csv"
    path.write_text("\ufeff" + TABLE.replace(",", sign), encoding="utf-8")
    check(read(path, covariates=["arm"], label="group"))


def test_a_pandas_table_is_the_same(table):
    pandas = pytest.importorskip("pandas")
    check(read(pandas.read_csv(table), covariates=["arm"], label="group"))


def test_a_csv_needs_no_pandas_and_other_files_name_the_extra(table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    check(read(table, covariates=["arm"], label="group"))
    (tmp_path / "visits.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"riemvae\[tables\]"):
        read(tmp_path / "visits.parquet")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a,61", "a,60", r"rows 2 and 4: expected one row a subject and time, got two of 'a' at 60; merge"),
        ("70.5", "May 3", r"row 1, 'age': expected a number, got 'May 3'; turn dates into numbers"),
        ("70.5", "", r"row 1, 'age': expected a time, got an empty cell"),
        ("b,70.5", ",70.5", r"row 1, 'id': expected a subject, got an empty cell"),
        ("1.5", "high", r"row 1, 'score': expected a number, got 'high'"),
        ("1.5", "inf", r"row 1, 'score': expected a finite number"),
        ("2.5,,0", "2.5,,1", r"row 3, 'arm': expected one value a subject, got 0.0 and then 1.0 for 'b'"),
        ("7,,case", "7,,control", r"row 4, 'group': expected one value a subject, got case and then control"),
        ("c,50,,,0", "c,50,,,", r"column 'arm': expected a value for 'c', got empty cells"),
        ("c,50,,,0,case", "c,50,,,0", r"row 5 of visits.csv: expected 6 cells, got 5"),
    ],
)
def test_contradictions_are_named(tmp_path, old, new, message):
    path = tmp_path / "visits.csv"
    assert old in TABLE
    path.write_text(TABLE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read(path, covariates=["arm"], label="group")


def test_columns_and_files_must_be_there(table, tmp_path):
    with pytest.raises(ValueError, match=r"column 'iq': expected one of 'id', 'age'"):
        read_long_table(table, "id", "age", features=["iq"])
    with pytest.raises(ValueError, match="either features= or image="):
        read_long_table(table, "id", "age")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "none.csv")


def test_a_table_reads_back_as_written(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(7, 5, 3)
    data = Sequences.of(
        x,
        observed=torch.rand(7, 5) < 0.7,
        pixel_mask=torch.rand(7, 5, 3) < 0.8,
        times=torch.rand(7, 5).sort(1).values,
        covariates=torch.randn(7, 2),
        labels=["u", "v", "u", "v", "u", "v", "w"],
        subjects=[f"patient {i}" for i in range(7)],
    ).drop_visits(0.0)
    data = data[[i for i in range(7) if data.observed[i].any()]]
    path = tmp_path / "visits.csv"
    names = ["left, right", "b", "c"]
    write_long_table(path, data, features=names, covariates=["age", "dose"])
    back = read_long_table(path, "subject", "time", features=names, covariates=["age", "dose"], label="label")
    assert back.subjects == data.subjects
    assert torch.equal(back.covariates, data.covariates)
    assert [back.label_names[i] for i in back.labels] == [data.label_names[i] for i in data.labels]
    for i in range(len(data)):  # the observed visits, moved together
        seen, count = data.observed[i], int(data.observed[i].sum())
        assert back.observed[i].tolist() == [j < count for j in range(back.num_visits)]
        assert torch.equal(back.times[i, :count], data.times[i, seen])
        assert torch.equal(back.batch()["x"][i, :count], data.batch()["x"][i, seen])
        assert torch.equal(back.pixel_mask[i, :count], data.pixel_mask[i, seen])


def test_a_subject_without_visits_survives(tmp_path):
    data = Sequences(torch.ones(2, 1, 1), torch.tensor([[True], [False]]))
    write_long_table(tmp_path / "visits.csv", data)
    back = read_long_table(tmp_path / "visits.csv", "subject", "time", features=["x0"])
    assert back.observed.tolist() == [[True], [False]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_read_back_as_written(tmp_path, dtype):
    torch.manual_seed(0)
    x = (torch.rand(3, 4, 1, 5, 6) * 255).to(dtype)
    data = Sequences(x, torch.tensor([[True] * 4, [False, True, True, False], [False, False, False, True]]))
    write_long_table(tmp_path / "scans.csv", data, image="scan")
    back = read_long_table(tmp_path / "scans.csv", "subject", "time", image="scan").on_grid(torch.arange(4.0))
    assert back.x.dtype == dtype
    assert torch.equal(back.observed, data.observed)
    assert torch.equal(back.batch()["x"], data.batch()["x"])
    if dtype == torch.float32:
        masked = data.drop_pixels(0.5, seed=0)
        write_long_table(tmp_path / "scans.csv", masked, image="scan")
        back = read_long_table(tmp_path / "scans.csv", "subject", "time", image="scan")
        assert torch.equal(back.pixel_mask[0], masked.pixel_mask[0])


def test_pictures_are_read_with_channels_first(tmp_path):
    image = pytest.importorskip("PIL.Image")
    color = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    image.fromarray(color).save(tmp_path / "a.png")
    (tmp_path / "visits.csv").write_text("id,age,scan\n1,2,a.png\n1,3,\n")
    data = read_long_table(tmp_path / "visits.csv", "id", "age", image="scan")
    assert data.observed.tolist() == [[True, False]]
    np.testing.assert_array_equal(data.x[0, 0].numpy(), np.moveaxis(color, -1, 0))
    image.fromarray(color[..., 0]).save(tmp_path / "b.png")
    (tmp_path / "visits.csv").write_text("id,age,scan\n1,2,a.png\n1,3,b.png\n")
    with pytest.raises(
        ValueError, match=r"row 2, 'scan': expected images of one shape, got \(1, 4, 6\) \(b.png\)"
    ):
        read_long_table(tmp_path / "visits.csv", "id", "age", image="scan")
    (tmp_path / "visits.csv").write_text("id,age,scan\n1,2,c.png\n")
    with pytest.raises(FileNotFoundError, match="row 1, 'scan'"):
        read_long_table(tmp_path / "visits.csv", "id", "age", image="scan")
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"row 1, 'scan': expected an array or a picture, got c\.png"):
        read_long_table(tmp_path / "visits.csv", "id", "age", image="scan")


def test_names_must_fit(tmp_path):
    data = Sequences(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="features: expected 2 names, got 1"):
        write_long_table(tmp_path / "a.csv", data, features=["x"])
    with pytest.raises(ValueError, match="names that differ"):
        write_long_table(tmp_path / "a.csv", data, features=["time", "x"])
    with pytest.raises(ValueError, match="image: expected None for plain columns"):
        write_long_table(tmp_path / "a.csv", data, image="scan")


@pytest.mark.parametrize("times", [(20240131, 20240207), (1700000001, 1700000002)])
def test_dates_as_numbers_keep_their_digits(tmp_path, times):
    path = tmp_path / "a.csv"
    path.write_text("id,t,v\n" + "".join(f"a,{time},1\n" for time in times))
    assert tuple(read_long_table(path, "id", "t", ["v"]).times[0].tolist()) == times


def test_words_are_no_missing_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,t,v,dx\nnone,0,n/a,none\nnone,1,2,\nb,0,None,AD\nb,1,3,NA\n")
    data = read_long_table(path, "id", "t", ["v"], label="dx")
    assert data.subjects == ("none", "b")
    assert [data.label_names[code] for code in data.labels.tolist()] == ["none", "AD"]
    assert data.observed.tolist() == [[False, True], [False, True]]
    path.write_text("id,t,v,dx\na,0,1,none\na,1,2,AD\n")
    with pytest.raises(ValueError, match=r"^row 2, 'dx': expected one value a subject"):
        read_long_table(path, "id", "t", ["v"], label="dx")


@pytest.mark.parametrize("part", ["subjects", "labels"])
def test_a_name_that_would_be_missing_is_not_written(tmp_path, part):
    data = Sequences.of(torch.zeros(2, 1, 1), **{part: ["NA", "b"]})
    with pytest.raises(ValueError, match=r"'NA'.*read as missing"):
        write_long_table(tmp_path / "a.csv", data)
    assert not list(tmp_path.iterdir())


def test_a_header_has_each_name_once(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,v,v,t\na,1,2,0\n")
    with pytest.raises(ValueError, match=r"^header of a.csv: expected each column once, got 'v' twice"):
        read_long_table(path, "id", "t", ["v"])
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"^source: expected each column once, got 't' twice"):
        read_long_table(pandas.DataFrame([[1, 0.0, 1.0]], columns=["id", "t", "t"]), "id", "t", ["t"])


def test_a_name_in_quotes_may_hold_another_separator(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id;t;"x,y"\na;0;1.5\n')
    assert read_long_table(path, "id", "t", ["x,y"]).x.flatten().tolist() == [1.5]


def test_a_picture_that_breaks_off_is_named(tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(255, size=(32, 32), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a.csv").write_text("id,t,scan\na,0,a.png\n")
    with pytest.raises(ValueError, match=r"^row 1, 'scan': expected a whole picture, got a.png"):
        read_long_table(tmp_path / "a.csv", "id", "t", image="scan")
