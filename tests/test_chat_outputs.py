"""scripts/chat_outputs.py: the benchmarks' forms, prompts as in training, greedy and drawn answers, resuming."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import tgdpo
from conftest import CHATML, ids, make_model, word_tokenizer, write_rows



import chat_outputs

PROMPTS = ["red cat ?", "one two three ?", "dog", "sun moon . yes", "blue one", "no ?", "green", "two cat dog ."]
ALPACA = [dict(instruction=text, dataset="helpful_base", output="theirs", generator="gpt4") for text in PROMPTS]
ARENA = [dict(uid=f"u{i}", category="hard_prompt", cluster="c", prompt=text) for i, text in enumerate(PROMPTS)]
BENCH = [
    dict(question_id=81 + i, category=category, turns=[text, "dog yes ?"], reference=["a", "b"])
    for i, (category, text) in enumerate(zip(["math", "writing", "stem", "coding", "other"], PROMPTS))
]
THIRD = 21  # a word, for a model with a third end token
ROWS = {"alpaca_eval": ALPACA, "arena_hard": ARENA, "mt_bench": BENCH}


@pytest.fixture
def paths(tmp_path):
    """-> a folder with a chat model in `model`, which ends some of its answers before 12 tokens."""
    chat_model(tmp_path / "model")
    return tmp_path


def chat_model(folder, template=CHATML, family="llama", seed=22, pad="<pad>", **changes):
    """The tokenizer's end token is <|im_end|>, 5, that of the model's configuration <eos>, 3."""
    tgdpo.quiet()  # no progress bar where a test reads what was said
    tokenizer = word_tokenizer(template=template, eos="<|im_end|>")
    tokenizer.pad_token = pad
    return make_model(folder, family, seed, scale=4.0, tokenizer=tokenizer, **changes)


def outputs(folder, form="alpaca_eval", rows=None, status=0, **options):
    """Runs the command -> what it wrote: a list of objects, and the file."""
    prompts = write_rows(folder / "prompts.jsonl", ROWS[form] if rows is None else rows)
    base = dict(model_name_or_path=folder / "model", prompts=prompts, format=form, max_new_tokens=12, device="cpu")
    base["output"] = folder / ("out.json" if form == "alpaca_eval" else "model_answer")
    options = base | options
    assert chat_outputs.main([f"--{name}={value}" for name, value in options.items() if value is not None]) == status
    file = Path(options["output"])
    file = file if form == "alpaca_eval" else file / f"{options.get('generator', 'model')}.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text.splitlines() if form != "alpaca_eval" else [text] * bool(text)
    written = [json.loads(line) for line in lines]
    return (written[0] if form == "alpaca_eval" and written else written), file


def texts(written):
    return [row["output"] for row in written]


def greedy(folder, prompt, ends, new_tokens=12):
    """One token at a time, without a cache or a batch -> the tokens before the first end token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    drawn = []
    while len(drawn) < new_tokens:
        with torch.no_grad():
            token = model(torch.tensor([prompt + drawn])).logits[0, -1].argmax().item()
        if token in ends:
            break
        drawn.append(token)
    return drawn


def chatml(*turns):
    """user and assistant texts by turns -> token ids, up to the answer to come."""
    found = []
    for role, text in zip(["user", "assistant"] * 2, turns):
        found += [4, *ids(role), 6, *ids(text), 5, 6]
    return found + [4, *ids("assistant"), 6]


def words(tokens):
    """Tokens as text, without those that its tokenizer calls special."""
    vocabulary = word_tokenizer().convert_ids_to_tokens(range(31))
    return " ".join(vocabulary[t] for t in tokens if t not in (0, 1, 4, 5)).strip()


# ------------------------------------------------------------------------------------------------------- the formats
def asked(monkeypatch, answer=lambda prompt: "yes ."):
    """Replaces the model's answers -> the list of prompts that it gets."""
    seen = []

    def respond(model, tokenizer, prompts, *_):
        seen.extend(prompts)
        return [(answer(prompt), True) for prompt in prompts]

    monkeypatch.setattr(chat_outputs, "respond", respond)
    monkeypatch.setattr(chat_outputs.time, "time", lambda: 1700000000.5)
    return seen


