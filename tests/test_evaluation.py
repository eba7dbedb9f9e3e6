import pytest
import torch
from conftest import TINY

from apm import APM, APMConfig
from apm.evaluation import RowLog, adapt_batches, row_columns, summarise
from apm.tta import TestTimeTrainer

COLUMNS = ["index", "label"]


def open_log(path, run=None):
    return RowLog(path, COLUMNS, run or {"seed": 1})


def test_rows_survive_and_runs_do_not_mix(tmp_path):
    path = tmp_path / "rows.csv"
    open_log(path).append([{"index": 0, "label": 3}, {"index": 2, "label": 5}])
    log = open_log(path)
    assert log.done == {0, 2} and log.rows[1] == {"index": 2, "label": 5}
    with pytest.raises(ValueError, match="another run"):
        open_log(path, {"seed": 2})


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_half_written_row_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "rows.csv"
    open_log(path).append([{"index": 0, "label": 3}, {"index": 1, "label": 7}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    log = open_log(path)
    assert log.done == {0}
    log.append([{"index": 1, "label": 7}])
    assert path.read_bytes() == whole


FOREIGN = (b"", b"other,columns\n1,2\n", b"index,label\n1,x\n", b"index,label\n1\n")


@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_or_damaged_tables_are_refused(tmp_path, content):
    path = tmp_path / "rows.csv"
    open_log(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.csv"):
        open_log(path)


class Forgetful(TestTimeTrainer):
    """Runs out of memory with more than two students, of the device or of the CPU."""

    def adapt_many(self, images, targets, seeds):
        if len(images) > 4:
            raise torch.OutOfMemoryError("no memory")
        if len(images) > 2:
            torch.empty(1 << 60)
        return super().adapt_many(images, targets, seeds)


def load(index):
    generator = torch.Generator().manual_seed(index)
    return torch.rand(3, 56, 56, generator=generator), torch.randn(16, generator=generator)


def run(kind, parallel):
    student = APM(APMConfig(**TINY | {"pooling": "mean"}))
    trainer = kind(student, iterations=2, learning_rate=1e-3)
    return {
        index: adapted.losses
        for indices, many, _ in adapt_batches(trainer, range(7), parallel, load, seed=10)
        for index, adapted in zip(indices, many, strict=True)
    }


def test_out_of_memory_halves_the_students_and_goes_on(caplog):
    expected, halved = run(TestTimeTrainer, 1), run(Forgetful, 8)
    assert "4 students" in caplog.text and "2 students" in caplog.text
    assert list(halved) == list(expected) == list(range(7))
    for index, losses in halved.items():
        assert losses == pytest.approx(expected[index], rel=1e-4)


def test_the_table_by_hand():
    report_at = (1, 2)
    rows = [
        dict(zip(row_columns(report_at), values, strict=True))
        for values in (
            # index label teacher student_1 student_2 loss_1 loss_2 seconds
            (0, 5, 5, 1, 5, 4.0, 1.0, 2.0),
            (1, 6, 2, 6, 2, 2.0, 1.0, 4.0),
            (2, 7, 7, 7, 7, 0.0, 1.0, 3.0),
            (3, 8, 8, 8, 1, 0.0, 1.0, 3.0),
        )
    ]
    table = summarise(rows, report_at)
    assert table["teacher_top1"] == 75 and table["seconds_per_image"] == 3
    assert table["iterations"] == [
        {"iteration": 1, "student_top1": 75, "agreement": 50, "loss": 1.5},
        {"iteration": 2, "student_top1": 50, "agreement": 75, "loss": 1.0},
    ]
