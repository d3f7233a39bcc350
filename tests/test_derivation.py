"""derivation.md, equation by equation, against plain Python over enumerated sequences, and autograd.

Nothing that is expected here comes from the functions under test: trees are dictionaries from a prefix to lists,
and every expectation is a sum over all sequences. That a policy is best is not searched for: its gradient is 0, and
no random policy does better. What `python tgdpo.py` prints is worked out by hand in test_small.py.
"""

import itertools
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tgdpo
from tgdpo import (
    along,
    closed_form_policy,
    dpo_loss,
    guidance,
    implicit_reward,
    phi_and_delta,
    sequence_ppo_objective,
    tgdpo_loss,
    theorem_4_1,
    token_ppo_objective,
    token_rewards,
)

ROOT = Path(tgdpo.__file__).parent
sys.path.insert(0, str(ROOT / "scripts"))
import explain
import figures
from explain import f64
from treg import treg_loss

TEXT = (ROOT / "derivation.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------ plain Python, no tensors
class Tree:
    """A random language: `ref`, `reward` and `f` map a prefix (a tuple of tokens) to one number for each next token.

    The token `end`, if there is one, ends a response. Prefixes that contain it are never reached (`live` lacks them);
    nothing is earned there, and they have a row in every table, where explain.py's heap has it.
    """

    def __init__(self, seed, steps=3, actions=3, end=None, low=0.0):
        rng = random.Random(seed)
        self.steps, self.actions, self.beta = steps, actions, rng.choice([0.4, 1.0, 2.0])
        self.prefixes = [p for t in range(steps) for p in itertools.product(range(actions), repeat=t)]
        self.live = [p for p in self.prefixes if end not in p]
        whole = [y for t in range(1, steps + 1) for y in itertools.product(range(actions), repeat=t)]
        self.responses = [y for y in whole if end not in y[:-1] and (len(y) == steps or y[-1] == end)]
        self.ref = {p: self.normal([math.exp(rng.gauss(0, 1)) for _ in range(actions)]) for p in self.prefixes}
        self.reward = {p: [(rng.gauss(0, 1) + low) * (p in self.live) for _ in range(actions)] for p in self.prefixes}
        self.f = {p: [rng.uniform(0.3, 2) for _ in range(actions)] for p in self.prefixes}
        self.other = {p: self.normal([math.exp(rng.gauss(0, 1)) for _ in range(actions)]) for p in self.prefixes}
        self.other |= {p: self.ref[p] for p in self.prefixes if p not in self.live}
        self.rows = [self.prefixes.index(p) for p in self.live]
        places = [
            [(self.prefixes.index(y[:t]), y[t]) if t < len(y) else (-1, -1) for t in range(steps)]
            for y in self.responses
        ]
        self.tree = torch.tensor(places).unbind(-1)  # (states, actions), (Y, T) each
        self.R = [self.total(self.reward, y) for y in self.responses]

    @staticmethod
    def normal(weights):
        return [w / sum(weights) for w in weights]

    def total(self, table, y):
        return sum(table[y[:t]][y[t]] for t in range(len(y)))

    def probability(self, policy, y):
        return math.prod(policy[y[:t]][y[t]] for t in range(len(y)))

    def table(self, values, log=False):
        return torch.tensor(
            [[math.log(v) if log else v for v in values[p]] for p in self.prefixes], dtype=torch.float64
        )

    def back(self, table):
        """A tensor of log-probs -> {prefix: probabilities}."""
        return {p: row for p, row in zip(self.prefixes, table.exp().tolist())}

    def J(self, policy):
        return sum(
            self.probability(policy, y)
            * (R - self.beta * math.log(self.probability(policy, y) / self.probability(self.ref, y)))
            for y, R in zip(self.responses, self.R)
        )

    def best(self, prefix):
        """π*(a | prefix) from (2a) alone: which share of the weight behind the prefix has the token a next."""
        weight = [0.0] * self.actions
        for y, R in zip(self.responses, self.R):
            if y[: len(prefix)] == prefix:
                weight[y[len(prefix)]] += self.probability(self.ref, y) * math.exp(R / self.beta)
        return self.normal(weight)

    def Z(self, prefix, f=None):
        return sum(self.tilted(prefix, f))

    def tilted(self, prefix, f=None):
        rows = zip(self.ref[prefix], self.reward[prefix], f or [1.0] * self.actions)
        return [q * math.exp(r / (self.beta * g)) for q, r, g in rows]

    def myopic(self, f=None):
        """The closed form of each state by itself, {prefix: probabilities}."""
        return {p: self.normal(self.tilted(p, f and f[p])) for p in self.prefixes}

    def labelled(self):
        """How often y beats y' among pairs of two different responses, (Y, Y): drawn alike, labelled by (3b)."""
        p = [self.probability(self.ref, y) for y in self.responses]
        both = 1 - sum(a * a for a in p)
        rows = [[2 * a * b / both / (1 + math.exp(S - R)) for b, S in zip(p, self.R)] for a, R in zip(p, self.R)]
        return [[weight * (i != j) for j, weight in enumerate(row)] for i, row in enumerate(rows)]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def slope(objective, log_policy):
    """The largest derivative of an objective by the logits of a policy."""
    logits = log_policy.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(-1)), logits)[0].abs().max().item()


def rivals(log_policy, seed=0, each=100):
    """Random policies, as log-probs: some very near a given one, some far away, some nearly deterministic."""
    draws = torch.Generator().manual_seed(seed)
    for scale in (0.003, 0.1, 1.0, 10.0):
        for _ in range(each):
            step = scale * torch.randn(log_policy.shape, generator=draws, dtype=torch.float64)
            yield (log_policy + step).log_softmax(-1)


# Of one length, with an end token, with one where all else is bad, so that ended states are best.
LANGUAGES = {f"equal-{seed}": dict(seed=seed) for seed in (0, 1, 2)}
LANGUAGES |= {"ends-3": dict(seed=3, end=0), "ends-4": dict(seed=4, end=2), "bad-5": dict(seed=5, end=1, low=-3.0)}


@pytest.fixture(params=LANGUAGES)
def tree(request):
    return Tree(**LANGUAGES[request.param])


# ----------------------------------------------------------------------------------------------- tables of any kind
@st.composite
def tables(draw):
    """(S, A) log-probs, rewards, f (also near 0), another policy, beta."""
    states, actions = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def table(low, high):
        cells = st.floats(low, high, allow_nan=False)
        rows = st.lists(st.lists(cells, min_size=actions, max_size=actions), min_size=states, max_size=states)
        return torch.tensor(draw(rows), dtype=torch.float64)

    f = 10 ** table(-3, 1)
    return table(-5, 5).log_softmax(-1), table(-3, 3), f, table(-5, 5).log_softmax(-1), 10 ** draw(st.floats(-1.5, 1))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(tables())
