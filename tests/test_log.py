import json

import pytest

from lora_nb.core import LoraError
from lora_nb.log import TrainingLog, joined


@pytest.fixture
def log():
    ys = [.3 + .5 / (1 + i) for i in range(60)]
    return TrainingLog(losses=ys, parts={"subject": ys}, lrs=[1e-3] * 60, times=[.5 * (i + 1) for i in range(60)], seconds=30.,
                       val={"subject": [(0, .8), (20, .5), (40, .42), (60, .4)]}, level=[(0, .8), (25, .5)])


def test_rows_of_every_nth_step(log):
    assert [r["step"] for r in log.table(20)] == [1, 20, 40, 60]
    assert log.table(20)[1]["subject validation"] == .5 and "subject validation" not in log.table(30)[0]


def test_a_curve_is_the_same_bytes_each_time(log): assert log.curve().svg == log.curve().svg


def test_an_empty_log():
    assert TrainingLog()._repr_mimebundle_() == {"text/plain": "TrainingLog(empty)"}
    with pytest.raises(LoraError, match="preview_every"): TrainingLog().preview_grid()
    with pytest.raises(LoraError, match="validate_every"): TrainingLog().levels()


def test_a_table_as_csv(log, tmp_path):
    lines = log.to_csv(tmp_path / "log.csv", every=20).read_text().splitlines()
    assert lines[0] == "step,loss,subject,lr,seconds,subject validation" and len(lines) == 5 and lines[1].endswith(",")


@pytest.mark.parametrize("name, start", (("l.svg", b"<svg"), ("l.png", b"\x89PNG")))
def test_a_curve_as_a_file(log, tmp_path, name, start):
    log.curve(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_the_legend_names_streams_and_validation_once(log):
    figure = log.curve().figure
    assert len(figure.legends) == 1 and figure.axes[0].get_legend() is None
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["subject", "subject, validation"]


def test_phases_are_marked_and_survive_json(log):
    both = joined([log, TrainingLog(losses=[1., 2.], parts={"prior": [1., 2.]}, times=[1., 2.], seconds=2., level=[(0, .3)])])
    assert both.phases == [(60, "phase 2")] and both.level[-1] == (60, .3) and both.times[-1] == 32. and both.seconds == 32.
    assert "phase 2" in both.curve().svg and "phase 2" not in log.curve().svg
    again = TrainingLog(**json.loads(json.dumps(both.to_dict())))
    assert [tuple(p) for p in again.phases] == both.phases and again.curve().svg == both.curve().svg


def test_a_stream_that_begins_at_the_seam_is_drawn(log):
    late = TrainingLog(losses=[.5] * 40, parts={"prior": [.5] * 40})
    (line,) = [a for a in joined([log, late], ["a", "b"]).curve().figure.axes[0].lines if a.get_label() == "prior"]
    assert abs(line.get_ydata()[60:] - .5).max() < 1e-9          # the NaN before the seam poison nothing


def test_one_log_has_no_seam(log): assert joined([log]).phases == [] and joined([]).steps == 0


def test_what_was_not_measured_is_empty_everywhere(log, tmp_path):
    both = joined([log, TrainingLog(losses=[1., 2.], parts={"prior": [1., 2.]})])
    assert json.loads(json.dumps(both.to_dict(), allow_nan=False))["parts"]["prior"][:2] == [None, None]      # JSON has no NaN
    again = TrainingLog(**both.to_dict())
    assert again.parts["prior"][0] != again.parts["prior"][0] and again.parts["prior"][-1] == 2.
    assert "prior" not in both.table(1)[0] and "nan" not in both.to_csv(tmp_path / "l.csv").read_text()


def test_a_table_replaces_tables_only(log, tmp_path):
    log.to_csv(tmp_path / "l.csv"); log.to_csv(tmp_path / "l.csv", every=20)
    (tmp_path / "mine.csv").write_text("name,age\n")
    with pytest.raises(LoraError, match="exists and is no table"): log.to_csv(tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "name,age\n" and len((tmp_path / "l.csv").read_text().splitlines()) == 5
