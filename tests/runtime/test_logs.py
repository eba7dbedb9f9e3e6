import pytest
from hypothesis import given
from hypothesis import strategies as st

from apm.runtime.logs import RowLog, write_table

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


def test_a_table_is_written_whole(tmp_path):
    write_table(tmp_path / "a.csv", COLUMNS, [{"label": 0.5, "index": 1}, {"index": 2, "label": 3}])
    assert (tmp_path / "a.csv").read_text() == "index,label\n1,0.5\n2,3\n"
    with pytest.raises(KeyError):
        write_table(tmp_path / "a.csv", COLUMNS, [{"index": 1}])
    assert RowLog(tmp_path / "a.csv", COLUMNS).done == {1, 2}


numbers = st.floats(allow_nan=False, allow_infinity=False).map(
    lambda number: float(f"{number:.9g}")
)


@given(
    st.dictionaries(st.integers(0, 10**6), numbers, max_size=8),
    st.integers(0, 200),
    st.sampled_from((0, 500_000, float("inf"))),
)
def test_whatever_is_cut_off_is_written_again(tmp_path_factory, labels, cut, until):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    rows = [{"index": index, "label": label} for index, label in labels.items()]
    RowLog(path, COLUMNS).append(rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len("index,label\n"), len(whole) - cut)])
    log = RowLog(path, COLUMNS, until)
    assert all(row in rows and row["index"] <= until for row in log.rows)
    log.append(row for row in rows if row["index"] not in log.done)
    again = {row["index"]: row["label"] for row in RowLog(path, COLUMNS).rows}
    assert again == labels