def test_alpaca_eval_form(paths, monkeypatch):
    """As in tatsu-lab/alpaca_eval: what evaluate() takes, the instructions untouched, without the baseline's answer."""
    asked(monkeypatch)
    written, file = outputs(paths, rows=[ALPACA[0], dict(instruction="dog", input="sun")], generator="ours")
    assert written == [
        {"dataset": "helpful_base", "instruction": "red cat ?", "output": "yes .", "generator": "ours"},
        {"instruction": "dog", "output": "yes .", "generator": "ours"},
    ]
    assert file.read_text().startswith("[\n")


def test_arena_hard_form(paths, monkeypatch):
    """As in lmarena/arena-hard-auto v2.0: gen_judgment.py reads uid, model, messages[-1]["content"]["answer"]."""
    asked(monkeypatch)
    written, file = outputs(paths, "arena_hard", rows=ARENA[:2], generator="ours")
    assert file == paths / "model_answer" / "ours.jsonl"
    answer_ids = [row.pop("ans_id") for row in written]
    assert all(re.fullmatch("[0-9a-f]{32}", i) for i in answer_ids) and len(set(answer_ids)) == 2
    assert written == [
        {
            "uid": f"u{i}",
            "model": "ours",
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": {"answer": "yes ."}},
            ],
            "tstamp": 1700000000.5,
        }
        for i, text in enumerate(PROMPTS[:2])
    ]


def test_mt_bench_form_and_its_second_turn(paths, monkeypatch):
    """As in lm-sys/FastChat: common.py reads question_id and choices[0]["turns"]; the second prompt has the first
    answer in it."""
    seen = asked(monkeypatch, lambda prompt: "yes ." if len(prompt) < 15 else "no")
    written, file = outputs(paths, "mt_bench", rows=BENCH[:2])
    assert file == paths / "model_answer" / "model.jsonl"
    assert sorted(seen) == sorted(
        [chatml(text) for text in PROMPTS[:2]] + [chatml(text, "yes .", "dog yes ?") for text in PROMPTS[:2]]
    )
    assert len({row.pop("answer_id") for row in written}) == 2
    assert written == [
        {
            "question_id": 81 + i,
            "model_id": "model",
            "choices": [{"index": 0, "turns": ["yes .", "no"]}],
            "tstamp": 1700000000.5,
        }
        for i in range(2)
    ]


def test_defaults_are_those_of_the_benchmarks(paths, monkeypatch):
    """FastChat's temperature_config, 0.7 for others; 0.9 and 0; the limits 1024, 4096, 4096; --temperature wins."""
    chat_model(paths / "model", max_position_embeddings=8192)
    heats, limits = [], []

    def respond(model, tokenizer, prompts, seeds, temperatures, top_p):
        heats.append(temperatures)
        limits.append(model.generation_config.max_new_tokens)
        return [("yes", True)] * len(prompts)

    monkeypatch.setattr(chat_outputs, "respond", respond)
    names = "writing roleplay extraction math coding reasoning stem humanities other".split()
    rows = [dict(question_id=i, category=name, turns=["dog"]) for i, name in enumerate(names)]
    outputs(paths, "mt_bench", rows=rows, max_new_tokens=None)
    outputs(paths, "mt_bench", rows=rows[:2], max_new_tokens=None, temperature=0.3, output=paths / "hot")
    outputs(paths, rows=ALPACA[:1], max_new_tokens=None)
    outputs(paths, "arena_hard", rows=ARENA[:1], max_new_tokens=None, output=paths / "arena")
    assert heats == [[0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.7], [0.3, 0.3], [0.9], [0.0]]
    assert limits == [1024, 1024, 4096, 4096]


