import numpy as np
import pytest

from megatron_llama.data.blend import period_table
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.data.mixture_plan import PlannedSource, plan_mixture, read_plan, save_picture, simulate
from parallel.errors import ConfigError, DataError


def test_simulation_counts_every_batch_and_prefix():
    integers, batch = [134, 30, 9, 9, 9, 5, 4], 48
    simulation = simulate(integers, batch)
    series = np.tile(period_table(integers)[0], 60)
    for number, weight in enumerate(integers):
        counts = np.cumsum(series == number)
        deviation = np.abs(counts - weight / 200 * np.arange(1, len(series) + 1)).max()
        assert simulation.deviation[number] == pytest.approx(deviation) and deviation < 1
        batches = (series[: len(series) // batch * batch].reshape(-1, batch) == number).sum(1)
        assert simulation.per_batch[number] == (batches.min(), batches.max())
    assert simulation.period == 200


def test_rows_are_what_the_order_draws():
    sources = [PlannedSource("a", 10_001, 0.7, 2.0), PlannedSource("b", 2_001, 0.3, 1.0)]
    rows, integers = plan_mixture(sources, 9_990, 10)
    assert integers == [7, 3] and [row.tokens for row in rows] == [7_000, 2_990]
    assert [row.exceeds for row in rows] == [False, True]
    rows, integers = plan_mixture(sources, 9_990, 10, "redistribute")
    assert not any(row.exceeds for row in rows) and sum(row.tokens for row in rows) == 9_990
    assert rows[1].tokens == pytest.approx(2_000, abs=10)
    with pytest.raises(ConfigError, match="have 22.0 k|have 22,000 tokens, fewer than 30,000"):
        plan_mixture(sources, 30_000, 10, "redistribute")
    with pytest.raises(DataError, match="c: 5 tokens are too few for a sample of 10"):
        plan_mixture([PlannedSource("c", 5, 1.0)], 100, 10)


def test_sizes_come_from_the_datasets_of_a_run(tmp_path):
    for name, tokens in (("a", 500), ("b", 300)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.arange(tokens))
            writer.finish({"tokens": 123} if name == "b" else None)
    path = tmp_path / "run.toml"
    path.write_text(
        f'[data]\ntrain = [{{prefix = "{tmp_path}/a", weight = 1, max_epochs = 2}}, {{prefix = "{tmp_path}/b", weight = 2}}]'
    )
    assert read_plan(path) == [PlannedSource(f"{tmp_path}/a", 500, 1, 2), PlannedSource(f"{tmp_path}/b", 123, 2)]
    path.write_text(f'data.train = ["{tmp_path}/a", "{tmp_path}/b"]')
    rows, _ = plan_mixture(read_plan(path), 700, 10)
    assert [row.share for row in rows] == [pytest.approx(49 / 61), pytest.approx(12 / 61)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no sources; needed: "),
        ("data = 5", "found no sources"),
        ("sources = [5]", "source 5 has no name"),
        ('[[sources]]\nname = "a"', "source a needs tokens, or the prefix"),
        ('[[sources]]\nname = "a"\ntokens = 5\nwait = 1', "unknown key wait; known are name, prefix, weight"),
        ('[[sources]]\nname = "a"\ntokens = -5', "tokens has to be a number above 0"),
        ('[[sources]]\nname = "a"\ntokens = 5\nweight = 1\n[[sources]]\nname = "b"\ntokens = 5', "some sources have a weight"),
        ("a = = b", "cannot be read"),
    ],
)
def test_what_a_file_lacks(tmp_path, text, message):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match=f"p.toml: .*{message}"):
        read_plan(tmp_path / "p.toml")


def test_picture(tmp_path):
    rows, _ = plan_mixture([PlannedSource("a", 10_001, 0.7, 2.0), PlannedSource("b", 2_001, 0.3, 1.0)], 9_990, 10)
    save_picture(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="cannot write the picture"):
        save_picture(rows, tmp_path / "none" / "p.png")
