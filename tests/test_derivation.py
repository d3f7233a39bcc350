"""derivation.md, equation by equation, against plain Python over enumerated sequences, autograd and optimisation.

Nothing that is expected here comes from the functions under test: trees are dictionaries from a prefix to lists,
and every expectation is a sum over all sequences.
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
from tgdpo import closed_form_policy, implicit_reward, tgdpo_loss, token_ppo_objective

ROOT = Path(tgdpo.__file__).parent
sys.path.insert(0, str(ROOT / "scripts"))
import explain
from explain import f64
from treg import treg_loss

TEXT = (ROOT / "derivation.md").read_text()


# ------------------------------------------------------------------------------------------ plain Python, no tensors
class Tree:
    """A random language: `ref`, `reward` and `f` map a prefix (a tuple of tokens) to one number for each next token."""

    def __init__(self, seed, steps=3, actions=3):
        rng = random.Random(seed)
        self.steps, self.actions, self.beta = steps, actions, rng.choice([0.4, 1.0, 2.0])
        self.prefixes = [p for t in range(steps) for p in itertools.product(range(actions), repeat=t)]
        self.responses = list(itertools.product(range(actions), repeat=steps))
        self.ref = {p: self.normal([math.exp(rng.gauss(0, 1)) for _ in range(actions)]) for p in self.prefixes}
        self.reward = {p: [rng.gauss(0, 1) for _ in range(actions)] for p in self.prefixes}
        self.f = {p: [rng.uniform(0.3, 2) for _ in range(actions)] for p in self.prefixes}
        self.other = {p: self.normal([math.exp(rng.gauss(0, 1)) for _ in range(actions)]) for p in self.prefixes}
        # the same for explain.py, whose states stand in the order of a heap: shorter prefixes first
        self.tree = explain.sequences(steps, actions)
        self.R = [self.total(self.reward, y) for y in self.responses]

    @staticmethod
    def normal(weights):
        return [w / sum(weights) for w in weights]

    def total(self, table, y):
        return sum(table[y[:t]][y[t]] for t in range(self.steps))

    def probability(self, policy, y):
        return math.prod(policy[y[:t]][y[t]] for t in range(self.steps))

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
        f = f or [1.0] * self.actions
        rows = zip(self.ref[prefix], self.reward[prefix], f)
        return sum(q * math.exp(r / (self.beta * g)) for q, r, g in rows)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def optimise(loss, start):
    """Minimise over logits from a start -> log-probs; its own L-BFGS, not explain.py's."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=3000, max_eval=6000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach().log_softmax(-1)


@pytest.fixture(params=[0, 1, 2])
def tree(request):
    return Tree(request.param)


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


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(tables())
def test_gibbs_and_the_closed_form_on_any_table(given_tables):
    """(1c), (6a), (4.3a), (4.3b): by sums over the actions, in Python; the closed form is best, and by the KL to it."""
    ref, reward, f, other, beta = given_tables
    policy, log_Z = closed_form_policy(ref, reward, beta, f)
    value = token_ppo_objective(other, ref, reward, beta, f)
    best = token_ppo_objective(policy, ref, reward, beta, f)
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


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(tables())
def test_reward_of_a_policy(given_tables):
    """(4.3c): the closed form's reward is the reward, whatever f; by hand for any other policy."""
    ref, reward, f, other, beta = given_tables
    policy, log_Z = closed_form_policy(ref, reward, beta, f)
    back = implicit_reward(policy, ref, beta, f, log_Z[:, None])
    torch.testing.assert_close(back, reward, rtol=1e-7, atol=1e-7)
    got = implicit_reward(other, ref, beta, f, log_Z[:, None])
    for s, a in itertools.product(*map(range, ref.shape)):
        want = beta * f[s, a].item() * (other[s, a].item() - ref[s, a].item() + log_Z[s].item())
        assert got[s, a].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_ascent_from_random_starts_ends_at_the_closed_form(seed):
    """(6a), (4.3a): no gradient there, and L-BFGS from a random start ends there."""
    torch.manual_seed(seed)
    ref, reward = torch.randn(3, 4).double().log_softmax(-1), torch.randn(3, 4).double()
    f, beta = 0.3 + torch.rand(3, 4).double(), 0.7
    policy, _ = closed_form_policy(ref, reward, beta, f)
    at = policy.clone().requires_grad_()
    token_ppo_objective(at.log_softmax(-1), ref, reward, beta, f).sum().backward()
    assert at.grad.abs().max() < 1e-12

    def independent(p):
        return (p.exp() * ((p - ref) * beta * f - reward) / (beta * f)).sum()

    close(optimise(independent, torch.randn(3, 4).double()).exp(), policy.exp(), 1e-6)
    # (6b) is the optimum of the other problem, and another policy
    other = explain.kl_weighted_policy(ref, reward, beta, f)
    found = optimise(lambda p: (p.exp() * (beta * f * (p - ref) - reward)).sum(), torch.randn(3, 4).double())
    close(other.exp(), found.exp(), 1e-6)
    assert (other.exp() - policy.exp()).abs().max() > 0.01