def test_gibbs_and_the_closed_form_on_any_table(given_tables):
    """(1c), (6a), (4.3a), (4.3b), (4.3c): by sums over the actions, in Python; the closed form is best, and by the KL
    to it; its reward is the reward, whatever f, and any other policy's is by hand."""
    ref, reward, f, other, beta = given_tables
    policy, log_Z = closed_form_policy(ref, reward, beta, f)
    value = token_ppo_objective(other, ref, reward, beta, f)
    best = token_ppo_objective(policy, ref, reward, beta, f)
    back = implicit_reward(policy, ref, beta, f, log_Z[:, None])
    torch.testing.assert_close(back, reward, rtol=1e-7, atol=1e-7)
    others = implicit_reward(other, ref, beta, f, log_Z[:, None])
    for s in range(len(ref)):
        q, r, g, p = ref[s].exp().tolist(), reward[s].tolist(), f[s].tolist(), other[s].exp().tolist()
        exponents = [a / (beta * b) for a, b in zip(r, g)]
        top = max(exponents)
        want_Z = top + math.log(sum(a * math.exp(e - top) for a, e in zip(q, exponents)))
        want_policy = [math.log(a) + e - want_Z for a, e in zip(q, exponents)]
        want = sum(a * (e - math.log(a / b)) for a, e, b in zip(p, exponents, q))
        scale = 1 + abs(top)
        assert log_Z[s].item() == pytest.approx(want_Z, abs=1e-9 * scale), "(4.3b)"
        assert policy[s].tolist() == pytest.approx(want_policy, abs=1e-9 * scale), "(4.3a)"
        assert policy[s].exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert value[s].item() == pytest.approx(want, abs=1e-9 * scale), "(6a)"
        assert best[s].item() == pytest.approx(want_Z, abs=1e-9 * scale), "the maximum is log Z"
        gap = sum(a * (math.log(a) - b) for a, b in zip(p, want_policy))
        assert want == pytest.approx(want_Z - gap, abs=1e-9 * scale), "(1c)"
        assert want <= want_Z + 1e-9 * scale
        rewards = [beta * c * (math.log(a) - math.log(b) + want_Z) for a, b, c in zip(p, q, g)]
        assert others[s].tolist() == pytest.approx(rewards, rel=1e-9, abs=1e-9 * scale), "(4.3c)"


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_does_better_than_the_closed_form(seed):
    """(6a), (4.3a), (6b): at the best policy of either problem no gradient; random policies do worse in every state.
    The two are one where f is the same for all actions; only (6b)'s does not move if all rewards of a state do."""
    torch.manual_seed(seed)
    ref, reward = torch.randn(3, 4).double().log_softmax(-1), torch.randn(3, 4).double()
    f, beta = 0.3 + torch.rand(3, 4).double(), 0.7
    policy, other = closed_form_policy(ref, reward, beta, f)[0], explain.kl_weighted_policy(ref, reward, beta, f)

    def on_the_reward(p):  # (6a)
        return (p.exp() * (reward / beta / f - p + ref)).sum(-1)

    def on_the_kl(p):  # (6b)'s problem
        return (p.exp() * (reward - beta * f * (p - ref))).sum(-1)

    for objective, best, worse in ((on_the_reward, policy, other), (on_the_kl, other, policy)):
        assert slope(lambda p: objective(p).sum(), best) < 1e-8
        assert slope(lambda p: objective(p).sum(), worse) > 0.01
        close(best.exp().sum(-1), [1.0] * 3)
        for rival in rivals(best, seed):
            assert (objective(rival) <= objective(best) + 1e-12).all()
            close(token_ppo_objective(rival, ref, reward, beta, f), on_the_reward(rival))
    close(explain.kl_weighted_policy(ref, reward, beta, 0 * f + 0.7), closed_form_policy(ref, reward, beta, 0.7)[0])
    close(explain.kl_weighted_policy(ref, reward + 3, beta, f), other)
    assert (closed_form_policy(ref, reward + 3, beta, f)[0] - policy).abs().max() > 0.01


def test_an_action_that_is_never_taken_counts_nothing():
    """(6a) with zeros in the policy, and in both."""
    ref, zero = f64([[0.5, 0.5, 0.0]]).log(), float("-inf")
    policy = f64([[0.0, zero, zero]])
    reward = f64([[2.0, 5.0, 9.0]])
    assert token_ppo_objective(policy, ref, reward, 2.0).item() == pytest.approx(1.0 - math.log(2))
    log_policy, log_Z = closed_form_policy(ref, reward, 2.0)
    assert log_Z.item() == pytest.approx(math.log((math.exp(1.0) + math.exp(2.5)) / 2))
    assert log_policy[0, 2].item() == zero


# ------------------------------------------------------------------------------------------------ sequences and bounds
def test_trees_are_explains(tree):
    """What these tests pass as a language: explain.py's own where all lengths are equal; -1 after an end otherwise."""
    states, actions = tree.tree
    if len(tree.live) == len(tree.prefixes):
        assert all(torch.equal(a, b) for a, b in zip(tree.tree, explain.sequences(tree.steps, tree.actions)))
    else:
        assert {len(y) for y in tree.responses} == {1, 2, 3}
    assert [(row >= 0).sum().item() for row in states] == [(row >= 0).sum().item() for row in actions]
    close(sum(tree.probability(tree.other, y) for y in tree.responses), 1.0)
    table = tree.table(tree.reward)
    want = [[tree.reward[y[:t]][y[t]] if t < len(y) else 0.0 for t in range(tree.steps)] for y in tree.responses]
    assert along(table, tree.tree).tolist() == want


def test_sequence_level_ppo(tree):
    """(1b), (2a), (3a): J by enumeration; its optimum weighs responses by π_ref exp(R / β), and its reward is R."""
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    other = tree.table(tree.other, log=True)
    close(sequence_ppo_objective(other, ref, reward, tree.beta, tree.tree), tree.J(tree.other))
    exact, V, _ = explain.soft_optimum(ref, reward, tree.beta)
    p_ref = [tree.probability(tree.ref, y) for y in tree.responses]
    Z = sum(p * math.exp(R / tree.beta) for p, R in zip(p_ref, tree.R))
    best = tree.beta * math.log(Z)
    close(V[0], best)
    close(tree.J(tree.back(exact)), best)
    want = [p * math.exp(R / tree.beta) / Z for p, R in zip(p_ref, tree.R)]
    close(explain.probability(exact, tree.tree), want)
    policy, log_Z = closed_form_policy(f64(p_ref).log(), f64(tree.R), tree.beta)
    close(policy.exp(), want)
    close(tree.beta * log_Z, best)
    sums = implicit_reward(f64(want).log(), f64(p_ref).log(), tree.beta, 1.0, log_Z)
    close(sums, tree.R)
    # No search: J has no slope at this policy, and no random policy has a larger J, by enumeration in Python.
    assert slope(lambda p: sequence_ppo_objective(p, ref, reward, tree.beta, tree.tree), exact) < 1e-8
    assert slope(lambda p: sequence_ppo_objective(p, ref, reward, tree.beta, tree.tree), other) > 1e-3
    for rival in rivals(exact, each=25):
        J = tree.J(tree.back(rival))
        assert J <= best + 1e-9
        close(sequence_ppo_objective(rival, ref, reward, tree.beta, tree.tree), J)


def test_soft_value_iteration(tree):
    """(5a), (5b), (5c): conditionals of the enumerated optimum; shaped by V, Z is 1 and the myopic policy is exact."""
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    exact, V, ahead = explain.soft_optimum(ref, reward, tree.beta)
    for i, prefix in zip(tree.rows, tree.live):
        assert exact[i].exp().tolist() == pytest.approx(tree.best(prefix), abs=1e-10)
        rest = sum(
            math.prod(tree.ref[y[:t]][y[t]] for t in range(len(prefix), len(y)))
            * math.exp(sum(tree.reward[y[:t]][y[t]] for t in range(len(prefix), len(y))) / tree.beta)
            for y in tree.responses
            if y[: len(prefix)] == prefix
        )
        assert V[i].item() == pytest.approx(tree.beta * math.log(rest), abs=1e-10)
    shaped = reward + ahead - V[:, None]
    policy, log_Z = closed_form_policy(ref, shaped, tree.beta)
    assert log_Z.abs().max() < 1e-12
    close(policy, exact)
    by_prefix = dict(zip(tree.prefixes, shaped.tolist()))
    change = [tree.total(by_prefix, y) - R for y, R in zip(tree.responses, tree.R)]
    assert max(change) - min(change) < 1e-12
    assert (closed_form_policy(ref, reward, tree.beta)[0].exp() - exact.exp()).abs().max() > 0.02


