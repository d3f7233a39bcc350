"""scripts/start_model.py: a tokenizer and a model from your text, which tgdpo.py then takes."""

import json

import torch
import transformers

import start_model
import tgdpo
from conftest import write_rows

ROWS = [{"prompt": "Which one? ", "chosen": f"the brown fox number {i}", "rejected": "nothing"} for i in range(8)]


def test_from_text_to_a_model_that_tgdpo_trains(tmp_path, capsys):
    data, out = str(write_rows(tmp_path / "p.jsonl", ROWS)), tmp_path / "tiny"
    argv = ["--dataset", data, "--output", str(out), "--steps", "60", "--vocab_size", "300", "--max_length", "64"]
    assert start_model.main(argv) == 0
    assert f"--model_name_or_path {out} --dataset {data}" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert len(tokenizer) == model.config.vocab_size <= 300 and model.config.n_positions == 64
    text = "Ünïcode “quotes” and 日本"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    # It has read the text: a response of the data is likelier than its words turned round.
    pairs, _ = tgdpo.tokenize([ROWS[0], ROWS[0] | {"chosen": "number fox brown the 0"}], tokenizer, 64, "t")
    logps = []
    for pair in pairs:
        ids = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])
        logps.append(-model(input_ids=ids, labels=ids).loss.item())
    assert logps[0] > logps[1] + 0.5
    run = tmp_path / "run"
    assert tgdpo.main(["--model_name_or_path", str(out), "--dataset", data, "--max_steps", "1", "--loss", "dpo",
                       "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(run)]) == 0  # fmt: skip
    assert json.loads((run / "run.json").read_text())["finished"]


def test_what_cannot_be_used_is_one_line(tmp_path, capsys):
    data = str(write_rows(tmp_path / "p.jsonl", ROWS))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    new = ["--dataset", data, "--output", str(tmp_path / "new")]
    for argv, found in (
        (["--dataset", data, "--output", str(tmp_path / "full")], "exists already; expected a new directory"),
        (["--dataset", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "new")], "none.jsonl"),
        ([*new, "--steps", "0"], "--steps is 0; expected at least 1"),
        ([*new, "--vocab_size", "20"], "--vocab_size is 20; expected at least 300"),
        (["--dataset", data], "required: --output"),
        (["--dataset", str(write_rows(tmp_path / "odd.jsonl", [{"text": "a"}])), *new[2:]], "scripts/convert.py"),
    ):
        assert start_model.main(argv) == 2
        error = capsys.readouterr().err
        assert found in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists() and (tmp_path / "full" / "mine").exists()