def test_the_problem_with_f_on_the_kl():
    """(6b): the same policy as (4.3a) where f is the same for all actions, also in shift of the reward; else not."""
    ref, reward = f64([[0.5, 0.3, 0.2]]).log(), f64([[1.0, -0.5, 0.2]])
    f = f64([[0.4, 1.3, 0.9]])
    close(explain.kl_weighted_policy(ref, reward, 0.5, 0.0 * f + 0.7), closed_form_policy(ref, reward, 0.5, 0.7)[0])
    log_policy = explain.kl_weighted_policy(ref, reward, 0.5, f)
    multiplier = reward - 0.5 * f * (log_policy - ref + 1)  # the first-order condition: one λ for all actions
    assert (multiplier.max() - multiplier.min()).item() < 1e-10
    close(log_policy.exp().sum(), 1.0)
    close(explain.kl_weighted_policy(ref, reward + 3, 0.5, f), log_policy)


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
def test_sequence_level_ppo(tree):
    """(1b), (2a), (3a): J by enumeration; its optimum weighs responses by π_ref exp(R / β), and its reward is R."""
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    other = tree.table(tree.other, log=True)
    close(explain.objective(other, ref, reward, tree.beta, tree.tree), tree.J(tree.other))
    exact, V, _ = explain.soft_optimum(ref, reward, tree.beta)
    p_ref = [tree.probability(tree.ref, y) for y in tree.responses]
    Z = sum(p * math.exp(R / tree.beta) for p, R in zip(p_ref, tree.R))
    close(V[0], tree.beta * math.log(Z))
    close(tree.J(tree.back(exact)), tree.beta * math.log(Z))
    want = [p * math.exp(R / tree.beta) / Z for p, R in zip(p_ref, tree.R)]
    close(explain.probability(exact, tree.tree), want)
    policy, log_Z = closed_form_policy(f64(p_ref).log(), f64(tree.R), tree.beta)
    close(policy.exp(), want)
    sums = implicit_reward(f64(want).log(), f64(p_ref).log(), tree.beta, 1.0, log_Z)
    close(sums, tree.R)
    found = ref
    for _ in range(3):  # J is flat where the policy seldom goes: L-BFGS stops there, and goes on when it starts anew
        found = optimise(lambda p: -explain.objective(p, ref, reward, tree.beta, tree.tree), found)
    assert tree.J(tree.back(found)) == pytest.approx(tree.beta * math.log(Z), abs=1e-6)


