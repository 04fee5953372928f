import json

from tests.tools.test_data_tools import run

LLAMA = "examples/configs/mixtures/llama-1.toml"


def test_llamas_table(tmp_path):
    code, output, errors = run("plan_mixture", LLAMA, "--tokens", "1.4T", "--picture", tmp_path / "m.png")
    assert (code, errors) == (0, "")
    rows = {line.split()[0]: line.split()[1:3] for line in output.splitlines()[1:8]}
    assert rows == {
        "CommonCrawl": ["67.00%", "1.10"],
        "C4": ["15.00%", "1.06"],
        "Github": ["4.50%", "0.64"],
        "Wikipedia": ["4.50%", "2.45"],
        "Books": ["4.50%", "2.23"],
        "ArXiv": ["2.50%", "1.06"],
        "StackExchange": ["2.00%", "1.03"],
    }
    assert "repeats after 200 samples" in output and "CommonCrawl: 1372 to 1373" in output
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


def test_a_part_of_it_as_json():
    code, output, errors = run("plan_mixture", LLAMA, "--tokens", "100B", "--without", "Books", "--json")
    plan = json.loads(output)
    assert (code, errors) == (0, "") and "Books" not in [row["name"] for row in plan["rows"]]
    assert sum(row["tokens"] for row in plan["rows"]) >= 100e9 and max(plan["simulation"]["deviation"]) < 1
    code, output, errors = run("plan_mixture", LLAMA, "--tokens", "1T", "--without", "Book")
    assert code == 2 and errors.startswith("error: --without Book: the sources are CommonCrawl, C4")


def test_limits(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text("".join(
        f'[[sources]]\nname = "{name}"\nweight = 1\ntokens = {tokens}\nmax_epochs = 4\n'
        for name, tokens in (("large", 10**12), ("small", 10**9))
    ))  # fmt: skip
    code, output, _ = run("plan_mixture", path, "--tokens", "100B")
    assert code == 2 and output.count("exceeded") == 1
    code, output, _ = run("plan_mixture", path, "--tokens", "100B", "--on-cap", "redistribute")
    assert code == 0 and output.index("as configured:") < output.index("exceeded") < output.index("redistributed:")
    assert output.split("redistributed:")[1].split("small")[1].split()[:2] == ["4.00%", "4.00"]
