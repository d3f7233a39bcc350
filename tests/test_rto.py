"""scripts/rto.py: its mathematics by hand and by brute force, PPO on small models, the command line."""

import json
import random

import pytest
import torch
import transformers

import tgdpo
from conftest import eight_pairs, ids, make_model, word_tokenizer, write_rows



import rto
import tiny_language

YES = ids("yes")[0]
PROMPTS = [ids("red cat ?"), ids("dog"), ids("one two three ?"), ids("sun moon .")]
RESPONSES = [ids("yes ."), ids("one two three two"), ids("no"), ids("cat dog sun moon .")]


def options(**changes):
    small = dict(steps=2, rollouts=16, minibatches=4, max_new_tokens=6, learning_rate=3e-3, critic_learning_rate=1e-2)
    return rto.Options(**small | dict(device="cpu", dtype="float32", clip=0.0) | changes)


def lengths_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------------ the mathematics
def test_advantages_are_the_double_sum():
    """Â_t = Σ_{l>=t} (γ λ)^(l-t) (r_l + γ V_{l+1} - V_l), the sums ending with the response; padding holds garbage."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = [rng.randint(1, 7) for _ in range(5)]
        mask, gamma, lam = lengths_mask(lengths, 7), rng.random(), rng.random()
        rewards, values = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
        want = torch.zeros(5, 7, dtype=torch.float64)
        for b, n in enumerate(lengths):
            for t in range(n):
                for k in range(t, n):
                    following = values[b, k + 1] if k + 1 < n else 0.0
                    want[b, t] += (gamma * lam) ** (k - t) * (rewards[b, k] + gamma * following - values[b, k])
        adv, returns = rto.advantages(rewards, values, mask, gamma, lam)
        assert torch.allclose(adv, want, atol=1e-12, rtol=0)
        assert torch.allclose(returns, (want + values) * mask, atol=1e-12, rtol=0)
        assert not adv[~mask].any() and not returns[~mask].any()


def test_advantages_by_hand():
    """γ 1, λ 0.5, r = 1, 2, V = 3, 5: δ = 1 + 5 - 3 = 3 and 2 - 5 = -3; Â = 3 - 0.5 * 3 = 1.5 and -3."""
    adv, returns = rto.advantages(
        torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 5.0, 9.0]]), lengths_mask([2], 3), 1.0, 0.5
    )
    assert adv.tolist() == [[1.5, -3.0, 0.0]]
    assert returns.tolist() == [[4.5, 2.0, 0.0]]


def hand_rewards(**changes):
    """Log-ratios to the reference: of DPO 1, -3, 0.5 and 0.5, of the old policy 1, 0, 2 and -1; padding holds 7s."""
    mask = lengths_mask([3, 1], 4)
    ref = torch.full((2, 4), -5.0)
    dpo = ref + torch.tensor([[1.0, -3.0, 0.5, 7.0], [0.5, 7.0, 7.0, 7.0]])
    old = ref + torch.tensor([[1.0, 0.0, 2.0, 7.0], [-1.0, 7.0, 7.0, 7.0]])
    settings = options(**dict(beta1=0.1, beta2=0.01, beta3=2.0, clip=0.2) | changes)
    return rto.dense_rewards(old, ref, dpo, torch.tensor([3.0, -1.0]), mask, settings)


def test_dense_rewards_by_hand():
    """β₁ part 0.1, -0.3 clipped to -0.2, 0.05; KL 0.01, 0, 0.02; r_end 2 * 3. Second row: 0.05 + 0.01 - 2."""
    want = torch.tensor([[0.1 - 0.01, -0.2, 0.05 - 0.02 + 6, 0], [0.05 + 0.01 - 2, 0, 0, 0]])
    assert torch.allclose(hand_rewards(), want, atol=1e-6)
    want[0, 1] = -0.3
    assert torch.allclose(hand_rewards(clip=0.0), want, atol=1e-6), "clip 0 is no clip"


def test_dense_rewards_at_the_end_by_hand():
    """The clipped β₁ parts, 0.1 - 0.2 + 0.05 = -0.05, on the last token; the KL stays."""
    want = torch.tensor([[-0.01, 0.0, -0.05 - 0.02 + 6, 0], [0.05 + 0.01 - 2, 0, 0, 0]])
    assert torch.allclose(hand_rewards(placement="end"), want, atol=1e-6)
    assert torch.allclose(hand_rewards().sum(-1), hand_rewards(placement="end").sum(-1), atol=1e-6)


def test_without_beta1_rewards_are_those_of_plain_ppo():
    generator, mask = torch.Generator().manual_seed(1), lengths_mask([5, 2, 3], 5)
    old, ref, dpo = torch.randn(3, 3, 5, generator=generator)
    ends, found = torch.tensor([1.0, 2.0, -4.0]), []
    for placement in ("tokens", "end"):
        settings = options(beta1=0.0, beta2=0.3, beta3=0.5, placement=placement)
        found.append(rto.dense_rewards(old, ref, dpo, ends, mask, settings))
    for b, n in enumerate([5, 2, 3]):
        plain = [-0.3 * (old[b, t] - ref[b, t]).item() for t in range(n)]
        plain[-1] += 0.5 * ends[b].item()
        for rewards in found:
            assert rewards[b].tolist() == pytest.approx(plain + [0.0] * (5 - n), abs=1e-6)


def test_whiten_looks_at_no_padding():
    mask = lengths_mask([3, 1], 3)
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, -50.0]])
    want = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) / 3.5**0.5  # mean 3, variance (4 + 1 + 0 + 9) / 4
    assert torch.allclose(rto.whiten(x, mask), want, atol=1e-6)


def test_policy_loss_and_its_gradient_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5, 1.1 at advantages 1, 1, -1, -1, 2, clip 0.2: objectives 1.2, 0.5, -1.5, -0.8, 2.2.

    Only where a token has gone too far in the direction of its advantage is the gradient zero: the first and fourth.
    """
    ratio, adv = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 3.0]]), torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, 9.0]])
    old, mask = torch.full((1, 6), -2.0), lengths_mask([5], 6)
    logps = (old + ratio.log()).requires_grad_()
    loss = rto.policy_loss(logps, old, adv, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5, abs=1e-6)
    assert logps.grad[0].tolist() == pytest.approx([0, -0.5 / 5, 1.5 / 5, 0, -2.2 / 5, 0], abs=1e-6)
    assert logps.grad[0, [0, 3, 5]].tolist() == [0, 0, 0]


