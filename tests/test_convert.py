"""scripts/convert.py: each layout becomes the messages that a reader would write down. tgdpo.py uses all of them."""

import json

import datasets
import pytest

import convert
import tgdpo
from conftest import CHATML, ids, word_tokenizer, write_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TALK = [user("dog ?"), assistant("no ."), user("red cat ?")]
HH = "\n\nHuman: dog ?\n\nAssistant: no .\n\nHuman: red cat ?\n\nAssistant: "
SIDES = dict(chosen="yes .", rejected="no")
LAYOUTS = {  # row -> the prompt's messages; the answers are "yes ." and "no"
    "prompt": (SIDES | dict(prompt="red cat ?"), [user("red cat ?")]),
    "question": (SIDES | dict(question="red cat ?", system="blue"), [system("blue"), user("red cat ?")]),
    "question alone": (SIDES | dict(question="red cat ?", system=""), [user("red cat ?")]),
    "input": (SIDES | dict(input="red cat ?", system="blue"), [system("blue"), user("red cat ?")]),
    "messages": (SIDES | dict(messages=TALK), TALK),
    "messages and system": (SIDES | dict(messages=TALK, system="blue"), [system("blue"), *TALK]),
    "history": (
        SIDES | dict(instruction="red cat ?", input="", system="blue", history=[["dog ?", "no ."]]),
        [system("blue"), *TALK],
    ),
    "instruction and input": (SIDES | dict(instruction="red", input="cat ?"), [user("red\ncat ?")]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "red cat ?"}],
            "system": "blue",
            "chosen": {"from": "gpt", "value": "yes ."},
            "rejected": {"from": "gpt", "value": "no"},
        },
        [system("blue"), user("red cat ?")],
    ),
    "the same system twice": (
        SIDES | dict(prompt=[system("blue"), user("dog ?")], system=" blue"),
        [system("blue"), user("dog ?")],
    ),
    "the same system twice, and a history": (
        SIDES | dict(prompt=[system("blue"), user("red cat ?")], system="blue", history=[["dog ?", "no ."]]),
        [system("blue"), *TALK],
    ),
    "whole conversations": (
        dict(
            prompt="red cat ?",
            chosen=[user("red cat ?"), assistant("yes .")],
            rejected=[user("red cat ?"), assistant("no")],
        ),
        [user("red cat ?")],
    ),
    "transcripts": (dict(chosen=HH + "yes .", rejected=HH + "no"), TALK),
    "JSON": (
        dict(prompt="red cat ?", chosen=json.dumps([assistant("yes .")]), rejected=json.dumps([assistant("no")])),
        [user("red cat ?")],
    ),
    "Python": (SIDES | dict(prompt=str(TALK)), TALK),
    "parts": (SIDES | dict(prompt=[user([dict(type="text", text="red cat ?")])]), [user("red cat ?")]),
}


