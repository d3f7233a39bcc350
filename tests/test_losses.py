"""The losses against numbers worked by hand, and the properties that the method promises."""

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tgdpo
from conftest import eight_pairs, rows_of, write_rows
from tgdpo import dpo_loss, guidance, simpo_loss, tgdpo_loss


def hand():
    """Two pairs of unequal lengths, padded with zeros to T = 3; l = log pi - log ref, beta 0.1, alpha 0.5.

    pair 1, chosen   l = 1.0 -0.5  2.0   r = 0.4 -0.2  0.0   f_w = 1.2 0.9 1.0   sum f l = 1.2 - 0.45 + 2.0 = 2.75
            rejected l = 0.5 -1.0        r = 0.2 -0.6        f_l = 0.9 1.3       sum f l = 0.45 - 1.3       = -0.85
            phi = 0.1 (2.75 + 0.85) = 0.36       loss = ln(1 + e^-0.36)  = 0.5293
            scores 0.1 * 2.5 = 0.25 and 0.1 * -0.5 = -0.05
    pair 2, chosen   l = -2.0            r = -1.0            f_w = 0.5           sum f l = -1.0
            rejected l = 1.0  0.5 -0.5   r = 1.0 -1.0  0.4   f_l = 0.5 1.5 0.8   sum f l = 0.5 + 0.75 - 0.4 = 0.85
            phi = 0.1 (-1.0 - 0.85) = -0.185     loss = ln(1 + e^0.185) = 0.7899
            scores 0.1 * -2 = -0.2 and 0.1 * 1.0 = 0.1
    With f = 1 (DPO): phi = 0.1 (2.5 + 0.5) = 0.3 and 0.1 (-2 - 1) = -0.3, losses 0.5544 and 0.8544.
    """
    chosen = torch.tensor([[1.0, -0.5, 2.0], [-2.0, 0.0, 0.0]], dtype=torch.float64)
    rejected = torch.tensor([[0.5, -1.0, 0.0], [1.0, 0.5, -0.5]], dtype=torch.float64)
    chosen_rewards = torch.tensor([[0.4, -0.2, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    rejected_rewards = torch.tensor([[0.2, -0.6, 0.0], [1.0, -1.0, 0.4]], dtype=torch.float64)
    ref_chosen, ref_rejected = torch.full_like(chosen, -3.0), torch.full_like(rejected, -2.0)
    ref_chosen[1, 1:], ref_rejected[0, 2] = 0.0, 0.0
    return [chosen + ref_chosen, rejected + ref_rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards]


def test_tgdpo_by_hand():
    losses, chosen, rejected = tgdpo_loss(*hand(), beta=0.1, alpha=0.5)
    assert losses.tolist() == pytest.approx([0.529260, 0.789919], abs=2e-6)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.36)), math.log1p(math.exp(0.185))], abs=1e-12)
    assert chosen.tolist() == pytest.approx([0.25, -0.2])
    assert rejected.tolist() == pytest.approx([-0.05, 0.1])


def test_dpo_by_hand():
    """f = 1 in the table above: phi 0.3 and -0.3; the scores are those of TGDPO, in which f has no part."""
    losses, chosen, rejected = dpo_loss(*hand()[:4], beta=0.1)
    assert losses.tolist() == pytest.approx([0.554355, 0.854355], abs=2e-6)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.3)), math.log1p(math.exp(0.3))], abs=1e-12)
    assert chosen.tolist() == pytest.approx([0.25, -0.2])
    assert rejected.tolist() == pytest.approx([-0.05, 0.1])
    assert dpo_loss(*hand()[:4], beta=1.0)[0].tolist() == pytest.approx([0.048587, 3.048587], abs=2e-6)  # phi 3, -3


def test_the_gradient_of_dpo():
    """-sigma(-phi) beta on each token of the winner, the opposite on the loser's; phi = 0.3: 0.1 * 0.425557."""
    tensors = [x.clone().requires_grad_() for x in hand()[:4]]
    losses, chosen, rejected = dpo_loss(*tensors, beta=0.1)
    losses[0].backward()
    assert tensors[0].grad[0].tolist() == pytest.approx([-0.0425557] * 3, abs=1e-7)
    assert tensors[1].grad[0].tolist() == pytest.approx([0.0425557] * 3, abs=1e-7)
    assert tensors[0].grad[1].tolist() == [0.0] * 3, "the other pair's"
    assert not chosen.requires_grad and not rejected.requires_grad


def test_alpha_0_is_dpo_to_the_bit():
    losses = tgdpo_loss(*hand(), beta=0.1, alpha=0.0)
    for a, b in zip(losses, dpo_loss(*hand()[:4], beta=0.1)):
        assert torch.equal(a, b)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, *rewards = hand()
    plain = -torch.nn.functional.logsigmoid(
        0.1 * (policy_chosen - ref_chosen).sum(-1) - 0.1 * (policy_rejected - ref_rejected).sum(-1)
    )
    assert torch.equal(losses[0], plain)
    assert torch.equal(losses[0], tgdpo_loss(*hand()[:4], *[7.0 * r for r in rewards], beta=0.1, alpha=0.0)[0])