def test_value_loss_and_its_gradient_by_hand():
    """Old value 0, clip 0.2; V 1, 1, 0.1 with returns 2, -1, 1: errors max(1, 1.8²), max(2², 1.2²), 0.9²."""
    values = torch.tensor([[1.0, 1.0, 0.1, 50.0]], requires_grad=True)
    returns, mask = torch.tensor([[2.0, -1.0, 1.0, 0.0]]), lengths_mask([3], 4)
    loss = rto.value_loss(values, torch.zeros(1, 4), returns, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (3.24 + 4 + 0.81) / 3, abs=1e-6)
    assert values.grad[0].tolist() == pytest.approx([0, 2 / 3, -0.9 / 3, 0], abs=1e-6)
    assert values.grad[0, 0] == 0, "moved beyond the clip towards its return: it learns no more"


# ------------------------------------------------------------------------------------------- models with one score
def scored(kind, model, prompts, responses):
    batch = tgdpo.collate({"prompt_ids": prompts, "chosen_ids": responses}, "cpu")
    return rto.response_scores(kind, model, batch, options())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pad", [None, 3])  # 3 is the end token: transformers would stop before it
@pytest.mark.parametrize("kind", ["sequence", "token"])
@torch.no_grad()
def test_padding_changes_no_score(tmp_path, kind, pad, family):
    """Against the Auto class itself on single sequences without padding; responses end with EOS."""
    start = make_model(tmp_path / "start", family, scale=4.0, pad_token_id=pad)
    model = rto.read_scorer(kind, start, options(), new_head=True)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if not name.startswith(model.base_model_prefix):
            p.copy_(torch.randn(p.shape, generator=generator))
    tgdpo.write_model(model, word_tokenizer(), tmp_path / "scorer")
    model = rto.read_scorer(kind, str(tmp_path / "scorer"), options())
    other = rto.SCORERS[kind].from_pretrained(tmp_path / "scorer").eval()
    other.config.pad_token_id = None
    ended = [response + [3] for response in RESPONSES]
    want = []
    for prompt, response in zip(PROMPTS, ended):
        logits = other(input_ids=torch.tensor([prompt + response])).logits[0]
        want.append((logits if kind == "sequence" else logits[len(prompt) :, 0].sum(0, keepdim=True)).item())
    assert len({round(value, 2) for value in want}) == 4, "the scores differ, or the comparison says nothing"
    assert scored(kind, model, PROMPTS, ended).tolist() == pytest.approx(want, abs=1e-5)
    found = rto.make_end_reward(kind, model, options(rollouts=4, minibatches=2))(PROMPTS, ended)
    assert found.tolist() == pytest.approx(want, abs=1e-5), "in parts"
    assert not found.requires_grad


