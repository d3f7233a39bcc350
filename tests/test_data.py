"""Rows to tokens: every format with literal token ids, and what users of preference trainers stumble over."""

import gzip
import json
import os
import re

import datasets
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tgdpo
from conftest import CHATML, ids, word_tokenizer, write_rows

# spellings of one pair: "red cat ?" -> " yes ." / " no" (a word's token needs a space before it)
PROMPT, CHOSEN, REJECTED = ids("red cat ?"), ids("yes .") + [3], ids("no") + [3]
USER, YES, NO = [
    dict(role=r, content=c) for r, c in (("user", "red cat ?"), ("assistant", " yes ."), ("assistant", " no"))
]
SHAREGPT = [{"from": f, "value": v} for f, v in (("human", "red cat ?"), ("gpt", " yes ."), ("gpt", " no"))]
FORMATS = {
    "strings": dict(prompt="red cat ?", chosen=" yes .", rejected=" no"),
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
    "instruction": dict(instruction="red cat ?", chosen=" yes .", rejected=" no"),
    "instruction, empty input": dict(instruction="red cat ?", input="", chosen=" yes .", rejected=" no"),
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
    """<|im_start|> user \\n red cat ? <|im_end|> \\n <|im_start|> assistant \\n  ->  yes . <|im_end|>, and no \\n"""
    prompt = [4, *ids("user"), 6, *PROMPT, 5, 6, 4, *ids("assistant"), 6]
    assert one(FORMATS[name], word_tokenizer(template=CHATML, eos="<|im_end|>")) == [
        prompt,
        ids("yes .") + [5],
        ids("no") + [5],
    ]


def test_instruction_with_input():
    row = dict(instruction="red cat ?", input="one two", chosen=" yes .", rejected=" no")
    assert one(row, word_tokenizer())[0] == PROMPT + [6] + ids("one two")


HH = dict(
    chosen="\n\nHuman: red cat ?\n\nAssistant: no\n\nHuman: dog ?\n\nAssistant: yes .",
    rejected="\n\nHuman: red cat ?\n\nAssistant: no\n\nHuman: dog ?\n\nAssistant: no",
)
TEXT = FORMATS["strings"]


@pytest.mark.parametrize(
    "row, reason",
    [
        (HH, "messages written as one text: scripts/convert.py"),
        (dict(HH, prompt="\n\nHuman: red cat ?\n\nAssistant:"), "messages written as one text: scripts/convert.py"),
        (dict(TEXT, chosen=json.dumps([USER, YES])), "messages written as one text: scripts/convert.py"),
        (dict(TEXT, rejected=str([USER, NO])), "messages written as one text: scripts/convert.py"),
        (dict(TEXT, history=[["dog ?", "no ."]]), "a column history that only scripts/convert.py reads"),
        (dict(TEXT, system="blue"), "a column system that only scripts/convert.py reads"),
        (dict(TEXT, input="blue"), "a column input that only scripts/convert.py reads"),
        (dict(TEXT, tools=[dict(name="clock")]), "a column tools that only scripts/convert.py reads"),
        (dict(TEXT, images=["cat.png"]), "a column images that only scripts/convert.py reads"),
        (dict(chosen=" yes", rejected=" no", system="blue", question="dog ?"), "no prompt"),
        (dict(TEXT, prompt=[USER, dict(role="assistant", content="", tool_calls=[dict(name="clock")])]),
         "a message without a role or without text, or with a tool call"),
        (
            dict(TEXT, prompt=[dict(role="user", content=[dict(type="image", image="cat.png")])]),
            "an image in a message",
        ),
        (dict(prompt="dog ?", chosen=[USER, YES], rejected=[USER, NO]),
         "a prompt that the conversations in chosen and rejected do not repeat"),
    ],
)
def test_what_is_not_read_here_is_dropped_with_a_reason(row, reason):
    for template in (None, CHATML):
        pairs, counts = tgdpo.tokenize([TEXT, row], word_tokenizer(template=template), 64, "test")
        assert pairs["index"][:] == [0] and counts["dropped"] == {reason: 1}


def test_parts_of_text_are_joined_and_roles_are_renamed():
    parts = dict(role="User", content=[dict(type="text", text="red cat"), dict(type="text", value=" ?")])
    row = dict(prompt=[parts], chosen=[dict(role="Assistant", content=[dict(text=" yes .")])], rejected=[NO])
    assert one(row, word_tokenizer(template=CHATML, eos="<|im_end|>")) == one(
        TEXT, word_tokenizer(template=CHATML, eos="<|im_end|>")
    )


def test_several_turns_and_a_system_turn():
    talk = [
        dict(role=r, content=c)
        for r, c in (("system", "blue"), ("user", "dog ?"), ("assistant", "no ."), ("user", "red cat ?"))
    ]
    row = dict(prompt=talk, chosen=[YES], rejected=[NO])
    assert one(row, word_tokenizer())[0] == ids("blue") + [6] + ids("dog ?") + [6] + ids("no .") + [6] + PROMPT
    with_template = one(row, word_tokenizer(template=CHATML))[0]
    assert with_template[:6] == [4, *ids("system"), 6, *ids("blue"), 5, 6]


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
    prompt, _, _ = tgdpo.render([USER], [YES, NO], tokenizer, True)
    assert prompt.startswith("26 Jul 2024<|im_start|>")
    assert tokenizer.chat_template == dated, "the tokenizer that is saved keeps its own template"


@pytest.mark.parametrize("text", [" yes .", " yes . <eos>"])
def test_one_end_token(text):
    assert one(dict(prompt="red cat ?", chosen=text, rejected=" no"), word_tokenizer())[1] == CHOSEN
    chat = dict(prompt="red cat ?", chosen=text.replace("<eos>", "<|im_end|>\n"), rejected=" no")
    assert one(chat, word_tokenizer(template=CHATML, eos="<|im_end|>"))[1] == ids("yes .") + [5]


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
    got = one(dict(prompt=text, chosen=" yes .", rejected=" no"), tokenizer)
    assert got == [one(FORMATS["strings"], tokenizer)[0], ids("yes .") + [5], ids("no") + [5]]


def test_an_empty_prompt_begins_with_bos_or_eos():
    row = dict(prompt="", chosen=" yes .", rejected=" no")
    assert one(row, word_tokenizer())[0] == [3]
    assert one(row, word_tokenizer(bos=True))[0] == [2]
    with pytest.raises(tgdpo.InputError, match="neither BOS nor EOS"):
        one(row, word_tokenizer(eos=False))


def test_the_prompt_is_a_true_prefix_where_tokens_merge_across_the_boundary():
    """A byte-level BPE that knows "ab": of "ca" + "bc" it makes c ab c. The prompt is what all three begin with."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    import transformers

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "<eos>": 4}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert one(dict(prompt="ca", chosen="bc", rejected="c"), tokenizer) == [[3], [2, 3, 4], [0, 3, 4]]


def test_cutting_keeps_half_of_the_prompt_its_right_end_and_its_bos():
    row = dict(prompt="red green blue one two", chosen=" yes yes yes", rejected=" no")
    tokenizer = word_tokenizer(bos=True)
    yes, no = ids("yes yes yes") + [3], ids("no") + [3]
    assert one(row, tokenizer, 8) == [[2] + ids("blue one two"), yes, no]
    assert one(row, tokenizer, 5) == [[2] + ids("two"), yes[:3], no]
    assert one(row, tokenizer, 4) == [[2] + ids("two"), yes[:2], no]
    assert one(row, word_tokenizer(), 5) == [ids("one two"), yes[:3], no]


def test_a_long_response_does_not_erase_the_prompt():
    """Prompt 300, responses 20 and 2047, end token included, max_length 2048: the prompt stays, 1748 tokens of the
    long response are left."""
    row = dict(prompt=" ".join(["red"] * 300), chosen=" yes" * 19, rejected=" no" * 2046)
    prompt, chosen, rejected = one(row, word_tokenizer(), 2048)
    assert prompt == ids("red") * 300 and chosen == ids("yes") * 19 + [3] and rejected == ids("no") * 1748


def test_cut_pairs_are_counted_and_identical_ones_dropped(capsys):
    rows = [dict(prompt="red green blue", chosen=" yes yes no", rejected=" yes yes yes"), FORMATS["strings"]]
    pairs, counts = tgdpo.tokenize(rows, word_tokenizer(), 4, "pairs.jsonl")
    assert pairs["index"][:] == [1]
    assert counts == {
        "read": 2,
        "used": 1,
        "dropped": {"identical responses up to --max_length": 1},
        "cut": {"prompts": 1, "responses": 1},
    }
    assert (
        "2 pairs read, 1 used; dropped 1: identical responses up to --max_length; 1 prompts cut"
        in capsys.readouterr().out
    )


def test_unusable_pairs_are_dropped_and_counted_by_reason():
    good = FORMATS["strings"]
    rows = [
        good,
        dict(good, chosen=""),
        dict(good, rejected="  "),
        dict(good, rejected=" yes ."),
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
        "a message without a role or without text, or with a tool call": 1,
        "chosen or rejected does not end with an assistant's message": 1,
        "chosen and rejected differ before their last message": 1,
    }


def test_odd_rows_are_dropped_not_fatal():
    good = FORMATS["instruction"]
    rows = [good, dict(FORMATS["strings"], chosen="half \ud83d"), dict(good, input=["x"]), dict(good, instruction=None)]
    pairs, counts = tgdpo.tokenize(rows, word_tokenizer(), 64, "test")
    assert pairs["index"][:] == [0] and counts["dropped"] == {
        "a text with half a character": 1,
        "a column input that only scripts/convert.py reads": 1,
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
    talk = [dict(role="system", content="blue"), dict(USER, content="red cat ? ")]
    doubled = one(dict(FORMATS["messages, implicit prompt"], prompt=talk), tokenizer)[0]
    assert doubled == one(dict(prompt=[talk[0], USER], chosen=[YES], rejected=[NO]), tokenizer)[0]
    steps = [dict(role="assistant", content="dog"), dict(role="tool", content="sun moon")]
    agent = one(dict(prompt=[USER], chosen=[*steps, YES], rejected=[*steps, NO]), tokenizer)[0]
    assert agent == one(dict(prompt=[USER, *steps], chosen=[YES], rejected=[NO]), tokenizer)[0]
    assert ids("sun")[0] in agent
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
    with pytest.raises(tgdpo.InputError, match="leaves out a part of what user says"):
        one(FORMATS["strings"], word_tokenizer(template=rewrites))


def test_fixing_the_date_leaves_the_rest_of_the_template_alone():
    tokenizer = word_tokenizer(template="\n  \n" + CHATML)
    prompt, _, _ = tgdpo.render([USER], [YES, NO], tokenizer, True)
    assert prompt == tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([dict(question="a", answer="b")], "1 rows with the columns: answer, question; expected chosen and rejected"),
        (
            [dict(question="a", chosen="b", rejected="c")],
            "dropped 1: no prompt; columns: chosen, question, rejected; expected chosen",
        ),
        ([dict(prompt="a", chosen=" b", rejected=" b")] * 2, "2 pairs read, 0 used; dropped 2: identical responses"),
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
        assert list(tgdpo.load_rows(str(tmp_path / name), "train")) == rows, name
    assert list(tgdpo.load_rows(str(tmp_path / "splits"), "test")) == rows[1:]
    with pytest.raises(tgdpo.InputError, match="--dataset_split nothing: .* has train, test"):
        tgdpo.load_rows(str(tmp_path / "splits"), "nothing")
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert tgdpo.load_rows(str(tmp_path / "one.json"), None) == rows[:1]


def test_a_parquet_file_is_read_by_its_very_name_and_in_its_present_content(tmp_path):
    """Brackets and stars are patterns to some readers; a file replaced under the same time stamp is stale to others."""
    file = tmp_path / "d[1]*.parquet"
    for text in (" yes .", " one"):
        rows = [dict(FORMATS["strings"], chosen=text)]
        datasets.Dataset.from_list(rows).to_parquet(file)
        os.utime(file, (1e9, 1e9))
        assert list(tgdpo.load_rows(str(file), None)) == rows


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "line 2"),
        ("a.json", "[1, 2", "cannot be used: JSONDecodeError"),
        ("a.csv", "x,y", "neither .json, .* scripts/convert.py reads .csv"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be used: UnicodeDecodeError"),
        ("a.parquet", "no", "cannot be used"),
        (None, None, "missing.jsonl cannot be used: FileNotFoundError: .*No such file"),
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
        (dict(chosen_rewards=[1.0]), r"the last ones are \['yes', '\.', '<eos>'\]; scripts/show_tokens.py lists all"),
        (dict(rejected_rewards=None), "row 0: rejected_rewards has no list of numbers; expected 2 finite"),
        (dict(chosen_rewards=[1.0, 2.0, float("nan")]), "finite"),
        (dict(chosen_rewards=[1e300, 0.0, 0.0]), "finite"),
        (dict(chosen_rewards=[10**400, 0, 0]), "finite"),
        (dict(chosen_rewards=["a", 0, 0]), "no list"),
    ]:
        with pytest.raises(tgdpo.InputError, match=message):
            tgdpo.tokenize([row | bad], word_tokenizer(), 64, "test")


def test_token_columns_of_any_name():
    row = dict(FORMATS["strings"], chosen_worth=[0.5, 1, -1.0], rejected_worth=[2.0, 0.25], chosen_score=3.0)
    pairs, _ = tgdpo.tokenize([row], word_tokenizer(), 64, "test")
    assert pairs[0]["chosen_worth"] == [0.5, 1.0, -1.0] and pairs[0]["rejected_worth"] == [2.0, 0.25]
    assert "chosen_score" not in pairs.column_names
    with pytest.raises(tgdpo.InputError, match="row 0: rejected_worth has 1 values; expected 2"):
        tgdpo.tokenize([row | dict(rejected_worth=[2.0])], word_tokenizer(), 64, "test")


def byte_tokenizer(template, eos="<|im_end|>", special=("<|im_start|>", "<|im_end|>")):
    """One token a byte; special tokens are whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, additional_special_tokens=sorted({*special, eos})
    )
    tokenizer.chat_template = template
    return tokenizer


