import pytest

from riemvae.inference.history import History

ROWS = [{"epoch": 0, "train_loss": 3.0}, {"epoch": 1, "train_loss": 2.0, "num_diverged": 1}]


def test_history_reads_by_epoch_and_by_column():
    history = History(ROWS)
    assert history[-1] == ROWS[1] and history[:1] == ROWS[:1]
    assert history["train_loss"] == [3.0, 2.0]
    assert history["num_diverged"] == [None, 1]
    assert history.columns == ["epoch", "train_loss", "num_diverged"]
    assert list(history) == ROWS and len(history) == 2
    assert history == History(ROWS) and history != ROWS
    assert "2 epochs" in repr(history) and repr(History()) == "History(no epochs)"


def test_an_unknown_column_is_named_beside_those_there_are():
    with pytest.raises(KeyError, match=r"val_loss.*train_loss"):
        History(ROWS)["val_loss"]


def test_rows_are_copies():
    history = History(ROWS)
    history.append(ROWS[0])
    history[2]["epoch"] = 9
    assert ROWS[0]["epoch"] == 0 and len(ROWS) == 2
