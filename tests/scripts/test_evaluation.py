import torch
from evaluation import image_row, row_columns, summarise

from apm.tta import Adaptation


class CosineTeacher:
    """Classes along the axes."""

    def logits(self, embeddings, classes):
        return embeddings @ classes.T


def test_a_row_by_hand():
    pooled_at = {1: torch.tensor([0.0, 1.0]), 2: torch.zeros(2), 3: torch.tensor([0.5, 0.0])}
    adapted = Adaptation([1.0, 1.0, 1.0], pooled_at, {})
    target = torch.tensor([1.0, 0.0])
    row = image_row(7, 1, target, adapted, 2.00001, CosineTeacher(), torch.eye(2), (1, 3))
    assert list(row) == row_columns((1, 3))
    assert row == {
        **{"index": 7, "label": 1, "teacher": 0, "student_1": 1, "student_3": 0},
        **{"loss_1": 1.0, "loss_3": 0.125, "seconds": 2.0},
    }


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