def test_soft_value_iteration(tree):
    """(5a), (5b), (5c): conditionals of the enumerated optimum; shaped by V, Z is 1 and the myopic policy is exact."""
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    exact, V, ahead = explain.soft_optimum(ref, reward, tree.beta)
    for i, prefix in enumerate(tree.prefixes):
        assert exact[i].exp().tolist() == pytest.approx(tree.best(prefix), abs=1e-10)
        rest = sum(
            math.prod(tree.ref[y[:t]][y[t]] for t in range(len(prefix), tree.steps))
            * math.exp(sum(tree.reward[y[:t]][y[t]] for t in range(len(prefix), tree.steps)) / tree.beta)
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


def test_theorem_41(tree):
    """(4.1), (4a), (4b): each term's maximum by walking every prefix, and by ascent, is the right side's."""
    ref, reward, beta = tree.table(tree.ref, log=True), tree.table(tree.reward), tree.beta
    best, right, fixed = [x.item() for x in explain.bounds(ref, reward, beta, tree.tree)]
    log_Z = {p: math.log(tree.Z(p)) for p in tree.prefixes}
    depths = [[p for p in tree.prefixes if len(p) == t] for t in range(tree.steps)]
    assert right == pytest.approx(sum(max(beta * log_Z[p] for p in depth) for depth in depths), abs=1e-10)
    reach = {p: math.prod(tree.ref[p[:t]][p[t]] for t in range(len(p))) for p in tree.prefixes}
    assert fixed == pytest.approx(sum(reach[p] * beta * log_Z[p] for p in tree.prefixes), abs=1e-10)
    assert best <= right + 1e-12
    assert best == pytest.approx(max(tree.J(tree.back(explain.soft_optimum(ref, reward, beta)[0])), tree.J(tree.other)))
    for t in range(tree.steps):  # term t alone, as a function of the whole policy

        def term(p, t=t):
            tokens = explain.along(p, tree.tree)
            gain = explain.along(reward - beta * (p - ref), tree.tree)[:, t]
            return -(tokens.sum(-1).exp() * gain).sum()

        found = -term(optimise(term, ref)).item()
        assert found <= max(beta * log_Z[p] for p in depths[t]) + 1e-9
    # (4a) for a policy that is optimal in no sense
    identity = 0.0
    for p in tree.prefixes:
        myopic = [q * math.exp(r / beta) / tree.Z(p) for q, r in zip(tree.ref[p], tree.reward[p])]
        kl = sum(a * math.log(a / b) for a, b in zip(tree.other[p], myopic))
        identity += math.prod(tree.other[p[:t]][p[t]] for t in range(len(p))) * beta * (log_Z[p] - kl)
    assert identity == pytest.approx(tree.J(tree.other), abs=1e-10)


def test_what_is_lost_when_the_state_distribution_is_fixed():
    """(4b), by hand: log(.001 e^10 + .999) = 3.137; a term of 10 in (4.1); .001 * 10 = .01 with D fixed."""
    ref = f64([[0.001, 0.999], [0.5, 0.5], [0.5, 0.5]]).log()
    reward = f64([[0.0, 0.0], [10.0, 10.0], [0.0, 0.0]])
    got = explain.bounds(ref, reward, 1.0, explain.sequences(2, 2))
    assert [x.item() for x in got] == pytest.approx([math.log(0.001 * math.exp(10) + 0.999), 10.0, 0.01], abs=1e-6)


# --------------------------------------------------------------------------------------- what the minimisers are
def plain_loss(tree, log_policy, f_w, f_l, log_Z=None):
    """E[-log σ(φ + δ)] over all labelled pairs, with nothing of tgdpo.py: one loop over the two responses."""
    ratios = log_policy - tree.table(tree.ref, log=True) + (0 if log_Z is None else log_Z[:, None])
    index = {p: i for i, p in enumerate(tree.prefixes)}

    def total(f, y):
        return sum(tree.beta * f[y[:t]][y[t]] * ratios[index[y[:t]], y[t]] for t in range(tree.steps))

    won, lost = [[total(f, y) for y in tree.responses] for f in (f_w, f_l)]
    loss, weights = 0.0, 0.0
    for i, j in itertools.permutations(range(len(tree.responses)), 2):
        weight = tree.probability(tree.ref, tree.responses[i]) * tree.probability(tree.ref, tree.responses[j])
        weight /= 1 + math.exp(tree.R[j] - tree.R[i])
        loss, weights = loss - weight * torch.nn.functional.logsigmoid(won[i] - lost[j]), weights + weight
    return loss / weights


def test_pair_losses_are_the_plain_sum():
    """(3b), (3c), (4.4a), (4.4b), (8b), (8c): tgdpo_loss over all pairs equals loops in Python, with δ and without."""
    tree = Tree(5, steps=2, actions=2)
    ref, log_policy = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    rhat, R = tree.table(tree.reward), f64(tree.R)
    weights = explain.pair_weights(explain.probability(ref, tree.tree), R)
    for alpha in (0.0, 0.4):
        f_w, f_l = [{p: [1 + sign * alpha * r for r in row] for p, row in tree.reward.items()} for sign in (+1, -1)]
        got = (weights * explain.pair_losses(log_policy, ref, rhat, tree.beta, alpha, tree.tree)).sum()
        close(got, plain_loss(tree, log_policy, f_w, f_l))
        log_Z = f64([math.log(tree.Z(p)) for p in tree.prefixes])
        shifted = explain.pair_losses(log_policy + log_Z[:, None], ref, rhat, tree.beta, alpha, tree.tree)
        close((weights * shifted).sum(), plain_loss(tree, log_policy, f_w, f_l, log_Z))


@pytest.mark.parametrize("guided", [False, True])
def test_minimisers_with_and_without_delta(guided):
    """(3c), (7a), (7c): from a random start, with δ the myopic policy; without it the exact one (f = 1) or (7c)."""
    tree = Tree(3, steps=2, actions=3)
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    ones = {p: [1.0] * tree.actions for p in tree.prefixes}
    f = tree.f if guided else ones
    log_Z = f64([math.log(tree.Z(p, f[p])) for p in tree.prefixes])
    start = torch.randn(ref.shape, generator=torch.Generator().manual_seed(0)).double()
    kept = optimise(lambda p: plain_loss(tree, p, f, f, log_Z), start).exp()
    dropped = optimise(lambda p: plain_loss(tree, p, f, f), start).exp()
    myopic = [
        Tree.normal([q * math.exp(r / (tree.beta * g)) for q, r, g in zip(tree.ref[p], tree.reward[p], f[p])])
        for p in tree.prefixes
    ]
    close(kept, myopic, 1e-5)
    close(kept, closed_form_policy(ref, reward, tree.beta, tree.table(f))[0].exp(), 1e-5)
    consistent = explain.consistent_policy(ref, reward, tree.beta, tree.table(f))
    close(dropped, consistent.exp(), 1e-5)
    ratios = tree.table(f) * (consistent - ref) * tree.beta
    sums = explain.along(ratios, tree.tree).sum(-1) - f64(tree.R)
    assert (sums.max() - sums.min()).item() < 1e-9, "(7c): β f l must add up to R and a constant"
    exact = f64([tree.best(p) for p in tree.prefixes])
    assert ((dropped - exact).abs().max() < 1e-5) == (not guided)
    assert (kept - exact).abs().max() > 0.01


def test_theorem_44_is_about_one_pair():
    """(7b): minimum of -log σ(θ + 1) - log σ(-θ) at -1/2, of the sum without δ at 0, by search."""

    def found(delta):
        grid = [i / 1000 for i in range(-2000, 2001)]
        return min(grid, key=lambda x: math.log1p(math.exp(-x - delta[0])) + math.log1p(math.exp(x - delta[1])))

    assert found((1, 0)) == -0.5
    assert found((0, 0)) == 0.0
    assert found((0.2, 1.0)) == pytest.approx(0.4)


# ------------------------------------------------------------------------------ the practical f and its neighbours
def random_pair(seed):
    """Log-ratios with a gradient through a small softmax, r̂, and the parameters."""
    torch.manual_seed(seed)
    logits = torch.randn(6, 4).double().requires_grad_()
    ref, rhat = torch.randn(6, 4).double().log_softmax(-1), torch.randn(6, 4).double()
    states, actions = torch.randint(6, (2, 1, 5)), torch.randint(4, (2, 1, 5))
    tables = [logits.log_softmax(-1), ref, rhat]
    return logits, [[table[states[i], actions[i]] for i in (0, 1)] for table in tables]


@pytest.mark.parametrize("seed", range(5))
def test_treg_and_tgdpo_are_one_gradient(seed):
    """(9a), (9b), (9c), (8e): by formulas written out, for one pair and a random small policy."""
    beta, alpha = 0.7, 0.4
    logits, (policy, ref, rhat) = random_pair(seed)
    l_w, l_l = [p - q for p, q in zip(policy, ref)]
    d = beta * (l_w.sum() - l_l.sum())
    added = alpha * beta * ((rhat[0] * l_w).sum() + (rhat[1] * l_l).sum())
    tgdpo_ = tgdpo_loss(*policy, *ref, *rhat, beta, alpha)[0].sum()
    close(tgdpo_.detach(), math.log1p(math.exp(-(d + added).item())))  # (9b)
    w = 1 / (1 + math.exp(d.item()))
    treg = -torch.nn.functional.logsigmoid(d) - alpha * w * beta * (
        (rhat[0] * policy[0]).sum() + (rhat[1] * policy[1]).sum()
    )
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
    rhat = implicit_reward(rm, ref, tree.beta)
    for i, p in enumerate(tree.prefixes):
        kl = sum(q * math.log(q / m) for q, m in zip(tree.ref[p], tree.other[p]))
        assert (ref[i].exp() * rhat[i]).sum().item() == pytest.approx(-tree.beta * kl)
        want = [tree.beta * (math.log(m) - math.log(q)) for q, m in zip(tree.ref[p], tree.other[p])]
        assert rhat[i].tolist() == pytest.approx(want)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
def test_a_token_that_was_never_sampled(alpha):
    """(10b): the force on its logit, and no minimiser for any alpha > 0 if both sampled r̂ are negative."""
    ref, beta = f64([0.4, 0.4, 0.2]).log(), 0.8
    rhat = f64([-0.2, -0.5, 0.0])
    logits = f64([0.3, -0.4, 0.1]).requires_grad_()

    def loss(p):
        def pair(w, loser):
            return tgdpo_loss(*[x[i][None, None] for x in (p, ref, rhat) for i in (w, loser)], beta=beta, alpha=alpha)[
                0
            ].sum()

        return pair(0, 1), pair(1, 0)

    p = logits.log_softmax(-1)
    ell = (p - ref).detach()
    phi = beta * ((1 + alpha * rhat[0]) * ell[0] - (1 - alpha * rhat[1]) * ell[1])
    loss(p)[0].backward()
    want = -alpha * beta * torch.sigmoid(-phi) * (rhat[0] + rhat[1]) * p[2].exp()
    close(-logits.grad[2], want.detach())
    lost = [sum(loss(p.detach() - n * f64([1.0, 1.0, 0.0]))).item() for n in (0, 10, 1000)]
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
        rhat, worst = f64([bad, 0.2, 0.4]), []
        for nats in (10, 100, 1000):
            p = (ref - f64([nats, 0.0, 0.0])).log_softmax(-1)
            pairs = itertools.permutations(range(3), 2)
            worst.append(
                max(
                    tgdpo_loss(*[x[i][None, None] for x in (p, ref, rhat) for i in pair], 1.0, 1.0)[0] for pair in pairs
                )
            )
        assert (worst[2] > 50) == grows


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_rto(tree, ratio):
    """(11a), (11b): the optimum by enumeration; the DPO model itself for β1 = β2; also with all reward at the end."""
    ref, dpo = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    beta2 = 0.6
    best, _, _ = explain.soft_optimum(ref, implicit_reward(dpo, ref, ratio * beta2), beta2)
    weights = [
        tree.probability(tree.ref, y) ** (1 - ratio) * tree.probability(tree.other, y) ** ratio for y in tree.responses
    ]
    close(explain.probability(best, tree.tree), Tree.normal(weights))
    assert ((best - dpo).abs().max() < 1e-9) == (ratio == 1.0)
    end = torch.zeros_like(ref)
    for i, y in enumerate(tree.responses):
        whole = math.log(tree.probability(tree.other, y) / tree.probability(tree.ref, y))
        end[tree.prefixes.index(y[:-1]), y[-1]] = ratio * beta2 * whole
    close(explain.soft_optimum(ref, end, beta2)[0], best)


# ------------------------------------------------------------------------------------------- text, code and tests agree
TAG = re.compile(r"\((\d+(?:\.\d+)?[a-z]?)\)")


def tags_in_code():
    """{tag: function whose line follows the comment}; a tag stands in a comment right above code."""
    found = {}
    for file in [ROOT / "tgdpo.py", *(ROOT / "scripts").glob("*.py")]:
        lines, function = file.read_text().splitlines(), None
        for line, below in zip(lines, lines[1:] + [""]):
            if match := re.match(r"(?:def|class) (\w+)", line):
                function = match[1]
            if match := re.match(r"\s*# " + TAG.pattern + "  ", line):
                assert below.strip() and not below.strip().startswith("#"), f"{file.name}: no code below {match[0]}"
                found.setdefault(match[1], []).append(function)
    return found


def test_every_tag_stands_in_text_code_and_tests():
    displayed = re.findall(r"\\tag\{(.*?)\}", TEXT)
    assert len(displayed) == len(set(displayed)), "a tag is given twice"
    code = tags_in_code()
    assert set(displayed) == set(code)
    tests = {}  # {test: tags in its docstring}
    for file in (ROOT / "tests").glob("test_*.py"):
        for name, body in re.findall(r'def (test_\w+)\([^)]*\):\n +"""(.*?)"""', file.read_text(), re.S):
            tests[name] = set(TAG.findall(body))
    rows = re.findall(r"^\| \((.*?)\) \| `(?:scripts/\w+\.py: )?(\w+)` \| `(\w+)` \| .* \|$", TEXT, re.M)
    assert [row[0] for row in rows] == displayed, "the table lists the tags in the order of the text"
    for tag, function, test in rows:
        assert function in code[tag], f"({tag}) is not computed in {function}"
        assert tag in tests[test], f"({tag}) is not named in the docstring of {test}"


def test_no_tag_is_mentioned_that_does_not_exist():
    displayed = set(re.findall(r"\\tag\{(.*?)\}", TEXT))
    for file in [ROOT / "derivation.md", ROOT / "tgdpo.py", ROOT / "README.md", ROOT / "scripts" / "explain.py"]:
        mentioned = {tag for tag in TAG.findall(file.read_text()) if re.search("[a-z.]", tag)}
        assert mentioned <= displayed, file.name


def test_explain_prints_what_the_derivation_quotes():
    """Words must be the same; numbers may differ in their last digit, as they do between processors."""
    output = subprocess.run(
        [sys.executable, ROOT / "scripts" / "explain.py"], capture_output=True, text=True, check=True
    ).stdout
    quoted = "".join(re.findall(r"^```text\n(.*?)^```$", TEXT, re.M | re.S))
    number = re.compile(r"[-+]?\d*\.\d+")
    assert re.sub(r"\s+", " ", number.sub("#", output)) == re.sub(r"\s+", " ", number.sub("#", quoted))
    for got, want in zip(number.findall(output), number.findall(quoted)):
        assert float(got) == pytest.approx(float(want), abs=2.1 * 10 ** -len(want.split(".")[1])), (got, want)


def test_another_language_can_be_asked_for():
    """Every section runs on any seed, and what is proved holds there: Theorem 4.1, and the identities' two sides."""
    command = [sys.executable, ROOT / "scripts" / "explain.py", "--seed", "7"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    left, right = re.search(r"Theorem 4.1: ([\d.]+) <= ([\d.]+)", output).groups()
    assert float(left) <= float(right)
    for tag in ("4a", "10a"):
        sides = re.search(rf"^\({tag}\).*: (-?[\d.]+) = (-?[\d.]+)$", output, re.M).groups()
        assert float(sides[0]) == pytest.approx(float(sides[1]), abs=2e-4)
    assert len(re.findall(r"^\d+ ", output, re.M)) == 11


def test_the_mathematics_renders_on_github():
    """GitHub's MathJax refuses macros that define or reach outside; Markdown eats * and < inside inline formulas."""
    displays = re.findall(r"^```math\n(.*?)^```$", TEXT, re.M | re.S)
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
    inline = re.findall(r"(?<![\w$])\$([^$\n]+)\$(?![\w$])", prose)
    assert prose.count("$") == 2 * len(inline), "an inline formula is not closed, or touches a letter"
    for formula in displays + inline:
        assert not re.search(r"\\(operatorname|(re)?newcommand|def|require|href|label|(eq)?ref|include)\b", formula)
        assert formula.count("{") == formula.count("}") and formula.count(r"\left") == formula.count(r"\right"), formula
    for formula in inline:
        assert not re.search(r"[*<>]|\\[^a-zA-Z]|\\tag", formula), formula  # Markdown would take the backslash of \,
    for display in displays:
        assert display.count(r"\tag{") == 1 and "\n\n" not in display