def test_real_pairs_with_and_without_a_template(real_pairs):
    """Each of the 300 real pairs survives; prompt and response decode to the template's own text and to the answer."""
    rows = tgdpo.load_rows(str(real_pairs), None)
    for template in (CHATML, None):
        tokenizer = byte_tokenizer(template)
        pairs, counts = tgdpo.tokenize(rows, tokenizer, 10**6, "real")
        assert counts["used"] == 300 and counts["dropped"] == {}
        for row, pair in zip(rows, pairs):
            turns, answers = tgdpo.read_pair(row)
            assert tokenizer.decode(pair["chosen_ids"]) == answers[0]["content"] + "<|im_end|>"
            assert tokenizer.decode(pair["rejected_ids"]) == answers[1]["content"] + "<|im_end|>"
            said = [turn["content"] for turn in turns]
            if template:
                said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(pair["prompt_ids"]) == (said if template else "\n".join(said))
    pairs, counts = tgdpo.tokenize(rows, byte_tokenizer(CHATML), 512, "real")
    assert counts["dropped"] == {} and counts["cut"]["prompts"] > 0
    assert max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs) <= 512


# ------------------------------------------------------------------------------- templates that trainers stumble over
def texts(row, tokenizer):
    """-> (prompt, chosen, rejected) as text, or the reason why the pair is dropped."""
    try:
        return [tokenizer.decode(part) for part in one(row, tokenizer, 4096)]
    except tgdpo.InputError as e:
        return str(e).split("dropped 1: ")[1].split("; columns")[0]