def test_preferences_fix_a_reward_up_to_a_potential(tree):
    """Section 5: rewards with the same sums up to a constant differ by U(s') - U(s), one free number a state; only one
    of them has Z = 1 in every state, (5c). On the quoted language that are 40 of 120 numbers."""
    language = explain.sequences(4, 3)
    for (states, actions), live, of in ((tree.tree, len(tree.live), tree.actions), (language, 40, 3)):
        passes = torch.zeros(len(states), states.max() + 1, of).double()
        for y, t in (states >= 0).nonzero().tolist():
            passes[y, states[y, t], actions[y, t]] = 1
        sums = passes.flatten(1)
        free = live * of - torch.linalg.matrix_rank(sums - sums.mean(0)).item()
        assert free == live
    assert "40 of 120" in TEXT and sums.shape == (81, 120) and free == 40
    ref, reward, rng = tree.table(tree.ref, log=True), tree.table(tree.reward), random.Random(0)
    U = {p: rng.gauss(0, 1) for p in tree.live}
    other = {p: [r + U.get((*p, a), 0.0) - U.get(p, 0.0) for a, r in enumerate(tree.reward[p])] for p in tree.prefixes}
    for y, R in zip(tree.responses, tree.R):
        assert tree.total(other, y) == pytest.approx(R - U[()])
    shaped = []
    for table in (reward, tree.table(other)):
        _, V, ahead = explain.soft_optimum(ref, table, tree.beta)
        shaped.append((table + ahead - V[:, None])[tree.rows])
    close(shaped[0], shaped[1])
    assert (closed_form_policy(ref, tree.table(other), tree.beta)[1][tree.rows].abs() > 1e-3).any()


def test_when_myopic_is_exact():
    """Section 5: it is if Σ log Z is the same along all responses, though log Z differs in states of one depth."""
    tree = Tree(0, steps=3, actions=2)
    for last, same in ((1.0, True), (1.5, False)):
        log_Z = dict.fromkeys(tree.prefixes, 0.0) | {(0,): 1.0, (1, 0): 1.0, (1, 1): last}
        for p in tree.prefixes:
            rows = zip(tree.other[p], tree.ref[p])
            tree.reward[p] = [tree.beta * (math.log(a / q) + log_Z[p]) for a, q in rows]
        close(list(tree.myopic().values()), list(tree.other.values()))
        exact = explain.soft_optimum(tree.table(tree.ref, log=True), tree.table(tree.reward), tree.beta)[0].exp()
        assert ((exact - f64(list(tree.other.values()))).abs().max() < 1e-12) == same


def reach(policy, prefix):
    """The probability that a policy passes a prefix."""
    return math.prod(policy[prefix[:t]][prefix[t]] for t in range(len(prefix)))


def term(tree, policy, t):
    """One t of (1b): what a policy earns at token t, less the price of that token; 0 where a response has ended."""
    total = 0.0
    for p in tree.live:
        if len(p) == t:
            gain = sum(
                a * (r - tree.beta * math.log(a / q))
                for a, r, q in zip(policy[p], tree.reward[p], tree.ref[p])
                if a > 0
            )
            total += reach(policy, p) * gain
    return total


def walk(tree, goal):
    """The policy that goes to a prefix with certainty, and plays the closed form of one state there and elsewhere."""
    policy = tree.myopic()
    for t in range(len(goal)):
        policy[goal[:t]] = [float(a == goal[t]) for a in range(tree.actions)]
    return policy


def test_theorem_41(tree):
    """(4.1), (4a), (4b): the right side by walking to every state, ended ones too; no policy has a larger term."""
    ref, reward, beta = tree.table(tree.ref, log=True), tree.table(tree.reward), tree.beta
    log_Z = {p: math.log(tree.Z(p)) for p in tree.prefixes}
    bound, fixed = [x.item() for x in theorem_4_1(ref, f64([log_Z[p] for p in tree.prefixes]), beta, tree.tree)]
    best = beta * math.log(
        sum(tree.probability(tree.ref, y) * math.exp(R / beta) for y, R in zip(tree.responses, tree.R))
    )
    got = [x.item() for x in explain.bounds(ref, reward, beta, tree.tree)]
    assert got == pytest.approx([best, bound, fixed], abs=1e-10)
    total = 0.0
    for t in range(tree.steps):
        goals = [p for p in tree.live if len(p) == t] + [y for y in tree.responses if len(y) <= t]
        values = [term(tree, walk(tree, goal), t) for goal in goals]
        assert values == pytest.approx([beta * log_Z[p] if p in tree.live else 0.0 for p in goals], abs=1e-12)
        total += max(values)
        for rival in rivals(ref, seed=t, each=25):
            assert term(tree, tree.back(rival), t) <= max(values) + 1e-12
    assert bound == pytest.approx(total, abs=1e-10)
    assert best <= bound + 1e-12
    assert fixed == pytest.approx(sum(reach(tree.ref, p) * beta * log_Z[p] for p in tree.live), abs=1e-10)
    # With the states of the myopic policy (4b) is its J, with those of the exact optimum it is at least max J.
    myopic, exact = tree.myopic(), {p: tree.best(p) if p in tree.live else tree.ref[p] for p in tree.prefixes}
    assert sum(reach(myopic, p) * beta * log_Z[p] for p in tree.live) == pytest.approx(tree.J(myopic), abs=1e-10)
    assert tree.J(myopic) < best < sum(reach(exact, p) * beta * log_Z[p] for p in tree.live)
    # (4a) for a policy that is optimal in no sense
    identity = 0.0
    for p in tree.live:
        kl = sum(a * math.log(a / b) for a, b in zip(tree.other[p], myopic[p]))
        identity += reach(tree.other, p) * beta * (log_Z[p] - kl)
    assert identity == pytest.approx(tree.J(tree.other), abs=1e-10)
    assert sum(term(tree, tree.other, t) for t in range(tree.steps)) == pytest.approx(identity, abs=1e-10)


def test_theorem_41_by_hand():
    """(4.1), (4b): max J, the right side, and with the reference's states. A token of probability .001 leads to a state
    where every token earns 10: log(.001 e^10 + .999) = 3.137, 10, .01. An end token of probability .5, reward 0, else
    a state where every token earns -10: log(.5 + .5 e^-10) = -.693; 0 + 0, as the ended state has log Z = 0; -5."""
    ref, reward = f64([[0.001, 0.999], [0.5, 0.5], [0.5, 0.5]]).log(), f64([[0.0, 0.0], [10.0, 10.0], [0.0, 0.0]])
    got = explain.bounds(ref, reward, 1.0, explain.sequences(2, 2))
    assert [x.item() for x in got] == pytest.approx([math.log(0.001 * math.exp(10) + 0.999), 10.0, 0.01], abs=1e-6)
    ref, reward = f64([[0.5, 0.5], [0.5, 0.5]]).log(), f64([[0.0, 0.0], [-10.0, -10.0]])
    early = torch.tensor([[0, -1], [0, 1], [0, 1]]), torch.tensor([[0, -1], [1, 0], [1, 1]])
    best = math.log(0.5 + 0.5 * math.exp(-10))
    assert [x.item() for x in explain.bounds(ref, reward, 1.0, early)] == pytest.approx([best, 0.0, -5.0], abs=1e-12)
    assert -10 < best < -0.69  # what the right side would be without the ended state is no bound
    all_end = torch.tensor([[0], [0]]), torch.tensor([[0], [1]])  # where all have one token, none has ended early
    assert [x.item() for x in theorem_4_1(ref, f64([-3.0, -10.0]), 2.0, all_end)] == pytest.approx([-6.0, -6.0])


