import numpy as np
import pytest
import torch
from evaluation import (
    common_rows,
    image_row,
    mean_and_error,
    print_methods,
    row_columns,
    score,
    summarise,
)

from apm.runtime.logs import RowLog
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
    peer = [
        {"index": index, "label": label, "prediction": prediction, "seconds": 6.0}
        for index, (label, prediction) in enumerate([(5, 5), (6, 6), (7, 7), (8, 8)])
    ]
    costs = {
        "teacher": {"GMACs": 2.0, "peak_GB": 0.6, "seconds": 0.5},
        "apm": {"step_GMACs": 10.0, "pooled_GMACs": 3.0, "peak_GB": 0.4},
        "tpt": {"GMACs": 100.0, "peak_GB": 1.3},
    }
    teachers = {"teacher, single": [5, 2, 7, 8], "teacher, clip80": [5, 6, 7, 2]}
    table = summarise({"tpt": peer, "apm": rows}, teachers, report_at, costs, [0, 1, 2, 3])
    assert table["images"] == 4
    assert table["teacher_top1"] == 75 and table["seconds_per_image"] == 3
    assert table["iterations"] == [
        {"iteration": 1, "student_top1": 75, "agreement": 50, "loss": 1.5},
        {"iteration": 2, "student_top1": 50, "agreement": 75, "loss": 1.0},
    ]
    single, many, tpt, one, two = table["methods"]
    error = 100 * (0.75 * 0.25 / 4) ** 0.5
    assert single == {
        **{"name": "teacher, single", "top1": 75, "top1_error": pytest.approx(error)},
        **{"gain": 0, "gain_error": 0, "agreement": 100, "agreement_error": 0},
        **{"GMACs": 2.0, "peak_GB": 0.6, "seconds": 0.5},
    }
    assert (many["top1"], many["gain"], many["agreement"]) == (75, 0, 50)
    assert many["gain_error"] == pytest.approx(100 * 2**0.5 / 4)  # one gained, one lost
    assert (tpt["name"], tpt["top1"], tpt["gain"], tpt["agreement"]) == ("TPT", 100, 25, 75)
    assert tpt["gain_error"] == pytest.approx(error)
    assert (tpt["GMACs"], tpt["peak_GB"], tpt["seconds"]) == (100, 1.3, 6)
    assert (one["GMACs"], two["GMACs"]) == (2 + 10 + 3, 2 + 20 + 3)
    assert two["peak_GB"] == 0.6 and two["seconds"] == 3.5 and "seconds" not in one


def test_what_is_compared_is_what_all_methods_have(tmp_path):
    logs = {name: RowLog(tmp_path / name, ("index", "x")) for name in ("a", "b")}
    logs["a"].append([{"index": n, "x": n} for n in (3, 1, 2)])
    logs["b"].append([{"index": n, "x": -n} for n in (1, 3, 4)])
    images, rows = common_rows(logs, [4, 3, 1, 0])
    assert images == [1, 3]
    assert [row["x"] for row in rows["a"]] == [1, 3] and [row["x"] for row in rows["b"]] == [-1, -3]


def test_the_error_is_that_of_the_photographs():
    """Over many draws it is the spread of the mean, also where images share a photograph."""
    random = np.random.default_rng(0)
    photographs = np.arange(60) % 20  # three versions of each
    means, errors = [], []
    for _ in range(2000):
        hard = random.random(20)[photographs]  # of a photograph, in all its versions
        mean, error = mean_and_error((random.random(60) > hard).astype(float), photographs)
        means.append(mean)
        errors.append(error)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.06)
    share = np.array([1.0, 0, 0, 1, 1, 0, 1, 1])
    assert mean_and_error(share, range(8)) == pytest.approx((5 / 8, (5 / 8 * 3 / 8 / 8) ** 0.5))


def test_methods_are_printed(capsys):
    row = score("TPT", [1, 1, 2, 2], [1, 1, 2, 0], [2, 2, 2, 2], [0, 1, 2, 3])
    print_methods([row, row | {"seconds": 1.5, "GMACs": 1190.0, "peak_GB": 1.26, "loss": 1e-3}])
    _, one, two = capsys.readouterr().out.splitlines()
    shares = ["75.00", "±", "21.65", "+50.00", "±", "25.00", "50.00", "±", "25.00"]
    assert one.split() == ["TPT", *shares, *"----"]
    assert two.split()[-4:] == ["1.00e-03", "1.500", "1190.00", "1.260"]