def converted(tmp_path, rows, *flags):
    """-> the rows that are written."""
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(rows))
    assert convert.main([str(source), str(out), *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout(name, tmp_path, capsys):
    row, prompt = LAYOUTS[name]
    rows = converted(tmp_path, [row])
    assert rows == [dict(prompt=prompt, chosen=[assistant("yes .")], rejected=[assistant("no")])]
    assert "1 rows read, 1 written" in capsys.readouterr().out
    for tokenizer in (word_tokenizer(template=CHATML, eos="<|im_end|>"), word_tokenizer()):
        pairs, counts = tgdpo.tokenize(rows, tokenizer, 64, "test")
        assert counts["used"] == 1 and not counts["dropped"]
        if tokenizer.chat_template:  # else a text answer without a space before it joins the prompt's last word
            want = [token for turn in prompt for token in ids(turn["content"].replace("\n", " \n "))]
            assert [i for i in pairs[0]["prompt_ids"] if i in set(ids("red cat dog blue yes no ? ."))] == [
                i for i in want if i != ids("\n")[0]
            ]
            assert pairs[0]["chosen_ids"][:2] == ids("yes .") and pairs[0]["rejected_ids"][:1] == ids("no")


def test_plain_transcripts_stay_as_they_are(tmp_path):
    """Without a chat template the model reads the transcript itself, and answers behind the last Assistant:."""
    rows = converted(tmp_path, [dict(chosen=HH + "yes .", rejected=HH + "no")], "--plain")
    before = HH.removesuffix(" ")
    assert rows == [dict(prompt=[user(before)], chosen=[assistant(" yes .")], rejected=[assistant(" no")])]
    tokenizer = word_tokenizer()
    pairs, _ = tgdpo.tokenize(rows, tokenizer, 64, "test")
    assert pairs[0]["chosen_ids"] == ids("yes .") + [3] and pairs[0]["rejected_ids"] == ids("no") + [3]
    assert pairs[0]["prompt_ids"] == tokenizer(before).input_ids


def test_what_is_dropped_is_counted_and_what_is_not_used_is_named(tmp_path, capsys):
    good = SIDES | dict(prompt="dog ?", score=3, note="", chosen_rewards=[1.0, 2.0], rejected_rewards=[0.5])
    rows = converted(
        tmp_path,
        [
            good,
            good | dict(tools=[{"name": "clock"}]),
            good | dict(images=["cat.png"]),
            SIDES,
            SIDES | dict(prompt="dog ?", chosen=" "),
            SIDES | dict(prompt="[{'role': 'user', 'content': "),
            SIDES | dict(prompt="dog ?", history=["no"]),
            SIDES | dict(prompt=[system("red"), user("dog ?")], system="blue"),
            SIDES | dict(instruction=[user("dog ?")], input="cat"),
            dict(chosen=HH + "yes .", rejected=HH.replace("dog", "sun") + "no"),
            "dog",
        ],
    )
    assert rows == [
        dict(prompt=[user("dog ?")], chosen=[assistant("yes .")], rejected=[assistant("no")])
        | dict(chosen_rewards=[1.0, 2.0], rejected_rewards=[0.5])
    ]
    text = capsys.readouterr().out
    assert "11 rows read, 1 written" in text and text.count("; dropped 1: ") == 10
    for reason in (
        "a column tools, which is not trained on",
        "a column images, which",
        "no prompt",
        "an empty response",
        "messages as one text that is neither JSON nor Python",
        "a history that is no list",
        "two different system texts",
        "an input that is no text",
        "chosen and rejected differ before their last message",
        "a row is no object",
    ):
        assert f"; dropped 1: {reason}" in text, reason
    assert "columns not used: score\n" in text


def test_where_rows_lie(tmp_path, capsys):
    """Under a key, as the data set viewer sends them, in a table, in a cloned directory, in all that tgdpo.py reads."""
    rows = [SIDES | dict(prompt="dog ?"), SIDES | dict(prompt="red cat ?")]
    files = {
        "data.json": json.dumps({"data": rows}),
        "split.json": json.dumps({"train": rows, "test": rows[:1]}),
        "viewer.json": json.dumps(
            {"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(rows)]}
        ),
        "table.csv": "prompt,chosen,rejected\ndog ?,yes .,no\nred cat ?,yes .,no\n",
        "table.tsv": "prompt\tchosen\trejected\ndog ?\tyes .\tno\nred cat ?\tyes .\tno\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    write_rows(tmp_path / "lines.jsonl", rows)
    (tmp_path / "clone" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    want = ["dog ?", "red cat ?"]
    for name in [*files, "lines.jsonl", "clone", "saved"]:
        flags = ["--split", "rows"] if name == "viewer.json" else []
        out = tmp_path / f"{name}.out.jsonl"
        assert convert.main([str(tmp_path / name), str(out), *flags]) == 0, (name, capsys.readouterr().err)
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"][0]["content"] for row in found] == want, name


def test_real_pairs_have_the_same_tokens(real_pairs, tmp_path):
    rows = tgdpo.load_rows(str(real_pairs), "train")[:60]
    for tokenizer in (word_tokenizer(template=CHATML, eos="<|im_end|>"), word_tokenizer()):
        want, _ = tgdpo.tokenize(rows, tokenizer, 512, "direct")
        found, _ = tgdpo.tokenize([convert.convert(row, False)[0] for row in rows], tokenizer, 512, "converted")
        assert found.to_dict() == want.to_dict()


def test_what_cannot_be_converted_is_one_line(tmp_path, capsys):
    rows = str(write_rows(tmp_path / "rows.jsonl", [SIDES | dict(prompt="dog ?")]))
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "two.json").write_text(json.dumps({"a": [SIDES], "b": [SIDES]}))
    (tmp_path / "empty").mkdir()
    new = str(tmp_path / "new.jsonl")
    for argv, found in (
        ([rows, str(tmp_path / "there.jsonl")], "exists already"),
        ([rows, str(tmp_path / "new.txt")], "is no .jsonl file"),
        ([str(tmp_path / "none.json"), new], "none.json"),
        ([str(tmp_path / "none.csv"), new], "none.csv cannot be used: FileNotFoundError"),
        ([str(tmp_path / "two.json"), new], "rows under the keys a, b; expected one of them as --split"),
        ([str(tmp_path / "empty"), new], "empty"),
        ([str(write_rows(tmp_path / "odd.jsonl", [dict(text="a")])), new], "0 written"),
        ([rows], "the following arguments are required: output"),
    ):
        assert convert.main(argv) == 2, argv
        error = capsys.readouterr().err
        assert found in error and error.count("\n") == 1, error
    assert (tmp_path / "there.jsonl").read_text() == "mine" and not (tmp_path / "new.jsonl").exists()