# --------------------------------------------------------------------------------------- what the minimisers are
def plain_phi(tree, table, f_w, f_l):
    """Σ_t β f_w x over y less Σ_t β f_l x over y', for all y and y', x a tensor (S, A): (Y, Y), token by token."""
    index = {p: i for i, p in enumerate(tree.prefixes)}
    won, lost = [
        [sum(tree.beta * f[y[:t]][y[t]] * table[index[y[:t]], y[t]] for t in range(len(y))) for y in tree.responses]
        for f in (f_w, f_l)
    ]
    return torch.stack([torch.stack([a - b for b in lost]) for a in won])


def plain_loss(tree, log_policy, f_w, f_l, log_Z=None):
    """E[-log σ(φ + δ)] over all labelled pairs, with nothing of tgdpo.py."""
    ratios = log_policy - tree.table(tree.ref, log=True) + (0 if log_Z is None else log_Z[:, None])
    losses = -torch.nn.functional.logsigmoid(plain_phi(tree, ratios, f_w, f_l))
    weights = torch.tensor(tree.labelled(), dtype=torch.float64)
    return (weights * losses).sum()


@pytest.mark.parametrize("end", [None, 1])
def test_pair_losses_are_the_plain_sum(end):
    """(3b), (3c), (4.4a), (4.4b), (8b), (8c): all pairs equal loops in Python, with δ and without, α = 0 and above."""
    tree = Tree(5, steps=2, actions=2, end=end)
    ref, log_policy = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    rhat, R = tree.table(tree.reward), f64(tree.R)
    weights = explain.pair_weights(explain.probability(ref, tree.tree), R)
    close(weights, tree.labelled())  # (3b)
    Z_rows = f64([math.log(tree.Z(p)) for p in tree.prefixes])
    for alpha in (0.0, 0.4):
        f_w, f_l = [{p: [1 + sign * alpha * r for r in row] for p, row in tree.reward.items()} for sign in (+1, -1)]
        phi, delta = [plain_phi(tree, x, f_w, f_l) for x in (log_policy - ref, Z_rows[:, None].expand_as(ref))]
        for sign, f in ((+1, f_w), (-1, f_l)):
            close(guidance(rhat, alpha, sign), tree.table(f))  # (8b)
        tables = (tree.table(f_w), tree.table(f_l)) if alpha else (1.0, 1.0)
        got = phi_and_delta(log_policy, ref, Z_rows, tree.beta, *tables, tree.tree)
        close(got[0], phi)  # (4.4a)
        close(got[1], delta)  # (4.4b)
        losses = explain.pair_losses(log_policy, ref, rhat, tree.beta, alpha, tree.tree)
        close(losses, [[math.log1p(math.exp(-x)) for x in row] for row in phi.tolist()])  # (8c)
        if not alpha:
            pairs = [*explain.all_pairs(log_policy, tree.tree), *explain.all_pairs(ref, tree.tree)]
            close(dpo_loss(*pairs, tree.beta)[0], losses)  # (3c)
        close((weights * losses).sum(), plain_loss(tree, log_policy, f_w, f_l))
        shifted = explain.pair_losses(log_policy + Z_rows[:, None], ref, rhat, tree.beta, alpha, tree.tree)
        close((weights * shifted).sum(), plain_loss(tree, log_policy, f_w, f_l, Z_rows))


def test_bradley_terry_is_phi_and_delta(tree):
    """(4.4a), (4.4b): φ + δ = R(y_w) - R(y_l) at every pair for the closed form of (4.3a), whatever f, if it is one. If
    it depends on the label, a winner's π_m and Z and a loser's are two."""
    ref, reward, f = tree.table(tree.ref, log=True), tree.table(tree.reward), tree.table(tree.f)
    want = f64(tree.R)[:, None] - f64(tree.R)
    policy, log_Z = closed_form_policy(ref, reward, tree.beta, f)
    phi, delta = phi_and_delta(policy, ref, log_Z, tree.beta, f, f, tree.tree)
    close(phi + delta, want)
    assert delta.abs().max() > 0.1
    f_l = 2.4 - f
    other, other_Z = closed_form_policy(ref, reward, tree.beta, f_l)
    sides = [phi_and_delta(*x, tree.beta, f, f_l, tree.tree) for x in ((policy, ref, log_Z), (other, ref, other_Z))]
    assert all((sum(side) - want).abs().max() > 0.1 for side in sides)
    won, lost = [along(tree.beta * g * (p - ref + Z[:, None]), tree.tree).sum(-1) for p, Z, g in
                 ((policy, log_Z, f), (other, other_Z, f_l))]
    close(won[:, None] - lost, want)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("end", [None, 0])
def test_minimisers_with_and_without_delta(guided, end):
    """(3c), (7a), (7c): with δ the myopic policy; without it the exact one (f = 1) or (7c). No search: a cross-entropy
    is at least the entropy of the labels, these policies reach it, with no slope, and no other policy does."""
    tree = Tree(3, steps=2, actions=3, end=end)
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    f = tree.f if guided else {p: [1.0] * tree.actions for p in tree.prefixes}
    log_Z = f64([math.log(tree.Z(p, f[p])) for p in tree.prefixes])
    myopic = tree.table(tree.myopic(f), log=True)
    consistent = explain.consistent_policy(ref, reward, tree.beta, tree.table(f))
    sums = along(tree.table(f) * (consistent - ref) * tree.beta, tree.tree).sum(-1) - f64(tree.R)
    assert (sums.max() - sums.min()).item() < 1e-9, "(7c): β f l must add up to R and a constant"
    exact = f64([tree.best(p) for p in tree.live])
    assert ((consistent.exp()[tree.rows] - exact).abs().max() < 1e-9) == (not guided)
    # That π_m is the only one with δ is (7c) for the reward r - β f log Z.
    less = reward - tree.beta * tree.table(f) * log_Z[:, None]
    close(explain.consistent_policy(ref, less, tree.beta, tree.table(f))[tree.rows], myopic[tree.rows])
    rows = tree.labelled()
    won = [(rows[i][j], rows[i][j] / (rows[i][j] + rows[j][i])) for i, j in itertools.permutations(range(len(rows)), 2)]
    entropy = -sum(weight * math.log(chance) for weight, chance in won)
    for shift, best, worse in [(None, consistent, myopic), (log_Z, myopic, consistent)]:  # without δ, with δ

        def loss(p):
            return plain_loss(tree, p, f, f, shift)

        assert loss(best).item() == pytest.approx(entropy, abs=1e-12)
        assert slope(loss, best) < 1e-8
        assert loss(worse).item() > entropy + 1e-4
        assert all(loss(rival).item() > entropy for rival in rivals(best, each=5))