@torch.no_grad()
def test_the_critic_sees_a_state_without_the_token_that_it_predicts(tmp_path):
    path = make_model(tmp_path / "start", scale=4.0)
    critic = rto.make_critic(path, options())
    batch = tgdpo.collate({"prompt_ids": PROMPTS, "chosen_ids": RESPONSES}, "cpu")
    assert not rto.state_values(critic, batch, options()).any(), "V is 0 at the start"
    critic.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    values = rto.state_values(critic, batch, options())
    assert not values[~batch["mask"]].any()
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        for t in range(len(response)):
            state = torch.tensor([prompt + response[:t]])  # s_t: up to the token before y_t
            assert values[b, t].item() == pytest.approx(critic(input_ids=state).logits[0, -1, 0].item(), abs=1e-5)


def test_the_body_of_a_critic_is_that_of_the_policy(tmp_path):
    path = make_model(tmp_path / "start", scale=4.0)
    body, other = rto.make_critic(path, options()).transformer, tgdpo.load_model(path, options()).transformer
    pairs = list(zip(body.parameters(), other.parameters(), strict=True))
    assert pairs and all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_reward_model_learns_the_pairs(tmp_path, monkeypatch, kind):
    start = make_model(tmp_path / "start")
    monkeypatch.setattr(rto, "BT_STEPS", 25)
    monkeypatch.setattr(rto, "BT_RATE", 1e-2)
    pairs = tgdpo.tokenize(eight_pairs(), word_tokenizer(), 64, "pairs")[0]
    rto.train_reward_model(kind, start, pairs, options(), tmp_path / "reward")
    model = rto.read_scorer(kind, str(tmp_path / "reward"), options())
    with torch.no_grad():
        chosen, rejected = [
            scored(kind, model, pairs[:]["prompt_ids"], pairs[:][side]) for side in ("chosen_ids", "rejected_ids")
        ]
    assert (chosen > rejected).all()
    again = rto.SCORERS[kind].from_pretrained(tmp_path / "reward")
    assert again.config.num_labels == 1 and (tmp_path / "reward" / "tokenizer.json").exists()


# ---------------------------------------------------------------------------------------------------------- PPO
@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_model(folder / name, seed=seed, scale=4.0) for name, seed in (("start", 0), ("dpo", 1), ("other", 2))
    }


def count_yes(prompts, responses):
    return torch.tensor([float(response.count(YES)) for response in responses])


def trained(paths, settings, dpo="dpo", end_reward=count_yes, **kwargs):
    """-> (rows, policy, critic) of a run."""
    policy, reference, frozen = [tgdpo.load_model(paths[name], settings) for name in ("start", "start", dpo)]
    critic = rto.make_critic(paths["start"], settings)
    rows = rto.train(policy, critic, reference, frozen, end_reward, PROMPTS, word_tokenizer(), settings, **kwargs)
    return rows, policy, critic


def test_the_seed_decides_the_run_and_a_judge_does_not(paths):
    seen = []

    def judge(step, row):
        torch.manual_seed(0)
        seen.append((step, row))

    rows, *_ = trained(paths, options(), judge=judge, marks=(1,))
    assert rows == trained(paths, options())[0]
    assert seen == [(1, rows[0])]
    assert rows != trained(paths, options(seed=43))[0]
    assert [row["step"] for row in rows] == [1, 2]


