"""Rows to tokens: every format with literal token ids, and what users of preference trainers stumble over."""

import gzip
import json
import re

import datasets
import pytest

import tgdpo
from conftest import CHATML, ids, word_tokenizer, write_rows

# three spellings of one pair: "red cat ?" -> "yes ." / "no"
PROMPT, CHOSEN, REJECTED = ids("red cat ?"), ids("yes .") + [3], ids("no") + [3]
USER, YES, NO = [
    dict(role=r, content=c) for r, c in (("user", "red cat ?"), ("assistant", "yes ."), ("assistant", "no"))
]
SHAREGPT = [{"from": f, "value": v} for f, v in (("human", "red cat ?"), ("gpt", "yes ."), ("gpt", "no"))]
FORMATS = {
    "strings": dict(prompt="red cat ?", chosen="yes .", rejected="no"),
    "messages, explicit prompt": dict(prompt=[USER], chosen=[YES], rejected=[NO]),
    "messages, implicit prompt": dict(chosen=[USER, YES], rejected=[USER, NO]),
    "messages, prompt repeated": dict(prompt=[USER], chosen=[USER, YES], rejected=[USER, NO]),
    "UltraFeedback-binarized": dict(
        prompt="red cat ?",
        prompt_id="7",
        messages=[USER, YES],
        chosen=[USER, YES],
        rejected=[USER, NO],
        score_chosen=8.0,
        score_rejected=2.0,
    ),
    "instruction": dict(instruction="red cat ?", chosen="yes .", rejected="no"),
    "instruction, empty input": dict(instruction="red cat ?", input="", chosen="yes .", rejected="no"),
    "from/value": dict(conversations=SHAREGPT[:1], chosen=SHAREGPT[1], rejected=SHAREGPT[2]),
    "from/value, lists": dict(conversations=SHAREGPT[:1], chosen=[SHAREGPT[1]], rejected=[SHAREGPT[2]]),
}


