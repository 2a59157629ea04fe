"""The quickstart on a user's own table, from its facts to answers about them: every stage for a few steps."""

import pytest
from runs import EXPERIMENTS

from lm.core.config import load_config
from lm.data.facts.tables import fact_table
from lm.data.loading import load_conversations
from lm.data.sources import load_documents
from lm.pipeline import runner
from lm.runs.workdir import read_json


def test_its_own_table_takes_the_place_of_ours_in_every_stage(tmp_path):
    path = tmp_path / "animals.csv"
    path.write_text("animal,colour\n" + "".join(f"beast{i},c{i % 9}\n" for i in range(60)))
    config = load_config(f"{EXPERIMENTS / 'quickstart.py'}:{path}")
    corpus = config.pretrain.data.corpus
    assert [each["source"] for each in corpus][:2] == [f"facts:{path}", f"quiz:{path}"]
    assert corpus == config.tokenizer.data.corpus == config.evaluate.evaluate.corpus
    assert config.evaluate.evaluate.table == str(path)
    of_table = [each["source"] for each in config.sft.data.sources if ":" in each["source"]]
    text = " ".join(m["content"] for c in load_conversations(",".join(of_table)) for m in c.messages)
    assert "The colour of beast1 is c1." in text and "France" not in text
    assert not any("France" in document.text for document in load_documents(corpus[:2]))


def test_shares_sum_to_one():
    config = load_config(str(EXPERIMENTS / "quickstart.py"))
    for sources in (config.pretrain.data.corpus, config.sft.data.sources):
        assert sum(each["weight"] for each in sources) == pytest.approx(1.0)


@pytest.mark.slow
def test_tiny_runs_from_facts_to_a_report(tmp_path):
    config = load_config(f"{EXPERIMENTS / 'quickstart.py'}:tiny", [f"root={tmp_path / 'run'}"])
    root = runner.run_pipeline(config)
    summary = read_json(root / "evaluate" / "summary.json")
    for model in summary["models"].values():
        assert model["recall"]["facts"] == 32 < len(fact_table().facts)
    assert read_json(root / "pretrain" / "summary.json")["held_out"]["bits_per_byte"] > 0
    assert (root / "report.html").stat().st_size > 10_000
