"""Small models, tokenizers and data that the tests share. Nothing is loaded from a hub."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub for something must fail at once, not wait
os.environ["OMP_NUM_THREADS"] = "1"  # small models; on a busy machine two threads wait for each other
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import tgdpo

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "dpo_en_demo.json"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "red green blue one two three cat dog sun moon yes no . ? , user assistant system".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "exercises(function): grades that function of TGDPO_UNDER_TEST, or of tgdpo.py")


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


@pytest.fixture
def real_pairs():
    """The 300 real pairs; a clone of the project alone does not have them."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here: the demonstration pairs are not part of the project")
    return REAL


def word_tokenizer(bos=False, eos=True, template=None, special=("<|im_start|>", "<|im_end|>"), **kwargs):
    """One token a word: <unk> 0, <pad> 1, <bos> 2, <eos> 3, <|im_start|> 4, <|im_end|> 5, newline 6, then WORDS."""
    vocabulary = ["<unk>", "<pad>", "<bos>", "<eos>", *special, "\n", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>" if bos else None,
        eos_token=(eos if isinstance(eos, str) else "<eos>") if eos else None,
        additional_special_tokens=list(special),
        **kwargs,
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(text):
    """The token ids of words of the tokenizer above."""
    vocabulary = ["<unk>", "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "\n", *WORDS]
    return [vocabulary.index(word) for word in text.split(" ") if word]


def small_config(family="gpt2", **changes):
    """A random model of a family, a few thousand weights."""
    shared = dict(vocab_size=len(WORDS) + 7, bos_token_id=None, eos_token_id=3, pad_token_id=None)
    if family == "gpt2":
        return transformers.GPT2Config(**{**shared, **dict(n_embd=32, n_layer=2, n_head=2, n_positions=64), **changes})
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.AutoConfig.for_model(family, **{**shared, **sizes, **changes})


def make_model(folder, family="gpt2", seed=0, scale=1.0, tokenizer=None, dtype=torch.float32, **changes):
    """Save a random model and a tokenizer; scale > 1 makes its predictions far from uniform."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(small_config(family, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    model.to(dtype).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return str(folder)


def eight_pairs():
    """Eight {prompt, chosen, rejected} pairs of unequal lengths."""
    prompts = ["red cat ?", "one two three ?", "dog", "sun moon .", "blue one", "yes no ?", "green", "two cat dog ."]
    chosen = [" yes .", " red green blue", " one", " two three cat dog sun", " moon .", " no", " yes yes .", " three"]
    rejected = [" no", " sun", " moon moon moon .", " blue", " red . no yes", " cat dog", " one one", " green . . ."]
    return [dict(prompt=p, chosen=c, rejected=r) for p, c, r in zip(prompts, chosen, rejected)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Bench:
    """A folder with a model, a reward model and eight pairs; `train` runs the command line in this process, of tgdpo.py
    or of scripts/fast.py."""

    def __init__(self, folder, script=tgdpo):
        self.folder, self.script = folder, script
        self.model = make_model(folder / "model", scale=4.0)
        self.reward_model = make_model(folder / "reward_model", scale=4.0, seed=1)
        self.data = write_rows(folder / "pairs.jsonl", eight_pairs())
        self.runs = 0

    def argv(self, *flags, out=None, **options):
        self.runs += out is None
        options = (
            dict(
                model_name_or_path=self.model,
                dataset=self.data,
                cache_dir=self.folder / "cache",
                learning_rate=1e-2,
                output_dir=out or self.folder / f"run{self.runs}",
                per_device_train_batch_size=8,
                device="cpu",
            )
            | options
        )
        return [f"--{name}={value}" for name, value in options.items() if value is not None] + list(flags)

    def train(self, *flags, status=0, **options):
        """-> (rows of metrics.jsonl, output folder)."""
        argv = self.argv(*flags, **options)
        assert self.script.main(argv) == status
        out = Path(next(a for a in argv if a.startswith("--output_dir=")).split("=", 1)[1])
        return rows_of(out), out


def rows_of(out, evaluation=False):
    file = Path(out) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if ("loss" in row) != evaluation]


@pytest.fixture
def bench(tmp_path, request):
    """With what the test module calls tgdpo: tgdpo.py, or scripts/fast.py under that name."""
    return Bench(tmp_path, request.module.tgdpo)