def turn(role, content, **more):
    return dict(role=role, content=content, **more)


FRUIT = dict(prompt="Name a fruit.", chosen="An apple.", rejected="A stone.")
ALWAYS_HEADER = (
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>' + m['content'] + '<|turn|>' }}{% endfor %}"
    "{{ '<|head|>assistant<|/head|>' }}"
)
SKIPS_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_LAST = (  # the system text stands in a user turn that is the last message, and nowhere once it is answered
    "{% set s = messages[0]['content'] + ' ' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ '[ASK]' + (s if loop.last else '') + m['content'] + '[/ASK]' }}{% else %}{{ m['content'] + '</s>' }}"
    "{% endif %}{% endfor %}"
)
END_UNASKED = (  # an end token where no answer is asked for
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
THINKS = (  # the generation prompt opens a thought that an answered turn closes at once
    "{% for m in messages %}{{ ('<|assistant|></think>' if m['role'] == 'assistant' else '<|user|>') + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
CUTS_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
KNOWS_THOUGHTS = CHATML.replace(
    "m['content']", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m['content']"
)


@pytest.mark.parametrize("eos", ["<|turn|>", "<|text|>"])
def test_no_header_behind_the_answer(eos):
    """Llama 3's first template writes the next header always; its end token was that of texts, not of turns."""
    tokenizer = byte_tokenizer(ALWAYS_HEADER, eos, ("<|head|>", "<|/head|>", "<|turn|>"))
    assert texts(FRUIT, tokenizer) == [
        "<|head|>user<|/head|>Name a fruit.<|turn|><|head|>assistant<|/head|>", "An apple.<|turn|>", "A stone.<|turn|>"
    ]
    short = texts(dict(FRUIT, chosen="a", rejected="s"), tokenizer)
    assert short[1:] == ["a<|turn|>", "s<|turn|>"], "both letters stand in the header, too"


def test_the_boundary_lies_between_tokens():
    """<think> and </think> have their first character in common, not their token."""
    tokenizer = byte_tokenizer(THINKS, "<|end|>", ("<|user|>", "<|assistant|>", "<think>", "</think>"))
    assert texts(FRUIT, tokenizer) == [
        "<|user|>Name a fruit.<|assistant|>", "</think>An apple.<|end|>", "</think>A stone.<|end|>"
    ]
    prompt, chosen, _ = one(FRUIT, tokenizer, 4096)
    assert tokenizer.convert_tokens_to_ids("</think>") == chosen[0]
    opened = byte_tokenizer(CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"), special=("<think>",))
    told = texts(dict(FRUIT, chosen="<think>Hm.</think>An apple.", rejected="<think>A stone."), opened)
    assert told[0].endswith("<think>") and told[1:] == ["Hm.</think>An apple.<|im_end|>", "A stone.<|im_end|>"]


@pytest.mark.parametrize(
    "role, said", [("function_call", "CALL"), ("developer", "RULES"), ("observation", "noon"), ("critic", "Hm.")]
)
def test_a_turn_that_the_template_skips_costs_the_pair(role, said):
    tokenizer = byte_tokenizer(SKIPS_ROLES)
    row = dict(FRUIT, prompt=[turn("user", "Name a fruit."), turn(role, said), turn("user", "Well?")])
    assert texts(row, tokenizer) == f"the chat template leaves out a part of what {role} says"
    assert texts(FRUIT, tokenizer)[1] == "An apple.<|im_end|>"


def test_a_system_turn_that_is_lost_once_it_is_answered_opens_the_first_user_turn():
    tokenizer = byte_tokenizer(SYSTEM_LAST, "</s>", ("[ASK]", "[/ASK]"))
    row = dict(FRUIT, prompt=[turn("system", "Be brief."), turn("user", "Name a fruit.")])
    assert texts(row, tokenizer) == ["[ASK]Be brief.\n\nName a fruit.[/ASK]", "An apple.</s>", "A stone.</s>"]


def test_an_end_token_where_no_answer_is_asked_for():
    tokenizer = byte_tokenizer(END_UNASKED, "<|eot|>", ("<|user|>", "<|assistant|>", "<|end|>"))
    assert texts(FRUIT, tokenizer) == [
        "<|user|>Name a fruit.<|end|><|assistant|>", "An apple.<|end|><|eot|>", "A stone.<|end|><|eot|>"
    ]


def test_thoughts_are_trained_or_the_pair_is_dropped():
    row = dict(FRUIT, chosen="<think>Round.</think>An apple.", rejected="<think>Hard.</think>A stone.")
    assert texts(row, byte_tokenizer(CUTS_THOUGHTS)) == "the chat template leaves out a part of what assistant says"
    field = dict(
        FRUIT,
        chosen=[turn("assistant", "An apple.", reasoning_content="Round.")],
        rejected=[turn("assistant", "A stone.", reasoning_content="Hard.")],
    )
    assert texts(field, byte_tokenizer(CHATML)) == "the chat template leaves out a part of what assistant says"
    assert texts(field, byte_tokenizer(KNOWS_THOUGHTS))[1] == "<think>Round.</think>An apple.<|im_end|>"
    earlier = [turn("user", "Hi."), turn("assistant", "<think>Oh.</think>Hello."), turn("user", "Name a fruit.")]
    assert "leaves out" in texts(dict(FRUIT, prompt=earlier), byte_tokenizer(CUTS_THOUGHTS))


def test_of_several_templates_the_default_is_used():
    tokenizer = byte_tokenizer({"default": CHATML, "tool_use": "TOOLS" + CHATML})
    assert texts(FRUIT, tokenizer) == texts(FRUIT, byte_tokenizer(CHATML))


def test_numbers_on_one_side_or_in_later_rows_only_are_not_lost():
    row = dict(FORMATS["strings"], chosen_rewards=[0.5, 1, -1.0])
    with pytest.raises(tgdpo.InputError, match="row 0: rejected_rewards has no list of numbers; expected 2"):
        tgdpo.tokenize([row], word_tokenizer(), 64, "test")
    worth = dict(chosen_worth=[0.5, 1, -1.0], rejected_worth=[2.0, 0.25])
    with pytest.raises(tgdpo.InputError, match="row 0: chosen_worth has no list of numbers; expected 3"):
        tgdpo.tokenize([FORMATS["strings"], FORMATS["strings"] | worth], word_tokenizer(), 64, "test")
    names = dict(chosen_models=["a", "b"], rejected_models=["c"])
    pairs, _ = tgdpo.tokenize([FORMATS["strings"] | names], word_tokenizer(), 64, "test")
    assert "chosen_models" not in pairs.column_names