def test_without_beta1_the_dpo_model_has_no_say(paths):
    plain = [trained(paths, options(beta1=0.0, minibatches=2), dpo)[0] for dpo in ("dpo", "other")]
    assert plain[0] == plain[1]
    dense = [trained(paths, options(beta1=0.1, steps=1), dpo)[0] for dpo in ("dpo", "other")]
    assert dense[0] != dense[1] and dense[0][0]["reward"] != 0 and plain[0][0]["reward"] == 0


def test_the_first_minibatch_has_ratio_1_and_value_0(paths, monkeypatch):
    """policy_loss and value_loss as train calls them: at the first minibatch of both steps nothing has moved yet."""
    ratios, values, whole = [], [], []
    policy_loss, value_loss, learn = rto.policy_loss, rto.value_loss, rto.learn

    def spy_policy(logps, old_logps, adv, mask, clip):
        ratios.append((logps - old_logps).detach().exp()[mask])
        return policy_loss(logps, old_logps, adv, mask, clip)

    def spy_value(new, old, returns, mask, clip):
        values.append((new.detach()[mask], old[mask]))
        return value_loss(new, old, returns, mask, clip)

    def spy_learn(policy, critic, optimizers, batch, settings):
        whole.append(batch)
        return learn(policy, critic, optimizers, batch, settings)

    monkeypatch.setattr(rto, "policy_loss", spy_policy)
    monkeypatch.setattr(rto, "value_loss", spy_value)
    monkeypatch.setattr(rto, "learn", spy_learn)
    rows, *_ = trained(paths, options())
    assert len(ratios) == 8
    for step in (0, 4):
        assert (ratios[step] - 1).abs().max() < 1e-5
        assert (ratios[step + 1] - 1).abs().max() > 1e-3, "the second minibatch finds a policy that has moved"
        new, old = values[step]
        assert torch.allclose(new, old, atol=1e-5)
    assert not values[0][0].any() and values[4][0].any()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    both = torch.cat(ratios[:4])
    assert rows[0]["ratio_min"] == pytest.approx(both.min().item()) and rows[0]["ratio_max"] == pytest.approx(
        both.max().item()
    )
    assert rows[0]["clip_fraction"] == pytest.approx(((both - 1).abs() > 0.2).float().mean().item())
    for batch in whole:
        adv, mask = batch["adv"], batch["mask"]
        assert adv[mask].mean().abs() < 1e-5 and adv[mask].std(correction=0) == pytest.approx(1, abs=1e-4)
        assert len(ratios[0]) + len(ratios[1]) + len(ratios[2]) + len(ratios[3]) == whole[0]["mask"].sum()


def test_rewards_of_a_step_come_from_the_models(paths, monkeypatch):
    """What the trainer hands dense_rewards: the three models' log-probs of the drawn tokens, each in its own place."""
    calls, dense = [], rto.dense_rewards
    monkeypatch.setattr(rto, "dense_rewards", lambda *args: calls.append(args) or dense(*args))
    drawn, generate = [], tiny_language.generate
    monkeypatch.setattr(
        tiny_language, "generate", lambda *args, **kw: drawn.append((args[1], generate(*args, **kw))) or drawn[-1][1]
    )
    rows, *_ = trained(paths, options(beta1=1.0, steps=1))
    old, ref, dpo, ends, mask, _ = calls[0]
    (prompts, responses), start = drawn[0], tgdpo.load_model(paths["start"], options())
    other = tgdpo.load_model(paths["dpo"], options())
    batch = tgdpo.collate({"prompt_ids": prompts, "chosen_ids": responses}, "cpu")
    with torch.no_grad():
        for found, model in ((old, start), (ref, start), (dpo, other)):
            assert torch.allclose(found, model.token_logps(batch), atol=1e-4)
    assert torch.equal(mask, batch["mask"]) and ends.tolist() == [response.count(YES) for response in responses]
    assert max(map(len, responses)) <= 6 and rows[0]["length"] == pytest.approx(sum(map(len, responses)) / 16)
    assert rows[0]["end_score"] == pytest.approx(ends.mean().item())
    assert rows[0]["reward"] == pytest.approx((dpo - ref).sum(-1).mean().item(), abs=1e-4)