# ------------------------------------------------------------------------------------------------------- the prompts
USER, SYSTEM = dict(role="user", content="red cat ?"), dict(role="system", content="blue")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
TOKENIZERS = {
    "plain": dict(),
    "bos": dict(bos=True),
    "chat": dict(template=CHATML, eos="<|im_end|>"),
    "chat, bos": dict(template="{{ bos_token }} " + CHATML, bos=True, eos="<|im_end|>"),
    "refuses a system turn": dict(template=REFUSES, eos="<|im_end|>"),
    "writes more before an answer to come": dict(template=CHATML.replace("nt\n' }}", "nt\n' }}{{ '<think>' }}")),
    "date": dict(template="{{ strftime_now('%d %b %Y') }}" + CHATML),
    "no eos": dict(eos=False),
}
SHAPES = {
    "prompt": dict(prompt="red cat ?"),
    "formatted already": dict(prompt="<bos> <|im_start|> red"),
    "messages": dict(prompt=[SYSTEM, USER]),
    "talk": dict(prompt=[USER, dict(role="assistant", content="no ."), USER]),
    "instruction": dict(instruction="red cat ?", input="one two"),
    "sharegpt": dict(conversations=[{"from": "human", "value": "red cat ?"}]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_are_those_of_training(name):
    tokenizer = word_tokenizer(**TOKENIZERS[name])
    for row in SHAPES.values():
        want = tgdpo.tokenize([row | dict(chosen=" yes .", rejected=" no")], tokenizer, 64, "test")[0][0]["prompt_ids"]
        (messages,) = chat_outputs.read_rounds(row, "alpaca_eval")
        assert chat_outputs.prompt_ids(tokenizer, messages, 0) == want
        if tokenizer.bos_token_id is not None and "<bos>" not in str(row):
            assert want.count(2) == 1 and want[0] == 2


def test_rows_of_other_files():
    """{"messages"}, and preference pairs, whose prompt may lie in their responses."""
    for row in (
        dict(messages=[USER]),
        dict(prompt=[USER], messages=[USER, dict(role="assistant", content="no")]),
        dict(chosen=[USER, dict(role="assistant", content="no")], rejected=[USER, dict(role="assistant", content="a")]),
    ):
        assert chat_outputs.read_rounds(row, "alpaca_eval") == [[USER]]


@pytest.mark.parametrize("new, kept", [(40, "red " * 6), (32, "red " * 6), (24, "red " * 14)])
def test_a_long_prompt_loses_its_left_end_and_keeps_its_bos(tmp_path, monkeypatch, capsys, new, kept):
    """64 positions less 24 for the answer: 40 tokens, the BOS and the last 39. A prompt keeps half of the positions."""
    make_model(tmp_path / "model", tokenizer=word_tokenizer(bos=True), bos_token_id=2)
    seen = asked(monkeypatch)
    long = " ".join(["red"] * 30 + ["cat"] * 20 + ["dog"] * 5)
    outputs(tmp_path, rows=[dict(prompt=long), dict(prompt="dog")], max_new_tokens=new)
    assert sorted(seen, key=len) == [[2] + ids("dog"), [2] + ids(kept) + ids("cat") * 20 + ids("dog") * 5]
    assert "1 prompts lost their left end: the model has 64 positions" in capsys.readouterr().out


def test_a_text_file_has_a_prompt_a_line(paths, capsys):
    """Blank lines are skipped and --format is inferred; the answers are those to the same prompts from AlpacaEval."""
    want, _ = outputs(paths, rows=[dict(instruction=text) for text in PROMPTS], output=paths / "want.json")
    (paths / "prompts.txt").write_bytes("\ufeff\r\n".encode() + "\n \n\r\n".join(PROMPTS).encode() + b"\n\n")
    for form in (None, "text"):
        written, file = outputs(paths, prompts=paths / "prompts.txt", format=form, output=paths / f"{form}.json")
        assert written == want and [row["instruction"] for row in written] == PROMPTS, form
    assert len(set(texts(want))) > 4
    capsys.readouterr()
    (paths / "prompts.txt").write_text("\n\n")
    outputs(paths, prompts=paths / "prompts.txt", format=None, status=2)
    one_line(capsys, "no rows; expected a prompt")
    (paths / "prompts.txt").write_bytes(b"\xff\xfe")
    outputs(paths, prompts=paths / "prompts.txt", format=None, status=2)
    one_line(capsys, "--prompts", "UnicodeDecodeError")


# ------------------------------------------------------------------------------------------------------- the answers
@pytest.mark.parametrize("family, seed", [("gpt2", 2), ("llama", 22)])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_answers_are_those_of_a_plain_loop(paths, batch_size, family, seed, capsys):
    """Whatever they are batched with; the tokenizer's end token is 5, the configuration's 3."""
    chat_model(paths / "model", family=family, seed=seed)
    written, _ = outputs(paths, temperature=0, batch_size=batch_size)
    want = [greedy(paths / "model", chatml(text), ends=(3, 5)) for text in PROMPTS]
    assert texts(written) == [words(tokens) for tokens in want]
    assert [row["instruction"] for row in written] == PROMPTS
    full = sum(len(tokens) == 12 for tokens in want)
    assert 0 < full < len(want) and len({len(tokens) for tokens in want}) > 2, "answers of unequal lengths"
    assert f"{full} answers were cut at --max_new_tokens 12" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 16])