@pytest.mark.parametrize("by_action", [False, True])
def test_what_is_learned_without_delta_for_other_f(tree, by_action):
    """(7c): with f(s) the optimum of reward less a KL term of weight β f(s); with f(s, a) that of neither this, (6b)'s
    sum over the states that are visited, nor of J."""
    f = tree.f if by_action else {p: [tree.f[p][0]] * tree.actions for p in tree.prefixes}
    ref, reward, weight = tree.table(tree.ref, log=True), tree.table(tree.reward), tree.beta * tree.table(f)
    learned = explain.consistent_policy(ref, reward, tree.beta, tree.table(f))

    def J(p, weight):
        return (along(p, tree.tree).sum(-1).exp() * along(reward - weight * (p - ref), tree.tree).sum(-1)).sum()

    assert (slope(lambda p: J(p, weight), learned) < 1e-8) == (not by_action)
    assert slope(lambda p: J(p, tree.beta), learned) > 1e-4


def test_two_steps_by_hand():
    """Sections 5 and 7: V = (log(e/2 + 1/2), 1, 0) and log Z = (0, 1, 0); the first token has .5 in π_m and σ(1) = .731
    in π*. A pair with one response through each first token has δ = 1: with δ the loss is least at φ = 0 (π_m), without
    δ at φ = 1 (π*)."""
    w, sigma = figures.two_steps(), 1 / (1 + math.exp(-1))
    close(w.V, [math.log(math.e / 2 + 0.5), 1.0, 0.0])
    close(w.log_Z, [0.0, 1.0, 0.0])
    close(w.myopic.exp(), torch.full((3, 2), 0.5))
    close(w.exact.exp(), [[sigma, 1 - sigma], [0.5, 0.5], [0.5, 0.5]])
    R = along(w.reward, w.tree).sum(-1)
    assert R.tolist() == [1, 1, 0, 0]
    weights = torch.sigmoid(R[:, None] - R).fill_diagonal_(0)

    def loss(p, with_delta):
        phi, delta = phi_and_delta(p, w.ref, w.log_Z, 1.0, 1.0, 1.0, w.tree)
        return -(weights * torch.nn.functional.logsigmoid(phi + with_delta * delta)).sum()

    for with_delta, best, phi in ((1, w.myopic, 0.0), (0, w.exact, 1.0)):
        got, delta = phi_and_delta(best, w.ref, w.log_Z, 1.0, 1.0, 1.0, w.tree)
        close(got[0, 2], phi)
        close(delta[0, 2], 1.0)
        assert slope(lambda p: loss(p, with_delta), best) < 1e-9
        assert slope(lambda p: loss(p, 1 - with_delta), best) > 0.1
        assert all(loss(rival, with_delta) > loss(best, with_delta) for rival in rivals(best, each=5))
    assert "(.73,.27)" in TEXT and f"{sigma:.2f}" == "0.73"


def test_theorem_44_is_about_one_pair():
    """(7b): minimum of -log σ(θ + 1) - log σ(-θ) at -1/2, of the sum without δ at 0, by search."""

    def found(delta):
        grid = [i / 1000 for i in range(-2000, 2001)]
        return min(grid, key=lambda x: math.log1p(math.exp(-x - delta[0])) + math.log1p(math.exp(x - delta[1])))

    assert found((1, 0)) == -0.5
    assert found((0, 0)) == 0.0
    assert found((0.2, 1.0)) == pytest.approx(0.4)
    assert found((1, -1)) == pytest.approx(-1.0)  # two orders of one pair: (δ2 - δ1) / 2 with δ2 = -δ1


# ------------------------------------------------------------------------------ the practical f and its neighbours
@pytest.mark.parametrize("seed", range(5))
def test_treg_and_tgdpo_are_one_gradient(seed):
    """(9a), (9b), (9c), (8e): by formulas written out, for one pair and a random small policy."""
    torch.manual_seed(seed)
    beta, alpha, logits = 0.7, 0.4, torch.randn(6, 4).double().requires_grad_()
    states, actions = torch.randint(6, (2, 1, 5)), torch.randint(4, (2, 1, 5))
    tables = [logits.log_softmax(-1), torch.randn(6, 4).double().log_softmax(-1), torch.randn(6, 4).double()]
    policy, ref, rhat = [[table[states[i], actions[i]] for i in (0, 1)] for table in tables]
    l_w, l_l = [p - q for p, q in zip(policy, ref)]
    d = beta * (l_w.sum() - l_l.sum())
    added = alpha * beta * ((rhat[0] * l_w).sum() + (rhat[1] * l_l).sum())
    tgdpo_ = tgdpo_loss(*policy, *ref, *rhat, beta, alpha)[0].sum()
    close(tgdpo_.detach(), math.log1p(math.exp(-(d + added).item())))  # (9b)
    w = 1 / (1 + math.exp(d.item()))
    raised = (rhat[0] * policy[0]).sum() + (rhat[1] * policy[1]).sum()
    treg = -torch.nn.functional.logsigmoid(d) - alpha * w * beta * raised
    ours = treg_loss(*policy, *ref, *rhat, beta, alpha)[0].sum()
    wanted, got, other = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (treg, ours, tgdpo_)]
    close(got, wanted)
    scale = w * (1 + math.exp((d + added).item()))
    close(wanted, scale * other)
    assert (wanted - other).abs().max() > 1e-3
    back = tgdpo_loss(*policy[::-1], *ref[::-1], *rhat[::-1], beta, alpha)[0].sum()
    both = math.exp(-tgdpo_.item()) + math.exp(-back.item())  # (8e)
    want = sum(1 / (1 + math.exp(-x)) for x in ((d + added).item(), (-d + added).item()))
    assert both == pytest.approx(want)
    assert (both > 1) == (added.item() > 0)


def test_mean_token_reward_is_minus_a_divergence(tree):
    """(8a), (10a): Σ π_ref r̂ = -β KL(π_ref || π_rm) <= 0."""
    ref, rm = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    rhat = token_rewards(rm, ref, tree.beta)
    for i, p in enumerate(tree.prefixes):
        kl = sum(q * math.log(q / m) for q, m in zip(tree.ref[p], tree.other[p]))
        assert (ref[i].exp() * rhat[i]).sum().item() == pytest.approx(-tree.beta * kl)
        want = [tree.beta * (math.log(m) - math.log(q)) for q, m in zip(tree.ref[p], tree.other[p])]
        assert rhat[i].tolist() == pytest.approx(want)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
def test_a_token_that_was_never_sampled(alpha):
    """(10b): the force on its logit, and no minimiser for any alpha > 0 if both sampled r̂ are negative."""
    ref, beta, rhat = f64([0.4, 0.4, 0.2]).log(), 0.8, f64([-0.2, -0.5, 0.0])
    logits = f64([0.3, -0.4, 0.1]).requires_grad_()

    def loss(p, *order):
        return tgdpo_loss(*[x[i][None, None] for x in (p, ref, rhat) for i in order], beta, alpha)[0].sum()

    p = logits.log_softmax(-1)
    phi = beta * ((1 + alpha * rhat[0]) * (p - ref)[0] - (1 - alpha * rhat[1]) * (p - ref)[1])
    force = -torch.autograd.grad(loss(p, 0, 1), logits)[0][2]
    close(force, (-alpha * beta * torch.sigmoid(-phi) * (rhat[0] + rhat[1]) * p[2].exp()).detach())
    moved = [p.detach() - nats * f64([1, 1, 0]) for nats in (0, 10, 1000)]
    lost = [loss(q, 0, 1).item() + loss(q, 1, 0).item() for q in moved]
    if alpha == 0:
        assert lost == pytest.approx([lost[0]] * 3)
    else:
        assert lost[0] > lost[1] > lost[2] and lost[2] < 1e-10