@pytest.mark.parametrize("how", ["end", "tokens"])
def test_the_policy_improves(paths, how):
    """By the score at the end alone: "yes" is said more and more. By the token rewards alone: towards the DPO model."""
    end = how == "end"
    settings = options(steps=10, rollouts=24, beta1=0.0 if end else 0.3, beta3=float(end), beta2=0.01)
    rows, *_ = trained(paths, settings, end_reward=count_yes if end else None)
    score = [row["end_score" if end else "reward"] for row in rows]
    assert sum(score[-3:]) / 3 > sum(score[:3]) / 3 + (1.0 if end else 0.5), score
    assert rows[-1]["kl"] > 0.1 and all(row["clip_fraction"] < 0.9 for row in rows)


def test_the_kl_holds_the_policy(paths):
    """A much larger β₂, and nothing else, leaves the policy nearer to the reference."""
    kl = [trained(paths, options(steps=6, beta1=0.0, beta2=beta2))[0][-1]["kl"] for beta2 in (0.0, 5.0)]
    assert kl[1] < 0.5 * kl[0], kl


def test_the_critic_learns(paths):
    """Of a policy that stands still, where the prompt alone decides the score."""
    settings = options(steps=10, beta1=0.0, beta2=0.0, learning_rate=1e-9, value_clip=9.0)
    rows, *_ = trained(
        paths, settings, end_reward=lambda prompts, _: torch.tensor([2.0 * (len(p) > 3) for p in prompts])
    )
    assert rows[-1]["explained_variance"] > 0.5 and rows[-1]["value_loss"] < 0.5 * rows[0]["value_loss"], rows


def test_only_policy_and_critic_move(paths):
    settings = options()
    policy, reference, dpo = [tgdpo.load_model(paths[name], settings) for name in ("start", "start", "dpo")]
    critic = rto.make_critic(paths["start"], settings)
    models = (policy, critic, reference, dpo)
    before = [[p.clone() for p in model.parameters()] for model in models]
    rto.train(policy, critic, reference, dpo, count_yes, PROMPTS, word_tokenizer(), settings)
    moved = [any(not torch.equal(*both) for both in zip(old, model.parameters())) for old, model in zip(before, models)]
    assert moved == [True, True, False, False]


# ------------------------------------------------------------------------------------------------ the command line
@pytest.fixture
def argv(paths, tmp_path):
    """A function of options -> a command line that runs on the small models."""
    data = write_rows(tmp_path / "pairs.jsonl", eight_pairs())

    def make(**changes):
        small = dict(model_name_or_path=paths["start"], reward_model=paths["dpo"], dataset=data, beta3=0, device="cpu")
        small |= dict(steps=2, rollouts=8, minibatches=2, max_new_tokens=5, output_dir=tmp_path / "run") | changes
        return [f"--{name}={value}" for name, value in small.items() if value is not None]

    return make


def end_model(folder, seed=3, **changes):
    model = rto.read_scorer("sequence", make_model(folder / "start", seed=seed, **changes), options(), new_head=True)
    torch.nn.init.normal_(model.score.weight)
    tgdpo.write_model(model, word_tokenizer(), folder / "end")
    return str(folder / "end")


def test_command_from_models_to_a_directory(argv, paths, tmp_path, capsys):
    """Without and with a reward at the end; the second run into the same directory is refused."""
    assert rto.main(argv()) == 0
    out = tmp_path / "run"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    run = json.loads((out / "run.json").read_text())
    assert [row["step"] for row in rows] == [1, 2] and all(row["end_score"] == 0 for row in rows)
    assert run["finished"] and run["options"]["beta1"] == 0.05 and run["options"]["clip"] == 0.05
    saved, start = tgdpo.read_model(str(out)), tgdpo.read_model(paths["start"])
    assert any(not torch.equal(*both) for both in zip(saved.parameters(), start.parameters()))
    assert transformers.AutoTokenizer.from_pretrained(out)("yes").input_ids == [YES]
    scored = argv(beta3=1, end_reward_model=end_model(tmp_path), output_dir=tmp_path / "second")
    assert rto.main(scored) == 0
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["end_score"] != 0 for row in rows)
    capsys.readouterr()
    assert rto.main(argv()) == 2
    assert_one_line(capsys.readouterr().err, f"--output_dir {out} is not empty")