def one(row, tokenizer, max_length=64):
    pairs, _ = tgdpo.tokenize([row], tokenizer, max_length, "test")
    return [pairs[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_without_a_template(name):
    assert one(FORMATS[name], word_tokenizer()) == [PROMPT, CHOSEN, REJECTED]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_with_a_template(name):
    """<|im_start|> user \\n red cat ? <|im_end|> \\n <|im_start|> assistant \\n  ->  yes . <|im_end|> \\n"""
    prompt = [4, *ids("user"), 6, *PROMPT, 5, 6, 4, *ids("assistant"), 6]
    assert one(FORMATS[name], word_tokenizer(template=CHATML, eos="<|im_end|>")) == [
        prompt,
        ids("yes .") + [5, 6],
        ids("no") + [5, 6],
    ]


def test_instruction_with_input_and_history():
    row = dict(instruction="red cat ?", input="one two", chosen="yes .", rejected="no")
    assert one(row, word_tokenizer())[0] == PROMPT + [6] + ids("one two")
    row["history"] = [["dog ?", "no ."]]
    assert one(row, word_tokenizer())[0] == ids("dog ?") + [6] + ids("no .") + [6] + PROMPT + [6] + ids("one two")


HH = dict(
    chosen="\n\nHuman: red cat ?\n\nAssistant: no\n\nHuman: dog ?\n\nAssistant: yes .",
    rejected="\n\nHuman: red cat ?\n\nAssistant: no\n\nHuman: dog ?\n\nAssistant: no",
)


def test_whole_transcripts():
    tokenizer = word_tokenizer(special=("Human:", "Assistant:"))
    vocabulary = tokenizer.get_vocab()
    human, assistant = vocabulary["Human:"], vocabulary["Assistant:"]
    prompt, chosen, rejected = one(HH, tokenizer)
    assert prompt == [6, 6, human, *PROMPT, 6, 6, assistant, *ids("no"), 6, 6, human, *ids("dog ?"), 6, 6, assistant]
    assert (chosen, rejected) == (CHOSEN, REJECTED)
    prompt, chosen, rejected = one(HH, word_tokenizer(template=CHATML, eos="<|im_end|>"))
    turn = lambda who, text: [4, *ids(who), 6, *ids(text), 5, 6]
    assert prompt == turn("user", "red cat ?") + turn("assistant", "no") + turn("user", "dog ?") + [
        4,
        *ids("assistant"),
        6,
    ]
    assert (chosen, rejected) == (ids("yes .") + [5, 6], ids("no") + [5, 6])


def test_several_turns_and_a_system_turn():
    talk = [
        dict(role=r, content=c)
        for r, c in (("system", "blue"), ("user", "dog ?"), ("assistant", "no ."), ("user", "red cat ?"))
    ]
    row = dict(prompt=talk, chosen=[YES], rejected=[NO])
    assert one(row, word_tokenizer())[0] == ids("blue") + [6] + ids("dog ?") + [6] + ids("no .") + [6] + PROMPT
    with_template = one(row, word_tokenizer(template=CHATML))[0]
    assert with_template[:6] == [4, *ids("system"), 6, *ids("blue"), 5, 6]
    own_column = dict(system="blue", conversations=SHAREGPT[:1], chosen=SHAREGPT[1], rejected=SHAREGPT[2])
    assert one(own_column, word_tokenizer())[0] == ids("blue") + [6] + PROMPT


def test_a_template_that_refuses_a_system_turn_gets_it_in_the_first_user_turn():
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    row = dict(prompt=[dict(role="system", content="blue"), USER], chosen=[YES], rejected=[NO])
    assert one(row, word_tokenizer(template=refuses))[0] == [
        4,
        *ids("user"),
        6,
        *ids("blue"),
        6,
        6,
        *PROMPT,
        5,
        6,
        4,
        *ids("assistant"),
        6,
    ]


def test_a_template_that_refuses_the_turns_costs_the_pair_not_the_run(capsys):
    alternate = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('must alternate') }}{% endif %}{% endfor %}"
    )
    rows = [FORMATS["strings"], dict(prompt=[USER, USER], chosen=[YES], rejected=[NO])]
    _, counts = tgdpo.tokenize(rows, word_tokenizer(template=alternate + CHATML), 64, "test")
    assert counts["used"] == 1 and counts["dropped"] == {"the chat template refuses it: must alternate": 1}


def test_templates_that_ask_for_the_date_get_the_same_tokens_every_day():
    dated = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'none' }}" + CHATML
    tokenizer = word_tokenizer(template=dated)
    prompt, _ = tgdpo.render(tokenizer, [USER], ["yes ."])
    assert prompt.startswith("26 Jul 2024<|im_start|>")
    assert tokenizer.chat_template == dated, "the tokenizer that is saved keeps its own template"


@pytest.mark.parametrize("text", ["yes .", "yes . <eos>"])
def test_one_end_token(text):
    assert one(dict(prompt="red cat ?", chosen=text, rejected="no"), word_tokenizer())[1] == CHOSEN
    chat = dict(prompt="red cat ?", chosen=text.replace("<eos>", "<|im_end|>\n"), rejected="no")
    assert one(chat, word_tokenizer(template=CHATML, eos="<|im_end|>"))[1] == ids("yes .") + [5, 6]


def test_a_template_without_an_end_token_gets_one():
    bare = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    assert one(FORMATS["strings"], word_tokenizer(template=bare)) == [PROMPT, CHOSEN, REJECTED]


def test_no_end_token_where_the_tokenizer_has_none():
    assert one(FORMATS["strings"], word_tokenizer(eos=False)) == [PROMPT, ids("yes ."), ids("no")]


@pytest.mark.parametrize("prompt", ["red cat ?", "<bos> red cat ?"])
def test_one_bos(prompt):
    tokenizer = word_tokenizer(bos=True)
    assert one(dict(FORMATS["strings"], prompt=prompt), tokenizer) == [[2] + PROMPT, CHOSEN, REJECTED]
    tokenizer.chat_template = "{{ bos_token }} " + CHATML
    assert one(FORMATS["strings"], tokenizer)[0][:2] == [2, 4]


