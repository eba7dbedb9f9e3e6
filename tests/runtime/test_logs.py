import pytest

from apm.runtime.logs import RowLog

COLUMNS = ["index", "label"]


def test_rows_survive(tmp_path):
    path = tmp_path / "rows.csv"
    RowLog(path, COLUMNS).append([{"index": 0, "label": 3}, {"index": 2, "label": 5}])
    log = RowLog(path, COLUMNS)
    assert log.done == {0, 2} and log.rows[1] == {"index": 2, "label": 5}


def test_rows_after_the_state_that_is_gone_on_from_are_dropped(tmp_path):
    path = tmp_path / "rows.csv"
    RowLog(path, COLUMNS).append({"index": index, "label": 3} for index in range(5))
    assert RowLog(path, COLUMNS, until=2).done == {0, 1, 2} == RowLog(path, COLUMNS).done


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_half_written_row_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "rows.csv"
    RowLog(path, COLUMNS).append([{"index": 0, "label": 3}, {"index": 1, "label": 7}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    log = RowLog(path, COLUMNS)
    assert log.done == {0}
    log.append([{"index": 1, "label": 7}])
    assert path.read_bytes() == whole


FOREIGN = (b"", b"other,columns\n1,2\n", b"index,label\n1,x\n", b"index,label\n1\n")
TWICE = (b"index,label\n1,2\n1,2\n", b"index,label\n1.5,2\n")


@pytest.mark.parametrize("content", FOREIGN + TWICE)
def test_foreign_or_damaged_tables_are_refused(tmp_path, content):
    path = tmp_path / "rows.csv"
    RowLog(path, COLUMNS)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.csv"):
        RowLog(path, COLUMNS)
    assert path.read_bytes() == content