def test_new_tokens_are_capped_at_the_models_positions(paths, capsys, batch_size):
    """GPT-2 has no position 64: with 4096 new tokens asked for, an answer fills what the longest prompt leaves, 52."""
    chat_model(paths / "model", family="gpt2", seed=0)
    written, _ = outputs(paths, temperature=0, batch_size=batch_size, max_new_tokens=None)
    left = 64 - max(len(chatml(text)) for text in PROMPTS)
    want = [greedy(paths / "model", chatml(text), ends=(3, 5), new_tokens=left) for text in PROMPTS]
    assert texts(written) == [words(tokens) for tokens in want]
    full = sum(len(tokens) == left for tokens in want)
    assert left == 52 and 0 < full < len(want)
    lines = capsys.readouterr().out.splitlines()
    cap = "turn 1: answers of at most 52 tokens, not 4096: the model has 64 positions, the longest prompt 12 tokens"
    assert lines[0] == cap and lines[1].endswith(f"; {full} answers were cut at 52 tokens") and len(lines) == 2


def test_greedy_mt_bench_is_a_plain_loop_over_both_turns(paths):
    written, _ = outputs(paths, "mt_bench", temperature=0, batch_size=2)
    for row, question in zip(written, BENCH, strict=True):
        first = words(greedy(paths / "model", chatml(question["turns"][0]), ends=(3, 5)))
        prompt = chatml(question["turns"][0], first, question["turns"][1])
        assert row["choices"][0]["turns"] == [first, words(greedy(paths / "model", prompt, ends=(3, 5)))]


@pytest.mark.parametrize("ends", [3, [3, THIRD], None])
@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>", None])
def test_all_end_tokens_stop_and_padding_is_no_matter(paths, ends, pad):
    """generation_config names one end token, several or none; the tokenizer's own, 5, always stops too."""
    chat_model(paths / "model", pad=pad, eos_token_id=None)
    config = transformers.GenerationConfig(eos_token_id=ends, repetition_penalty=5.0, do_sample=True, top_k=2)
    config.save_pretrained(paths / "model")  # a penalty that must not count
    stop = {5} | set(ends if isinstance(ends, list) else [ends])
    free = [greedy(paths / "model", chatml(text), ()) for text in PROMPTS]
    assert {next((t for t in tokens if t in stop), None) for tokens in free} >= stop, "each end token is met first"
    want = [greedy(paths / "model", chatml(text), stop) for text in PROMPTS]
    assert texts(outputs(paths, temperature=0)[0]) == [words(tokens) for tokens in want]


def test_no_special_token_in_the_text(tmp_path):
    """<|im_start|> is special and no end token; the answer is decoded as the model wrote it, but for its ends."""
    tokenizer = word_tokenizer(eos=False)
    make_model(tmp_path / "model", tokenizer=tokenizer, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.generation_config = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)
    drawn = torch.tensor([[9, 9, 6, 4, *ids("yes .")]])
    model.generate = lambda **_: drawn
    tokenizer.clean_up_tokenization_spaces = True
    assert chat_outputs.respond(model, tokenizer, [[9, 9]], [0], [0.0], 1.0) == [("yes .", False)]


# ----------------------------------------------------------------------------------------------------------- drawing
def test_draws_do_not_depend_on_the_batch(paths):
    one, three, again, other = [
        texts(outputs(paths, batch_size=size, seed=seed, output=paths / f"{k}.json", temperature=1.5)[0])
        for k, (size, seed) in enumerate([(1, 7), (3, 7), (3, 7), (3, 8)])
    ]
    assert one == three == again and sum(a != b for a, b in zip(one, other)) > 4
    twice = texts(outputs(paths, rows=[ALPACA[0]] * 4, temperature=1.5, output=paths / "twice.json")[0])
    assert len(set(twice)) == 4, "the same prompt again is drawn anew"