def test_a_tokenizer_without_bos_gets_none():
    assert one(FORMATS["strings"], word_tokenizer(bos=False))[0] == PROMPT


def test_a_prompt_that_is_formatted_already_is_not_formatted_again():
    text = "<|im_start|>user\nred cat ?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = word_tokenizer(template=CHATML, eos="<|im_end|>")
    got = one(dict(prompt=text, chosen="yes .", rejected="no"), tokenizer)
    assert got == [one(FORMATS["strings"], tokenizer)[0], ids("yes .") + [5], ids("no") + [5]]


def test_an_empty_prompt_begins_with_bos_or_eos():
    row = dict(prompt="", chosen="yes .", rejected="no")
    assert one(row, word_tokenizer())[0] == [3]
    assert one(row, word_tokenizer(bos=True))[0] == [2]
    with pytest.raises(tgdpo.InputError, match="neither BOS nor EOS"):
        one(row, word_tokenizer(eos=False))


def test_the_prompt_is_a_true_prefix_where_tokens_merge_across_the_boundary():
    """A byte-level BPE that knows "ab": "a" + "b" together would be one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    import transformers

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "<eos>": 4}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert one(dict(prompt="ca", chosen="bc", rejected="c"), tokenizer) == [[3, 0], [1, 3, 4], [3, 4]]


def test_cutting_keeps_the_response_then_the_bos_then_the_prompts_right_end():
    row = dict(prompt="red green blue one two", chosen="yes yes yes", rejected="no")
    tokenizer = word_tokenizer(bos=True)
    assert one(row, tokenizer, 8) == [[2] + ids("blue one two"), ids("yes yes yes") + [3], ids("no") + [3]]
    assert one(row, tokenizer, 5) == [[2], ids("yes yes yes") + [3], ids("no") + [3]]
    assert one(row, tokenizer, 3) == [[2], ids("yes yes"), ids("no") + [3]]
    assert one(row, word_tokenizer(), 5) == [ids("two"), ids("yes yes yes") + [3], ids("no") + [3]], (
        "one token must stay"
    )


def test_cut_pairs_are_counted_and_identical_ones_dropped(capsys):
    rows = [dict(prompt="red green blue", chosen="yes yes no", rejected="yes yes yes"), FORMATS["strings"]]
    pairs, counts = tgdpo.tokenize(rows, word_tokenizer(), 3, "pairs.jsonl")
    assert pairs["index"][:] == [1]
    assert counts == {
        "read": 2,
        "used": 1,
        "dropped": {"identical responses up to --max_length": 1},
        "cut": {"prompts": 1, "responses": 1},
    }
    assert (
        "2 pairs read, 1 used; dropped 1: identical responses up to --max_length; 1 prompts cut to 3 tokens"
        in capsys.readouterr().out
    )


def test_unusable_pairs_are_dropped_and_counted_by_reason():
    good = FORMATS["strings"]
    rows = [
        good,
        dict(good, chosen=""),
        dict(good, rejected="  "),
        dict(good, rejected="yes ."),
        dict(good, chosen=5),
        dict(good, chosen=None),
        dict(prompt="dog", chosen="yes"),
        "text",
        dict(good, prompt=3),
        dict(good, prompt=None),
        dict(prompt=[USER], chosen=[dict(role="assistant", content=None)], rejected=[NO]),
        dict(prompt=[USER], chosen=[USER], rejected=[NO]),
        dict(chosen=[USER, YES], rejected=[NO, NO]),
    ]
    pairs, counts = tgdpo.tokenize(rows, word_tokenizer(), 64, "test")
    assert pairs["index"][:] == [0]
    assert counts["dropped"] == {
        "an empty response": 2,
        "identical responses": 1,
        "a field is neither text nor messages": 2,
        "a field is missing": 2,
        "a row is no object": 1,
        "no prompt": 1,
        "a message without a role or without text": 1,
        "chosen or rejected does not end with an assistant's message": 1,
        "chosen and rejected differ before their last message": 1,
    }


def test_odd_rows_are_dropped_not_fatal():
    good = FORMATS["instruction"]
    rows = [
        good,
        dict(good, history=5),
        dict(good, history=[None]),
        dict(good, history=["ab"]),
        dict(good, history=[["a", 1]]),
        dict(FORMATS["strings"], chosen="half \ud83d"),
        dict(good, input=["x"]),
        dict(good, instruction=None),
    ]
    pairs, counts = tgdpo.tokenize(rows, word_tokenizer(), 64, "test")
    assert pairs["index"][:] == [0] and counts["dropped"] == {
        "an input that is no text": 1,
        "a history that is no list of pairs": 3,
        "a message without a role or without text": 1,
        "a text with half a character": 1,
        "no prompt": 1,
    }
    broken = word_tokenizer(template="{{ messages[0]['content'] + 5 }}")
    with pytest.raises(tgdpo.InputError, match="the chat template refuses it"):
        tgdpo.tokenize([good], broken, 64, "test")


def test_fields_that_parquet_fills_with_none(tmp_path):
    """One row with role/content, one with from/value: in one parquet column each message has all four fields."""
    rows = [
        dict(prompt=[USER], chosen=[YES], rejected=[NO]),
        dict(prompt=SHAREGPT[:1], chosen=SHAREGPT[1:2], rejected=SHAREGPT[2:]),
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    read = tgdpo.load_rows(str(tmp_path / "d.parquet"), None)
    assert read != rows and [one(row, word_tokenizer()) for row in read] == [[PROMPT, CHOSEN, REJECTED]] * 2


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_prompt_column_beside_whole_conversations_is_not_doubled(template):
    tokenizer = word_tokenizer(template=template)
    want = one(FORMATS["messages, implicit prompt"], tokenizer)
    assert one(dict(FORMATS["messages, implicit prompt"], prompt="red cat ? "), tokenizer) == want
    assert one(dict(HH, prompt=HH["chosen"].rsplit("yes", 1)[0]), tokenizer) == one(HH, tokenizer)
    assert one(dict(FORMATS["instruction"], prompt=""), tokenizer) == one(FORMATS["instruction"], tokenizer)


def test_only_a_text_that_begins_as_the_template_does_is_formatted_already():
    tokenizer = word_tokenizer(template=CHATML)
    assert one(dict(FORMATS["strings"], prompt="<unk> red"), tokenizer)[0][:3] == [4, *ids("user"), 6]
    talk = [dict(role="system", content="<|im_start|> blue"), USER]
    assert one(dict(prompt=talk, chosen=[YES], rejected=[NO]), tokenizer)[0][:3] == [4, *ids("system"), 6]


def test_a_template_that_writes_more_before_an_answer_to_come():
    """The generation prompt ends with <think>, an answered turn has none; the common part is the prompt."""
    thinks = CHATML.replace("assistant\n' }}", "assistant\n' }}{{ '<think>' }}")
    assert thinks != CHATML
    assert one(FORMATS["strings"], word_tokenizer(template=thinks)) == one(
        FORMATS["strings"], word_tokenizer(template=CHATML)
    )
    rewrites = "{% if messages[-1]['role'] == 'assistant' %}answered {% endif %}" + CHATML
    with pytest.raises(tgdpo.InputError, match="writes the prompt differently"):
        one(FORMATS["strings"], word_tokenizer(template=rewrites))


def test_fixing_the_date_leaves_the_rest_of_the_template_alone():
    tokenizer = word_tokenizer(template="\n  \n" + CHATML)
    prompt, _ = tgdpo.render(tokenizer, [USER], ["yes"])
    assert prompt == tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([dict(question="a", answer="b")], "1 rows with the columns: answer, question; expected chosen and rejected"),
        (
            [dict(question="a", chosen="b", rejected="c")],
            "dropped 1: no prompt; columns: chosen, question, rejected; expected chosen",
        ),
        ([dict(prompt="a", chosen="b", rejected="b")] * 2, "2 pairs read, 0 used; dropped 2: identical responses"),
        ([], "0 rows with the columns: none"),
    ],
)
def test_nothing_usable_says_what_was_found_and_expected(rows, message):
    with pytest.raises(tgdpo.InputError, match=re.escape(message)):
        tgdpo.tokenize(rows, word_tokenizer(), 64, "test")


def test_file_kinds(tmp_path):
    rows = [FORMATS["strings"], dict(FORMATS["strings"], chosen="one")]
    data = datasets.Dataset.from_list(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    write_rows(tmp_path / "b.jsonl", rows)
    (tmp_path / "b2.json").write_text((tmp_path / "b.jsonl").read_text() + "\n\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as stream:
        stream.write((tmp_path / "b.jsonl").read_text())
    data.to_parquet(tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "splits")
    for name in ("a.json", "b.jsonl", "b2.json", "c.jsonl.gz", "d.parquet", "saved", "splits"):
        assert tgdpo.load_rows(str(tmp_path / name), "train") == rows, name
    assert tgdpo.load_rows(str(tmp_path / "splits"), "test") == rows[1:]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "line 2"),
        ("a.json", "[1, 2", "cannot be used: JSONDecodeError"),
        ("a.csv", "x,y", "unknown kind"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be used: UnicodeDecodeError"),
        ("a.parquet", "no", "cannot be used"),
        (None, None, "no such file"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    file = tmp_path / (name or "missing.jsonl")
    if name:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(tgdpo.InputError, match=message) as e:
        tgdpo.load_rows(str(file), "train")
    assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_token_rewards_of_the_data_set_are_checked_against_the_tokens():
    row = dict(FORMATS["strings"], chosen_rewards=[0.5, 1, -1.0], rejected_rewards=[2.0, 0.25])
    pairs, _ = tgdpo.tokenize([row], word_tokenizer(), 64, "test")
    assert (pairs[0]["chosen_rewards"], pairs[0]["rejected_rewards"]) == ([0.5, 1.0, -1.0], [2.0, 0.25])
    pairs, _ = tgdpo.tokenize([row], word_tokenizer(), 3, "test")  # cut with the tokens
    assert pairs[0]["chosen_ids"] == ids("yes .") and pairs[0]["chosen_rewards"] == [0.5, 1.0]
    for bad, message in [
        (dict(chosen_rewards=[1.0]), "row 0: chosen_rewards has 1 values; expected 3"),
        (dict(rejected_rewards=None), "row 0: rejected_rewards has no list of numbers; expected 2 finite"),
        (dict(chosen_rewards=[1.0, 2.0, float("nan")]), "finite"),
        (dict(chosen_rewards=[1e300, 0.0, 0.0]), "finite"),
        (dict(chosen_rewards=[10**400, 0, 0]), "no list of numbers"),
        (dict(chosen_rewards=["a", 0, 0]), "no list"),
    ]:
        with pytest.raises(tgdpo.InputError, match=message):
            tgdpo.tokenize([row | bad], word_tokenizer(), 64, "test")


def test_real_pairs_with_and_without_a_template(real_pairs):
    """Every one of the 300 real pairs survives, and prompt + response decodes to the text."""
    rows = tgdpo.load_rows(str(real_pairs), None)
    text = tgdpo.tiny_tokenizer([json.dumps(row) for row in rows[:50]], 4096)
    assert tgdpo.tokenize(rows, text, 10**6, "real")[1]["used"] == 300
    pairs, counts = tgdpo.tokenize(rows, text, 512, "real")
    assert counts["dropped"] == {} and counts["cut"]["prompts"] > 0
    assert max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs) <= 512
    system = next(i for i, row in enumerate(rows) if row["conversations"][0]["from"] == "system")
    prompt, chosen, _ = one(rows[system], text, 10**6)
    assert text.decode(prompt).startswith("<|system|>" + rows[system]["conversations"][0]["value"])
    assert text.decode(chosen) == rows[system]["chosen"]["value"] + "<eos>"
    text.chat_template = None
    assert tgdpo.tokenize(rows, text, 10**6, "real")[1]["used"] == 300