def test_simpo_by_hand():
    """(3d): chosen log-probs -1 -2 -3 (mean -2), rejected -4 -2 (mean -3), beta 2, gamma 0.5: phi = 2 - 0.5 = 1.5."""
    chosen, rejected = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-4.0, -2.0, 0.0]])
    masks = torch.tensor([[True, True, True]]), torch.tensor([[True, True, False]])
    losses, chosen_scores, rejected_scores = simpo_loss(chosen, rejected, *masks, beta=2.0, gamma=0.5)
    assert losses.item() == pytest.approx(0.201413, abs=2e-6)  # ln(1 + e^-1.5)
    assert (chosen_scores.item(), rejected_scores.item()) == (-4.0, -6.0)
    # what stands where the masks are false has no part in it
    losses, _, _ = simpo_loss(chosen, rejected - torch.tensor([[0.0, 0.0, 9.0]]), *masks, beta=2.0, gamma=0.5)
    assert losses.item() == pytest.approx(0.201413, abs=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, 100.0])
def test_ln_2_where_the_policy_is_the_reference(alpha):
    _, _, ref_chosen, ref_rejected, *rewards = hand()
    losses, chosen, rejected = tgdpo_loss(
        ref_chosen, ref_rejected, ref_chosen, ref_rejected, *rewards, beta=0.1, alpha=alpha
    )
    assert losses.tolist() == [math.log(2)] * 2
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


def test_a_reward_model_equal_to_the_reference_is_dpo():
    zeros = [torch.zeros(2, 3, dtype=torch.float64)] * 2
    assert torch.equal(
        tgdpo_loss(*hand()[:4], *zeros, beta=0.1, alpha=0.5)[0], tgdpo_loss(*hand(), beta=0.1, alpha=0.0)[0]
    )


def test_chosen_and_rejected_may_differ_in_length_and_padding_does_not_count():
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards = hand()
    want = tgdpo_loss(*hand(), beta=0.1, alpha=0.5)
    left, right = (lambda x: torch.nn.functional.pad(x, (4, 0))), (lambda x: torch.nn.functional.pad(x, (0, 2)))
    got = tgdpo_loss(
        left(policy_chosen),
        right(policy_rejected),
        left(ref_chosen),
        right(ref_rejected),
        left(chosen_rewards),
        right(rejected_rewards),
        beta=0.1,
        alpha=0.5,
    )
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_two_pairs_equal_each_pair_alone():
    both = tgdpo_loss(*hand(), beta=0.1, alpha=0.5)
    for i in range(2):
        alone = tgdpo_loss(*[x[i : i + 1] for x in hand()], beta=0.1, alpha=0.5)
        for a, b in zip(both, alone):
            assert a[i].item() == b[0].item()


@pytest.mark.parametrize(
    "alpha_r, winner, loser",
    [
        # |alpha r| < 1: the signs are DPO's, a winner's token is pushed up, a loser's down; r moves the sizes
        (+0.6, -1.6, +0.4),
        (-0.6, -0.4, +1.6),
        # |alpha r| > 1: f < 0 turns the sign of a bad token of the winner and of a good token of the loser
        (+1.5, -2.5, -0.5),
        (-1.5, +0.5, +2.5),
    ],
)
def test_gradient_of_each_token_in_the_four_cases(alpha_r, winner, loser):
    """(8d): d loss / d log pi_t is -sigma(-phi) beta f_w on the winner, +sigma(-phi) beta f_l on the loser; at pi = ref
    sigma(-phi) = 1/2, so with beta = 2 the gradients are -f_w = -(1 + alpha r) and f_l = 1 - alpha r."""
    logps = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    zeros, r = torch.zeros(1, 1), torch.full((1, 1), alpha_r / 0.5)
    tgdpo_loss(*logps, zeros, zeros, r, r, beta=2.0, alpha=0.5)[0].sum().backward()
    assert logps[0].grad.item() == pytest.approx(winner), "f_w and f_l swapped, or a missing beta?"
    assert logps[1].grad.item() == pytest.approx(loser), "f_w and f_l swapped, or a missing beta?"


def test_no_gradient_through_the_token_rewards_and_the_scores():
    tensors = [x.clone().requires_grad_() for x in hand()]
    losses, chosen, rejected = tgdpo_loss(*tensors, beta=0.1, alpha=0.5)
    losses.sum().backward()
    assert tensors[4].grad is None and tensors[5].grad is None, "the token rewards must be detached"
    assert tensors[0].grad.abs().sum() > 0
    assert not chosen.requires_grad and not rejected.requires_grad