@pytest.mark.parametrize("top_p, want", [(1.0, [0.4, 0.3, 0.2, 0.1]), (0.6, [4 / 7, 3 / 7, 0.0, 0.0])])
def test_draws_have_the_models_probabilities(top_p, want):
    """log-probs at temperature 2 are half of what the model says; of 20000 draws a share is within 0.02."""
    logits = (2 * torch.tensor([0.4, 0.3, 0.2, 0.1]).log()).expand(20000, 4)
    process = chat_outputs.sampler(range(20000), [2.0] * 20000, top_p, "cpu")
    for _ in range(2):  # the second draw goes on where the first has ended
        drawn = process(None, logits).argmax(-1)
        shares = drawn.bincount(minlength=4) / 20000
        assert torch.allclose(shares, torch.tensor(want), atol=0.02)
        assert not shares[torch.tensor(want) == 0].any()
    assert (drawn != process(None, logits).argmax(-1)).float().mean() > 0.3


def test_rows_at_temperature_0_are_greedy_beside_others():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    found = chat_outputs.sampler([1, 2, 3], [0.0, 1.0, 0.0], 1.0, "cpu")(None, logits)
    assert torch.equal(found[[0, 2]], logits[[0, 2]]) and not torch.equal(found[1], logits[1])


def test_bfloat16_rounds_weights_and_not_the_rotary_frequencies(paths):
    chat_model(paths / "model", family="llama")
    argv = [f"--model_name_or_path={paths / 'model'}", "--prompts=x", "--format=arena_hard", "--output=x"]
    options = chat_outputs.read_options([*argv, "--dtype=bfloat16", "--device=cpu"])
    model = chat_outputs.load_model(options, tgdpo.load_tokenizer(paths / "model"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert chat_outputs.respond(model, word_tokenizer(), [[9, 10], [9]], [0, 1], [1.0, 0.0], 0.9)


# ---------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("form, dies", [("alpaca_eval", 2), ("mt_bench", 1), ("mt_bench", 4)])
def test_a_killed_run_continues_with_the_same_answers(paths, monkeypatch, form, dies):
    """Killed in the generation after `dies`, with half of a line written, and once more after that line's batch."""
    real, sizes = transformers.GenerationMixin.generate, []

    def generate(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if len(sizes) in (dies + 1, dies + 3):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    settings = dict(batch_size=2, temperature=1.0)
    whole, _ = outputs(paths, form, **settings, output=paths / ("whole.json" if form == "alpaca_eval" else "whole"))
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    nothing, file = outputs(paths, form, **settings, status=130)
    kept = file.with_name(file.name + ".answers.jsonl")
    done = [json.loads(line) for line in kept.read_text().splitlines()]
    assert nothing == [] and len(done) == sum(sizes[:dies])
    kept.write_text(kept.read_text()[:-9])
    outputs(paths, form, **settings, status=130)
    written, _ = outputs(paths, form, **settings)
    times = {row.pop("tstamp", None) for row in written}
    assert written == [{k: v for k, v in row.items() if k != "tstamp"} for row in whole] and not kept.exists()
    assert len(sizes) == {"alpaca_eval": 4, "mt_bench": 6}[form] + 3, "only that batch is generated again"
    assert form == "alpaca_eval" or dies == 1 or done[-2]["time"] in times, "an answer keeps its time"


def test_only_answers_of_the_same_settings_are_used(paths, monkeypatch):
    seen = asked(monkeypatch)
    keep = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: None if "answers" in path.name else keep(path))

    def asks(rows=ALPACA, **changes):
        """How many prompts the model gets, with all answers of earlier runs still there."""
        seen.clear()
        outputs(paths, rows=rows, **changes)[1].unlink()
        return len(seen)

    assert (asks(), asks()) == (8, 0)
    for changes in (
        dict(seed=1),
        dict(temperature=0.5),
        dict(top_p=0.5),
        dict(max_new_tokens=11),
        dict(dtype="bfloat16"),
    ):
        assert (asks(**changes), asks(**changes)) == (8, 0), changes
    assert asks(ALPACA + ALPACA[:1], batch_size=1) == 1, "a prompt more"
    assert asks([dict(instruction="red cat .")] + ALPACA[1:], batch_size=1) == 1, "another prompt"
    assert asks(ALPACA[1:] + ALPACA[:1]) == 8, "another order: other random numbers"
    assert asks(generator="ours", batch_size=3) == 0
    chat_model(paths / "model", seed=1)
    assert asks() == 8, "another model"


# ------------------------------------------------------------------------------------------------------ wrong inputs
def one_line(capsys, *parts):
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(part in text for part in parts), text


def test_a_finished_output_stays(paths, capsys):
    for form in ("alpaca_eval", "arena_hard"):
        _, file = outputs(paths, form)
        before = file.read_bytes()
        capsys.readouterr()
        outputs(paths, form, status=2, seed=5)
        one_line(capsys, str(file), "is finished already", "--output")
        assert file.read_bytes() == before


@pytest.mark.parametrize(
    "form, rows, parts",
    [
        ("alpaca_eval", [ALPACA[0], dict(question="a")], ["row 1 (from 0)", "no prompt", "expects an instruction"]),
        ("alpaca_eval", [dict(messages=[USER, dict(role="assistant", content="a")])], ["end with the assistant's"]),
        ("alpaca_eval", ["red"], ["row 0", "no object"]),
        ("alpaca_eval", [], ["no rows; expected an instruction"]),
        ("arena_hard", BENCH, ["an object with question_id, category, turns, reference", "expects uid and prompt"]),
        ("arena_hard", [dict(uid=1, prompt=["a"])], ["an object with uid, prompt"]),
        ("mt_bench", ARENA, ["an object with uid, category, cluster, prompt", "expects question_id, category and"]),
        ("mt_bench", [dict(question_id=1, category="a", turns=[])], ["question_id, category, turns"]),
        ("mt_bench", [dict(question_id=1, category="a", turns="red")], ["question_id, category, turns"]),
        ("mt_bench", [dict(question_id=1, turns=["red"])], ["an object with question_id, turns"]),
        ("arena_hard", [dict(uid=1, prompt="\ud800")], ["row 0", "half a character"]),
    ],
)
def test_rows_that_do_not_fit(paths, capsys, form, rows, parts):
    outputs(paths, form, rows=rows, status=2)
    one_line(capsys, "error", *parts)


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(prompts="none.jsonl"), ["--prompts none.jsonl: no such file"]),
        (dict(prompts=None), ["required", "--prompts"]),
        (dict(model_name_or_path="none"), ["none", "cannot be used"]),
        (dict(output="out.jsonl"), ["expects the name of a new .json file"]),
        (dict(format="arena_hard", output="out.jsonl"), ["expects a directory"]),
        (dict(format="arena"), ["invalid choice"]),
        (dict(generator="a/b"), ["--generator is a/b"]),
        (dict(temperature=-1), ["--temperature is -1.0"]),
        (dict(temperature="nan"), ["--temperature is nan"]),
        (dict(top_p=0), ["--top_p is 0.0"]),
        (dict(batch_size=0), ["--batch_size is 0"]),
        (dict(format=None), ["--format is None for --prompts", "expected text, or nothing, for a .txt"]),
        (dict(format="text"), ["--format is text", "alpaca_eval, arena_hard or mt_bench for another"]),
        (dict(prompts="none.txt"), ["--format is alpaca_eval for --prompts none.txt"]),
        (dict(prompts="none.txt", format=None, output="a.txt"), ["--format text expects the name of a new .json file"]),
        (dict(max_new_tokens=0), ["--max_new_tokens is 0; expected a number above 0"]),
        (dict(seed=-1), ["--seed is -1"]),
        (dict(beam=3), ["unrecognized arguments: --beam=3"]),
    ],
)
def test_wrong_options(paths, capsys, changes, parts, monkeypatch):
    monkeypatch.chdir(paths)
    outputs(paths, status=2, **changes)
    one_line(capsys, *parts)


def test_a_template_that_refuses_the_prompt(paths, capsys):
    chat_model(
        paths / "model", template="{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML
    )
    outputs(paths, "mt_bench", status=2)
    one_line(capsys, "row 0 (from 0) of --prompts, message 3", "refuses it: one turn")


def test_a_tokenizer_that_refuses_words(tmp_path, capsys):
    """As that of the three words that tgdpo.py makes, which has no token for unknown ones."""
    tgdpo.small_data(tgdpo.Options(max_length=8), tmp_path / "model", tmp_path / "pairs.jsonl")
    capsys.readouterr()
    outputs(tmp_path, status=2)
    one_line(capsys, "row 0 (from 0) of --prompts, message 1: the tokenizer cannot be used: Exception: WordLevel error")


def test_several_processes_are_refused(paths, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outputs(paths, status=2)
    one_line(capsys, "2 processes; expected one")