def test_a_shared_token_is_pushed_only_by_tgdpo():
    """(8d): a token that both responses have gets f_w - f_l = 2 α r̂ in TGDPO, nothing in DPO."""
    for alpha in (0.0, 0.3):
        shared = torch.zeros(()).double().requires_grad_()
        rows = [torch.stack([shared, f64(x)])[None] for x in (0.4, -0.2)]
        zeros, rhat = torch.zeros(1, 2).double(), f64([[-0.7, 0.5]])
        tgdpo_loss(*rows, zeros, zeros, rhat, rhat, 0.5, alpha)[0].sum().backward()
        phi = 0.5 * ((1 + alpha * 0.5) * 0.4 - (1 - alpha * 0.5) * -0.2)
        want = 2 * alpha * -0.7 * 0.5 / (1 + math.exp(phi))
        assert -shared.grad.item() == pytest.approx(want, abs=1e-12)


def test_the_loss_holds_the_policy_while_f_is_positive():
    """Section 10: with α r̂ > -1 the loss of some pair grows without bound when a token dies; below -1 it need not."""
    ref = f64([0.5, 0.3, 0.2]).log()
    for bad, grows in ((-0.9, True), (-1.1, False)):
        rhat, p = f64([bad, 0.2, 0.4]), (ref - f64([1000.0, 0.0, 0.0])).log_softmax(-1)
        pairs = [[x[i][None, None] for x in (p, ref, rhat) for i in y] for y in itertools.permutations(range(3), 2)]
        assert (max(tgdpo_loss(*pair, 1.0, 1.0)[0] for pair in pairs) > 50) == grows


def mean_force(weights, ref, rhat, beta, alpha, tree):
    """The mean of -∂L/∂log π(a|s) at π_ref over pairs, (S, A): pair by pair, each differentiated by itself."""
    total, (states, actions) = torch.zeros_like(ref), tree
    for i, j in itertools.product(range(len(states)), repeat=2):
        table = ref.clone().requires_grad_()
        y, z = [(states[k][states[k] >= 0], actions[k][states[k] >= 0]) for k in (i, j)]
        pairs = [x[at][None] for x in (table, ref, rhat) for at in (y, z)]
        total -= weights[i, j] * torch.autograd.grad(tgdpo_loss(*pairs, beta, alpha)[0].sum(), table)[0]
    return total


@pytest.mark.parametrize("end", [None, 0])
@pytest.mark.parametrize("beta", [0.2, 3.0])
def test_the_natural_scale_of_alpha(beta, end):
    """(8f), (8g): the formula is exact for any pairs and r̂, also where responses end early. For small rewards and the
    exact DPO model's r̂ the force on every logit is 1 + 2 α times DPO's: at α = 1/2 r̂ weighs as much as the labels."""
    tree = Tree(8, steps=2, actions=3, end=end)
    ref, reward = tree.table(tree.ref, log=True), 0.001 * tree.table(tree.reward)
    draws = torch.Generator().manual_seed(0)
    weights = torch.rand(len(tree.responses), len(tree.responses), generator=draws, dtype=torch.float64)
    weights /= weights.sum()
    rhat = tree.table(tree.reward)  # any numbers will do here
    force = mean_force(weights, ref, rhat, beta, 0.7, tree.tree)
    close(sum(figures.expected_force(weights, rhat, beta, 0.7, tree.tree)), force)
    weights, mu = figures.independent_pairs(ref, tree.table(tree.reward), tree.tree), torch.zeros_like(ref)
    both = [*zip(tree.responses, [tree.probability(tree.ref, y) for y in tree.responses], tree.R)]
    for (y, p, R), (_, q, S) in itertools.product(both, both):  # μ = 2 E[ n(y) tanh((R - R') / 2) ]
        for t in range(len(y)):
            mu[tree.prefixes.index(y[:t]), y[t]] += 2 * p * q * math.tanh((R - S) / 2)
    close(figures.expected_force(weights, rhat, beta, 0.0, tree.tree)[0], beta / 2 * mu)
    weights.fill_diagonal_(0)
    close(weights / weights.sum(), tree.labelled())
    weights = figures.independent_pairs(ref, reward, tree.tree)
    close(weights.sum(), 1.0)
    rhat = token_rewards(explain.soft_optimum(ref, reward, beta)[0], ref, beta)
    forces = {}
    for alpha in (0.0, 0.5, 2.0):
        on_log = mean_force(weights, ref, rhat, beta, alpha, tree.tree)
        forces[alpha] = (on_log - ref.exp() * on_log.sum(-1, keepdim=True))[tree.rows]  # on the logits
        limit = figures.calibrated_force(ref, reward, beta, alpha, tree.tree)[tree.rows]
        assert (forces[alpha] - limit).abs().max() < 0.01 * limit.abs().max()
        assert (forces[alpha] - (1 + 2 * alpha) * forces[0.0]).abs().max() < 0.01 * limit.abs().max()
    labels, push = forces[0.0], forces[0.5] - forces[0.0]
    assert (push.abs().sum() / labels.abs().sum()).item() == pytest.approx(1, abs=0.01)
    # Labels saturate, rewards do not: at the size of the quoted language's R, r̂ weighs about twice as much.
    small, quoted, large = [figures.scale(size, beta)[0] for size in (0.001, 1.0, 3.0)]
    assert small == pytest.approx(1, abs=0.01) and 1.5 < quoted < 2.5 and large > quoted + 0.5


class Collapse:
    """The quoted language with the exact DPO model's r̂, and the line of section 10: the policies that let responses
    outside T lose K nats at its first token with r̂ < 0, on top of π*."""

    def __init__(self, seed=1):
        self.w = w = explain.world(seed)
        self.rhat = token_rewards(w.exact, w.ref, w.beta)
        self.bad = torch.zeros_like(w.ref)
        first = (along(self.rhat, w.tree) < 0).int()
        first = (first.cumsum(-1) == 1) & (first == 1)  # (Y, T)
        self.bad[w.tree[0][first], w.tree[1][first]] = 1.0
        self.inside = ~first.any(-1)  # the responses of T, (Y,)
        self.at_first = (along(self.rhat, w.tree) * first).sum(-1)  # r̂ where a response leaves T, (Y,)

    def losses(self, log_policy, alpha, loss=tgdpo_loss):
        tables = [side for x in (log_policy, self.w.ref, self.rhat) for side in explain.all_pairs(x, self.w.tree)]
        return loss(*tables, self.w.beta, alpha)[0]

    def mean(self, log_policy, alpha, loss=tgdpo_loss):
        return (self.w.weights * self.losses(log_policy, alpha, loss)).sum()

    def line(self, K):
        return (self.w.exact - K * self.bad).log_softmax(-1)

    def slope(self, K, alpha, loss):
        """How the mean loss changes with K; for T-REG, whose weight is detached, its gradient along the line."""
        K = f64(K).requires_grad_()
        return torch.autograd.grad(self.mean(self.line(K), alpha, loss), K)[0].item()