def test_guidance_and_its_floor():
    r = torch.tensor([-3.0, 0.0, 1.0])
    assert guidance(r, 0.5, +1).tolist() == [-0.5, 1.0, 1.5]
    assert guidance(r, 0.5, -1).tolist() == [2.5, 1.0, 0.5]
    assert guidance(r, 0.5, +1, floor=0.1).tolist() == pytest.approx([0.1, 1.0, 1.5])
    with_floor = tgdpo_loss(
        *[torch.ones(1, 1)] * 2,
        *[torch.zeros(1, 1)] * 2,
        torch.full((1, 1), -9.0),
        torch.zeros(1, 1),
        beta=1.0,
        alpha=1.0,
        floor=0.25,
    )[0]
    assert with_floor.item() == pytest.approx(math.log1p(math.exp(0.75)))  # phi = 0.25 * 1 - 1 * 1


# ----------------------------------------------------------------------------------------------------- a loss of yours
def weighted_loss(logps, batch, options):
    """SimPO with a weight for each token, from the data's columns chosen_weight and rejected_weight."""
    sides = zip(logps, batch["weight"], batch["mask"])
    chosen, rejected = [(logp * weight * mask).sum(-1) / mask.sum(-1) for logp, weight, mask in sides]
    return -torch.nn.functional.logsigmoid(options.beta * (chosen - rejected)), chosen.detach(), rejected.detach()


def weighted_pairs(file):
    """The eight pairs with weights 1/2, 1, 3/2, ... on the tokens of a winner and 2, 3, 4, ... on those of a loser."""
    rows = []
    for pair in eight_pairs():
        n, m = [len(pair[side].split()) + 1 for side in tgdpo.SIDES]
        weights = {"chosen_weight": [(t + 1) / 2 for t in range(n)], "rejected_weight": [t + 2.0 for t in range(m)]}
        rows.append(pair | weights)
    return write_rows(file, rows)


def weighted_by_plain_transformers(bench, beta=0.1):
    """-> the loss's mean over the eight pairs and the norm of its gradient, one sequence after the other."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.model)
    model, total = transformers.AutoModelForCausalLM.from_pretrained(bench.model).eval(), 0.0
    for pair in eight_pairs():
        means = []
        for side, weight in (("chosen", lambda t: (t + 1) / 2), ("rejected", lambda t: t + 2.0)):
            prompt, response = tokenizer(pair["prompt"]).input_ids, tokenizer(pair[side]).input_ids + [3]
            logps = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], -1)
            values = [weight(t) * logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
            means.append(sum(values) / len(values))
        total = total - torch.nn.functional.logsigmoid(beta * (means[0] - means[1])) / 8
    total.backward()
    return total.item(), torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


@pytest.mark.parametrize("free", [False, True])
def test_a_loss_with_columns_of_its_own_needs_one_entry(bench, free, monkeypatch):
    """The entry in LOSSES alone: the models that other losses need are run for it, unless the two sets say not to."""
    monkeypatch.setitem(tgdpo.LOSSES, "weighted", weighted_loss)
    judged, original = [], tgdpo.frozen_logps
    monkeypatch.setattr(tgdpo, "frozen_logps", lambda name, *rest: judged.append(name) or original(name, *rest))
    if free:
        for names in ("NO_REFERENCE", "NO_REWARDS"):
            monkeypatch.setattr(tgdpo, names, getattr(tgdpo, names) | {"weighted"})
    rows, out = bench.train(
        loss="weighted",
        dataset=weighted_pairs(bench.folder / "weighted.jsonl"),
        reward_model=bench.reward_model,
        num_train_epochs=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
    )
    assert judged == ([] if free else [bench.model, bench.reward_model])
    loss, norm = weighted_by_plain_transformers(bench)
    assert rows[0]["loss"] == pytest.approx(loss, abs=1e-5) and rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01 and len(rows) == 3
    assert json.loads((out / "run.json").read_text())["options"]["loss"] == "weighted"


def test_a_loss_of_your_own_on_the_command_line(bench):
    """A script that adds its loss and hands on its arguments has all of tgdpo.py."""
    script = bench.folder / "mine.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(Path(tgdpo.__file__).parent)!r}]\nimport tgdpo, torch\n"
        f"{inspect.getsource(weighted_loss)}\ntgdpo.LOSSES['weighted'] = weighted_loss\n"
        "sys.exit(tgdpo.main(sys.argv[1:]))\n"
    )
    data, out = weighted_pairs(bench.folder / "weighted.jsonl"), bench.folder / "mine"
    argv = bench.argv(loss="weighted", dataset=data, out=out, reward_model=bench.reward_model, num_train_epochs=2)
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True)
    assert done.returncode == 0 and f"done: {out}" in done.stdout, done.stderr
    loss, norm = weighted_by_plain_transformers(bench)
    rows = rows_of(out)
    assert rows[0]["loss"] == pytest.approx(loss, abs=1e-5) and rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert len(rows) == 2 and (out / "model.safetensors").exists()
    bench.train(loss="weighted", dataset=data, status=2)  # tgdpo.py itself does not know it