def assert_one_line(text, *parts):
    assert ": error: " in text and text.count("\n") == 1, text
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(beta3=1), ["--beta3 is 1.0 without --end_reward_model", "or --beta3 0"]),
        (dict(reward_model=None), ["--beta1 is 0.05 without --reward_model", "or --beta1 0"]),
        (dict(rollouts=9), ["--rollouts is 9", "multiple of --minibatches"]),
        (dict(beta2=-1), ["--beta2 is -1.0", ">= 0"]),
        (dict(learning_rate=0), ["--learning_rate is 0.0", "above 0"]),
        (dict(lam=1.5), ["--lam is 1.5", "at most 1"]),
        (dict(max_new_tokens=64, max_length=64), ["--max_new_tokens is 64", "less than --max_length, 64"]),
        (dict(max_new_tokens=64), ["--max_new_tokens is 64", "less than 64, the positions"]),
        (dict(placement="middle"), ["--placement", "middle"]),
        (dict(betta=1), ["--betta"]),
        (dict(dataset=None), ["--model_name_or_path and --dataset: expected both or none"]),
        (dict(model_name_or_path=None), ["--dataset without --model_name_or_path"]),
        (dict(dataset="nowhere.jsonl"), ["nowhere.jsonl", "No such file"]),
        (dict(reward_model="nowhere/at/all"), ["nowhere/at/all", "no such directory"]),
    ],
)
def test_bad_input_is_one_line(argv, capsys, tmp_path, changes, parts):
    assert rto.main(argv(**changes)) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit_are_refused(argv, capsys, paths, tmp_path):
    make_model(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"tac"'))
    assert rto.main(argv(reward_model=tmp_path / "other")) == 2
    assert_one_line(capsys.readouterr().err, "another vocabulary")
    assert rto.main(argv(beta3=1, end_reward_model=paths["other"])) == 2
    assert_one_line(capsys.readouterr().err, "lacks the weights", "score.weight", "with one label")
    config = transformers.GPT2Config.from_pretrained(paths["start"], num_labels=2)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "two")
    assert rto.main(argv(beta3=1, end_reward_model=tmp_path / "two")) == 2
    assert_one_line(capsys.readouterr().err, "two", "cannot be used")


def test_several_processes_are_refused(argv, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rto.main(argv()) == 2
    assert_one_line(capsys.readouterr().err, "2 processes", "expected one")


def test_plain_ppo_needs_no_dpo_model_and_a_tokenizer_no_padding_token(argv, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    start = make_model(tmp_path / "start", tokenizer=tokenizer)
    assert rto.main(argv(model_name_or_path=start, reward_model=None, beta1=0)) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run").pad_token is None, "saved as it came"


def test_long_prompts_lose_their_left_end(argv, tmp_path):
    data = write_rows(tmp_path / "long.jsonl", [dict(prompt="red " * 80 + "cat", chosen=" yes", rejected=" no")])
    _, prompts, _ = rto.read_prompts(*rto.read_options(argv(dataset=data, max_length=40)))
    assert prompts == [ids("red " * 34 + "cat")]


def test_tiny_mode_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    """Its parts fit together; how good its models are is for the full run to say."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where log-probs are cached
    for name, value in (("TINY_STEPS", 10), ("TINY_PAIRS", 40), ("TINY_PROMPTS", 8)):
        monkeypatch.setattr(tiny_language, name, value)

    class Few(random.Random):  # the language model's 20000 sentences take seconds to tokenize
        def choices(self, population, *, k=1):
            return super().choices(population, k=min(k, 200))

    monkeypatch.setattr(tiny_language.random, "Random", Few)
    monkeypatch.setattr(rto, "BT_STEPS", 3)
    out = tmp_path / "tiny"
    flags = dict(steps=1, rollouts=8, minibatches=2, beta3=0.5, device="cpu", output_dir=out)
    assert rto.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    text = capsys.readouterr().out
    assert "wins over dpo" in text and "\nrto " in text
    for name in ("start_model", "dpo", "rto"):
        tgdpo.read_model(str(out / name))
    assert len((out / "rto" / "metrics.jsonl").read_text().splitlines()) == 1
    assert {"reference", "dpo", "rto"} == set(json.loads((out / "run.json").read_text())["table"])