def test_the_collapse_onto_the_good_responses():
    """Section 10: T, its price, the two losses on the line, and a lower one elsewhere. All computed at given policies;
    nothing is searched for."""
    c = Collapse()
    w, out = c.w, ~c.inside
    assert c.inside.sum() == 1 and f"{w.p_ref[c.inside].item():.3f}"[1:] == ".035"
    loses = w.weights[out][:, c.inside].sum().item()  # how often a response of T meets one from outside, and loses
    assert f"{loses:.4f}"[1:] == ".0044"
    start, moved = [c.mean(c.line(K), 0.01).item() for K in (0.0, 32.0)]
    assert (f"{start:.4f}"[1:], f"{moved:.4f}"[1:]) == (".4075", ".3749")
    assert 0.01 * c.rhat.abs().max() < 0.025
    for number in ("probability .035", "is .0044 a nat", "from .4075 to .3749", "32 nats", "below .025", "has .2954"):
        assert number in " ".join(TEXT.split()), number
    # Far out: a pair from outside loses nothing in either order, where T loses the price is the one that is said.
    near, far = [c.losses(c.line(K), 0.01) for K in (20000.0, 30000.0)]
    assert far[out][:, out].fill_diagonal_(0).max() < 1e-9
    close((far - near)[out][:, c.inside] / 10000, 1 + 0.01 * c.at_first[out][:, None])
    assert ((far - near)[out][:, c.inside] <= 10000.0).all() and far[c.inside][:, out].max() < 1e-9
    # Another response, with all weight but what e^-200 leaves: lower than the search's .3633.
    y = (w.p_ref.log() + 7.17).abs().argmin()
    keep = torch.zeros_like(w.ref)
    keep[w.tree[0][y]] = 1.0
    keep[w.tree[0][y], w.tree[1][y]] = 0.0
    alone = (w.exact - 200 * keep).log_softmax(-1)
    assert f"{c.mean(alone, 0.01).item():.4f}" == "0.2954"  # explain.py's 0.3633 is compared with the text below
    assert f"{explain.divergence(alone, w.ref, w.tree):.2f}" == "7.17" and "a KL of 7.17" in TEXT
    for seed in range(5):  # T is never empty: some token of every state has r̂ >= 0
        assert (Collapse(seed).rhat.amax(-1) >= 0).all() and Collapse(seed).inside.any()


def test_treg_runs_off_where_tgdpo_turns_back():
    """Section 9: on the line of section 10 T-REG's slope, (9a), does not depend on K; from α = .01 on it leads outwards
    for ever, at .003 back. TGDPO's leads back at all of these, once K is large."""
    c = Collapse()
    for alpha, outwards in ((0.003, False), (0.01, True), (0.03, True), (0.1, True)):
        near, far = [c.slope(K, alpha, treg_loss) for K in (100.0, 1000.0)]
        assert far == pytest.approx(near, rel=1e-6)
        assert (far < -1e-3) if outwards else (far > 1e-3)
        assert c.slope(1000.0, alpha, tgdpo_loss) > 1e-3


@pytest.mark.parametrize("ratio", [0.5, 1.0, 5.0])
def test_rto(tree, ratio):
    """(11a), (11b): the optimum by enumeration; the DPO model itself for β1 = β2; π_dpo^5 / π_ref^4 for the official 5;
    also with all reward at the end, but not with each token's clipped."""
    ref, dpo = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    beta2 = 0.6
    best, _, _ = explain.soft_optimum(ref, implicit_reward(dpo, ref, ratio * beta2), beta2)
    weights = [
        tree.probability(tree.ref, y) ** (1 - ratio) * tree.probability(tree.other, y) ** ratio for y in tree.responses
    ]
    close(explain.probability(best, tree.tree), Tree.normal(weights))
    rows = tree.rows
    assert ((best - dpo)[rows].abs().max() < 1e-9) == (ratio == 1.0)
    end = torch.zeros_like(ref)
    for i, y in enumerate(tree.responses):
        whole = math.log(tree.probability(tree.other, y) / tree.probability(tree.ref, y))
        end[tree.prefixes.index(y[:-1]), y[-1]] = ratio * beta2 * whole
    close(explain.soft_optimum(ref, end, beta2)[0][rows], best[rows])
    clipped = implicit_reward(dpo, ref, ratio * beta2).clamp(-0.05, 0.05)
    assert (explain.soft_optimum(ref, clipped, beta2)[0] - best)[rows].abs().max() > 0.1


# ------------------------------------------------------------------------------------------- text, code and tests agree
TAG = re.compile(r"\((\d+(?:\.\d+)?[a-z]?)\)")


def tags_in_code():
    """{tag: {file: its functions that compute it}}; tags begin lines of a comment, or parts of it behind a semicolon,
    with a formula two spaces further; the line that computes them comes next."""
    found = {}
    for file in [ROOT / "tgdpo.py", *(ROOT / "scripts").glob("*.py")]:
        lines, function = file.read_text().splitlines(), None
        for i, line in enumerate(lines):
            if match := re.match(r"(?:def|class) (\w+)", line):
                function = match[1]
            if not re.match(r"\s*# " + TAG.pattern + "  ", line):
                continue
            below = next(text.strip() for text in lines[i:] if not text.strip().startswith("#"))
            assert below, f"{file.name}: no code below {line.strip()}"
            for tag in re.findall(r"(?:# |;  )" + TAG.pattern + "  ", line):
                found.setdefault(tag, {}).setdefault(file.name, set()).add(function)
    return found


def test_every_tag_stands_in_text_code_and_tests():
    """Tags stand in order. Each stands above code and in a test's docstring, and section 12 names its functions. No
    file mentions one that does not exist."""
    displayed = re.findall(r"\\tag\{(.*?)\}", TEXT)
    papers = [tag for tag in displayed if "." in tag]
    assert papers == ["4.1", "4.3a", "4.3b", "4.3c", "4.4a", "4.4b"]
    for number, section in re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", TEXT, re.M | re.S):
        own = [tag for tag in re.findall(r"\\tag\{(.*?)\}", section) if "." not in tag]
        assert own == [f"{number}{letter}" for letter in "abcdefghij"[: len(own)]], "(Na), (Nb), ... in section N"
    code = tags_in_code()
    assert len(displayed) == len(set(displayed)) and set(displayed) == set(code)
    for name in ["derivation.md", "tgdpo.py", "README.md", "scripts/explain.py", "scripts/figures.py"]:
        mentioned = {tag for tag in TAG.findall((ROOT / name).read_text(encoding="utf-8")) if re.search("[a-z]", tag)}
        assert mentioned <= set(displayed), name
    docstrings = [
        body
        for file in (ROOT / "tests").glob("test_*.py")
        for body in re.findall(r'def test_\w+\([^)]*\):\n +"""(.*?)"""', file.read_text(encoding="utf-8"), re.S)
    ]
    untested = set(displayed) - {tag for body in docstrings for tag in TAG.findall(body)}
    assert not untested, f"in no test's docstring: {untested}"
    listed = {}  # {tag: {file: its functions}}
    section_12 = TEXT.split("\n## 12.")[1]
    for file, entries in re.findall(r"`(tgdpo\.py|scripts/\w+\.py)`: (.*?)(?=; `|\n- |\Z)", section_12, re.S):
        for tags, function in re.findall(r"((?:\(\S+\)\s+)+)`(\w+)`", entries):
            for tag in TAG.findall(tags):
                listed.setdefault(tag, {}).setdefault(file.rpartition("/")[2], set()).add(function)
    assert {*listed} == {*displayed}, {*listed} ^ {*displayed}
    for tag, files in listed.items():
        for file, functions in files.items():
            got = code[tag].get(file, set())
            assert functions == got if file == "tgdpo.py" else functions <= got, f"({tag}) in {file}: {got}"


NUMBER = re.compile(r"[-+]?\d*\.\d+")


def same_line(got, want):
    """Words must be the same; numbers may differ in their last digit, as they do between processors."""
    if NUMBER.sub("#", got).split() != NUMBER.sub("#", want).split():
        return False
    pairs = zip(NUMBER.findall(got), NUMBER.findall(want))
    return all(abs(float(a) - float(b)) <= 2.1 * 10 ** -len(b.split(".")[1]) for a, b in pairs)


def test_the_scripts_print_what_the_derivation_quotes(capsys):
    """Every line of a grey block is one that explain.py prints, or figures.py; they stand in its order."""
    command = [sys.executable, ROOT / "scripts" / "explain.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures.print_scale()
    printed, of_figures = printed.splitlines(), capsys.readouterr().out.splitlines()
    quoted = "".join(re.findall(r"^```text\n(.*?)^```$", TEXT, re.M | re.S)).splitlines()
    assert len(quoted) >= 10 and any(line.startswith("(8f)") for line in quoted)
    rest = iter(printed)
    for want in quoted:
        lines = of_figures if want.startswith("(8f)") else rest
        assert any(same_line(got, want) for got in lines), f"not printed, or not there: {want}"


def test_another_language_can_be_asked_for(capsys):
    """Every section runs on any seed, and what is proved holds there: Theorem 4.1, and the identities' two sides."""
    explain.main(["--seed", "7"])
    output = capsys.readouterr().out
    left, right = re.search(r"Theorem 4.1: ([\d.]+) <= ([\d.]+)", output).groups()
    assert float(left) <= float(right)
    for tag in ("4a", "10a"):
        sides = re.search(rf"^\({tag}\).*: (-?[\d.]+) = (-?[\d.]+)$", output, re.M).groups()
        assert float(sides[0]) == pytest.approx(float(sides[1]), abs=2e-4)
    assert len(re.findall(r"^\d+ ", output, re.M)) == 11
    # what theory says is 0 looks different from what happens to be
    assert len(re.findall(r"<(1e-09|0\.001)\b", output)) >= 20


def test_a_zero_that_is_none_is_shown():
    assert explain.zero(1e-12) == "<1e-09" and explain.zero(2e-4) == "0.0002" and explain.zero(0.5) == "0.5000"
    assert explain.found_zero(2e-4) == "<0.001" and explain.found_zero(torch.tensor(0.0013)) == "0.0013"


def test_the_figures_are_what_the_script_draws(tmp_path):
    """Their numbers against the values by hand; the files against a fresh drawing, up to a few points; all are linked.
    Of curves only nats.svg has any."""
    pytest.importorskip("matplotlib")
    figures.draw(tmp_path)
    texts = {}
    for name in ("tree", "forces", "nats"):
        folders = (tmp_path, ROOT / "scripts" / "figures")
        files = [(folder / f"{name}.svg").read_text(encoding="utf-8") for folder in folders]
        words = [re.findall(r"<text[^>]*>(.*?)</text>", file) for file in files]
        curves = [[d.split() for d in re.findall(r' d="(.*?)"', file, re.S) if d.count("L") > 20] for file in files]
        points = [[float(x) for curve in found for x in curve if x not in "MLz"] for found in curves]
        assert words[0] == words[1] and points[0] == pytest.approx(points[1], abs=5), "run scripts/figures.py"
        assert len(curves[1]) == 3 * (name == "nats")
        assert f"](scripts/figures/{name}.svg)" in TEXT and len(files[1]) < 16000
        texts[name] = " ".join(re.sub("<.*?>", " ", word) for word in words[1]).replace("\N{MINUS SIGN}", "-")
    for value in ("V = 0.62", "V = 1.00", "V = 0.00", "log Z = 1.00", "myopic 0.50", "exact 0.73", "exact 0.27"):
        assert value in texts["tree"]
    at_rest = {("chosen", 1): [0.5, 0.65, 1.25], ("chosen", -1): [0.5, 0.35, -0.25]}
    at_rest |= {("rejected", 1): [-0.5, -0.35, 0.25], ("rejected", -1): [-0.5, -0.65, -1.25]}
    for key, want in at_rest.items():  # ± (1 ± α r̂) / 2 with α 1/2 and |r̂| 0, .6, 3, as (8d) has it
        assert figures.forces()[key] == pytest.approx(want)
        assert " ".join(f"{x:+.2f}" for x in want) in " ".join(re.findall(r"[-+]\d\.\d\d", texts["forces"]))
    lost, losses = figures.nats()
    assert losses[0.0] == pytest.approx([0.5623] * len(lost), abs=1e-4)  # the entropy of labels that are right 3 in 4
    assert [losses[0.1][lost.index(n)] for n in (0, 10, 100)] == pytest.approx([0.5391, 0.4592, 0.0828], abs=1e-4)
    for alpha in (0.1, 0.5):
        assert all(a > b for a, b in itertools.pairwise(losses[alpha])) and f"α = {alpha}" in texts["nats"]


def breaks(formula):
    """Why GitHub would not show a formula between plain dollars: Markdown reads it first."""
    if re.search(r"[*<>]|\\[^a-zA-Z]|\]\(", formula):
        return "Markdown takes *, <, the backslash of \\, and the link [..](..)"
    if re.search(r"(?<![A-Za-z0-9])_", formula):  # such an underscore can open emphasis, and the next one close it
        return "an underscore behind punctuation"


def test_the_mathematics_renders_on_github():
    """GitHub's MathJax refuses macros that define or reach outside. Markdown reads what stands between plain dollars,
    not what stands between $` and `$. A formula must touch no letter or hyphen, and stand in no bold or italic text."""
    displays = re.findall(r"^```math\n(.*?)^```$", TEXT, re.M | re.S)
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
    for formula, why in ((r"\mathbb{E}_{a}[x]", 1), ("a*b", 1), (r"a\,b", 1), ("[a](b)", 1), (r"\pi_\theta", 0)):
        assert bool(breaks(formula)) == bool(why), formula
    quoted = re.findall(r"(?<!\S)\(?\$`([^`\n]+)`\$(?![\w-])", prose)
    assert len(quoted) == prose.count("$`") == prose.count("`$")
    rest = re.sub(r"\$`[^`\n]+`\$", "FORMULA", prose)
    plain = re.findall(r"(?:(?<=\s)|(?<=\())\$([^$\n]+)\$(?![\w$-])", rest)
    assert rest.count("$") == 2 * len(plain), "an inline formula is not closed, or touches a letter"
    for formula in plain:
        assert not breaks(formula), f"{formula}: {breaks(formula)}; write $`...`$"
    emphasised = re.findall(r"(?<![*\w])(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?![*\w])", re.sub(r"`[^`\n]*`", "", rest))
    assert emphasised and not [text for _, text in emphasised if "$" in text or "FORMULA" in text]
    for formula in displays + plain + quoted:
        assert not re.search(r"\\(operatorname|(re)?newcommand|def|require|href|label|(eq)?ref|include)\b", formula)
        assert formula.count("{") == formula.count("}") and formula.count(r"\left") == formula.count(r"\right"), formula
    for display in displays:
        assert display.count(r"\tag{") == 1 and "\n\n" not in display
    lines = TEXT.splitlines()
    assert len(lines) <= 420 and not [x for x in lines if len(x) > 120 and "](https://" not in x]  # addresses are long
