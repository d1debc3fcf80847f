"""The checks of notebook 4: a student's function against numbers worked out by hand, in words.

Each of mixture(), gaussian_logp(), rloo_advantages(), pass_at_k(), sample_token() and step() calls
the function it is given with numbers small enough for paper and pencil. It prints "right", or one
sentence about what is wrong: the usual mistakes are told by the wrong numbers they give. Nothing
here is compared with softcot.py, and nothing a student's function does raises an error.
The numbers on the right of each comment were worked out by hand from what stands before them.
"""

import copy
import math
import time
import traceback
from numbers import Real

import numpy as np
import torch

RIGHT = set()  # the names of the functions that are right
NOTHING = "not written yet (it returns nothing)"


def numbers(x) -> np.ndarray:
    """A number, a tensor, an array or a list of these, as numpy."""
    if isinstance(x, torch.Tensor):
        return x.detach().double().numpy()
    if isinstance(x, (list, tuple)):
        return np.array([numbers(part) for part in x])
    return np.asarray(x, dtype=float)


def alike(x: np.ndarray, y: np.ndarray) -> bool:
    """The same shape and, but for rounding, the same numbers."""
    return x.shape == y.shape and np.allclose(x, y, rtol=1e-3, atol=1e-3)


def stopped(error: Exception) -> str:
    """Where a student's function stopped, and why, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if frame.name.startswith("my_") and frame.line]
    where = f" at `{lines[-1]}`" if lines else ""
    return f"it stops{where} with {type(error).__name__}: {error}".splitlines()[0]


def complaint(function, arguments: tuple, right: np.ndarray, mistakes: list) -> str:
    """What is wrong, in a sentence; empty if nothing is.

    mistakes: pairs of a wrong result (None: any) and what to say of it."""
    given = copy.deepcopy(arguments)
    try:
        result = function(*given)
        if result is None or result is ...:
            return NOTHING
        found, again = numbers(result), numbers(function(*copy.deepcopy(arguments)))
    except Exception as error:
        return stopped(error)
    for before, after in zip(arguments, given):
        if isinstance(before, torch.Tensor) and not torch.equal(before, after):
            return "it changes one of its arguments; write x = x / y, never x /= y."
    if alike(found, right):
        return ""
    if not np.array_equal(found, again, equal_nan=True):
        return "it gives something else at each call; the chance is in u and eps alone."
    for wrong, sentence in mistakes:
        if wrong is None or alike(found, numbers(wrong)):
            return sentence
    if found.shape != right.shape:
        return f"the result has shape {list(found.shape)}; it should have {list(right.shape)}."
    if np.isnan(found).any():
        return "it gives nan: exp of a large number is inf; torch.softmax takes care of that."
    return f"you get {found.round(3).tolist()}; by hand it is {right.round(3).tolist()}."


def check(name: str, cases: list, uses: tuple = ()) -> None:
    """Print "right" or what is wrong with the first case that is.

    cases: what it is, the function, its arguments, the right result, mistakes as for complaint().
    uses: functions that this one may call."""
    RIGHT.discard(name)
    for what, function, arguments, right, mistakes in cases:
        wrong = complaint(function, arguments, numbers(right), mistakes)
        if wrong == NOTHING:
            print(f"{name}: {wrong}")
            return
        if wrong:
            first = " and ".join(other for other in uses if other not in RIGHT)
            hint = f" (If it calls {first}: that isn't right yet.)" if first else ""
            print(f"{name}, {what}: {wrong}{hint}")
            return
    RIGHT.add(name)
    print(f"{name}: right")


def slope(function, leaf: torch.Tensor, *arguments):
    """Gradient of the sum of what the function gives; 0 where none passes."""
    try:
        return torch.autograd.grad(tensor(function(*arguments)).sum(), leaf)[0]
    except (RuntimeError, TypeError, AttributeError):  # what numpy and lists of floats lead to
        return torch.zeros_like(leaf)


# V = 3 tokens, D = 2. At tau = 1/2 the exponentials of the logits / tau are (1, 1, 4).
LN2 = math.log(2)
E = torch.tensor([[6.0, 0.0], [0.0, 12.0], [9.0, -6.0]])
ONE = torch.tensor([[0.0, 0.0, LN2]])  # p = (1, 1, 4) / 6
TWO = torch.tensor([[0.0, 0.0, LN2], [LN2, 0.0, 0.0]])  # and p = (4, 1, 1) / 6
CUT = "the numbers are right, but no gradient passes: use torch, without item() and torch.tensor()"


def mixture(function) -> None:
    """h = p E: (1 (6, 0) + 1 (0, 12) + 4 (9, -6)) / 6 = (42, -12) / 6 = (7, -2)."""

    def slope_in_logits(logits, tau, E):
        """The gradient that reaches the logits."""
        return slope(function, logits.requires_grad_(), logits, tau, E)

    def slope_in_E(logits, tau, E):
        """The gradient that reaches the embeddings."""
        return slope(function, E.requires_grad_(), logits, tau, E)

    mistakes = [
        ([[6, 0]], "tau is missing: p = softmax(logits / tau)."),  # p = (1, 1, 2) / 4
        # p = (1, 1, 1.4142) / 3.4142
        ([[5.485, 1.029]], "you multiply by tau; equation 3 divides by it."),
        ([[42, -12]], "the exponentials are not divided by their sum."),
        # p = (1, 1, 1)
        ([[15, 6]], "softmax runs over the rows; it should run over the tokens, dim=-1."),
        # 2 ln 2 (9, -6) = 1.3863 (9, -6), and without tau 0.6931 (9, -6)
        ([[12.477, -8.318]], "softmax is missing: the logits themselves are the weights."),
        ([[6.238, -4.159]], "softmax is missing: the logits themselves are the weights."),
        # ln(1/6) = -1.7918, ln(4/6) = -0.4055
        ([[-14.4, -19.068]], "that is log_softmax; the weights are the probabilities."),
        ([[1 / 6, 1 / 6, 4 / 6]], "that is p; equation 5 goes on to h = p E."),
        ([[9, -6]], "that is the likeliest token's embedding; a mixture has something of all."),
    ]
    one_sum = [([[3.5, -1], [2.75, 0.5]], "you divide by the sum of all rows; each has its own.")]
    cut, cut_E = [([[0, 0, 0]], f"{CUT}.")], [([[0, 0]] * 3, f"{CUT}.")]
    check("my_mixture", [
        ("one row", function, (ONE, 0.5, E), [[7, -2]], mistakes),
        # (4 (6, 0) + 1 (0, 12) + 1 (9, -6)) / 6 = (33, 6) / 6
        ("two rows", function, (TWO, 0.5, E), [[7, -2], [5.5, 1]], one_sum),
        ("tau = 0.0001", function, (TWO, 0.0001, E), [[9, -6], [6, 0]], []),  # the likeliest alone
        # d(h_1 + h_2) / d logits_v = p_v / tau (s_v - 5), as h_1 + h_2 = 5, and s_v, the sum of
        # E_v, is 6, 12, 3: 2 (1 * 1, 1 * 7, 4 * -2) / 6
        ("its gradient", slope_in_logits, (ONE, 0.5, E), [[2 / 6, 14 / 6, -16 / 6]], cut),
        ("its gradient in E", slope_in_E, (ONE, 0.5, E), [[1 / 6] * 2, [1 / 6] * 2, [4 / 6] * 2], cut_E),
    ])  # fmt: skip


def gaussian_logp(function) -> None:
    """-|x - h|^2 / (2 sigma^2): the differences are (6, -6, 3), so -(36 + 36 + 9) / 18 = -4.5."""

    def slope_fixed(x, mean, sigma):
        """The gradient of the mean, x being a constant."""
        return slope(function, mean.requires_grad_(), x, mean, sigma)

    def slope_drawn(x, mean, sigma):
        """The same with an x that was made of the mean, as the library gives it."""
        mean.requires_grad_()
        return slope(function, mean, mean + (x - mean).detach(), mean, sigma)

    x, mean = torch.tensor([[7.0, 1.0, 5.0]]), torch.tensor([[1.0, 7.0, 2.0]])
    second = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[2.0, 2.0, 2.0]])  # squares: 1 + 0 + 1
    both = torch.cat([x, second[0]]), torch.cat([mean, second[1]])
    mistakes = [
        # 3/2 ln(2 pi 9) = 6.0527; a third of it is 2.0176; 3/2 ln(2 pi) = 2.7568
        ([-10.553], "your log-probability has the constant in it, -D/2 ln(2 pi sigma^2)."),
        ([-6.518], "your log-probability has a constant in it, that of one coordinate."),
        ([-7.257], "your log-probability has the constant -D/2 ln(2 pi) in it."),
        ([-13.5], "you divide by 2 sigma; equation 10 divides by 2 sigma^2."),  # -81 / 6
        ([-9], "the 1/2 is missing: equation 10 divides by 2 sigma^2."),  # -81 / 9
        ([-2.25], "only sigma is squared: 2 sigma^2, not (2 sigma)^2."),  # -81 / 36
        ([-40.5], "you don't divide by sigma^2."),  # -81 / 2
        ([-1.5], "the squares are added up over the D coordinates, not averaged."),  # -27 / 18
        ([-0.5], "the distance, 9, is to be squared."),  # -9 / 18
        ([4.5], "the sign: far from the mean is unlikely, so it should be negative."),
        ([0.0111], "that is the density; its logarithm is asked for, without exp."),  # exp(-4.5)
        # -36 / 18, -36 / 18, -9 / 18
        ([[-2, -2, -0.5]], "that is a number for each coordinate; add them up, sum(-1)."),
        (-4.5, "the sum runs over the rows, too; sum(-1) leaves a number for each row."),
    ]
    cut = [([[0, 0, 0]], f"{CUT}, and no detach() of the mean.")]
    moves = [([[0, 0, 0]], "x moves along with its mean, so the gradient is 0: use x.detach().")]
    gradient = [[6 / 9, -6 / 9, 3 / 9]]  # (x - h) / sigma^2
    drawn = "its gradient where x was made as mean + noise"
    check("my_gaussian_logp", [
        ("one row", function, (x, mean, 3.0), [-4.5], mistakes),
        ("two rows", function, (*both, 3.0), [-4.5, -2 / 18], []),
        ("its gradient", slope_fixed, (x, mean, 3.0), gradient, cut),
        (drawn, slope_drawn, (x, mean, 3.0), gradient, moves),
    ])  # fmt: skip


def rloo_advantages(function) -> None:
    """(100, 10, 0) less the means of the others (5, 50, 55); (100, 100, 10) less (55, 55, 100)."""
    divides = "you divide by the standard deviation; equation 12 doesn't, and leaves out the own."
    mistakes = [
        # less 110 / 3, less 210 / 3
        ([[63.333, -26.667, -36.667], [30, 30, -60]],
         "you compare with the mean of all G; leave out the sample's own reward."),
        ([[46.667, -43.333, -53.333], [46.667, 46.667, -43.333]],  # less 320 / 6
         "you compare with the mean over all prompts; each prompt has its own, dim=1."),
        ([[0, -45, -5], [0, 45, 5]],  # less (100, 55, 5)
         "the mean runs over the prompts (dim=0); it should run over the samples, dim=1."),
        # less 10 / 3, 100 / 3, 110 / 3, and less 110 / 3, 110 / 3, 200 / 3
        ([[96.667, -23.333, -36.667], [63.333, 63.333, -56.667]],
         "you divide the sum of the others by G; they are G - 1."),
        ([[90, -90, -110], [-10, -10, -190]],
         "you subtract the sum of the others; it should be their mean."),
        ([[5, 50, 55], [55, 55, 100]],
         "that is the mean of the others; subtract it from the reward."),
        ([[-95, 40, 55], [-45, -45, 90]],
         "the sign: what is better than the others has a positive advantage."),
        # less the mean of all, by sqrt(2022.2) = 44.97 and sqrt(1800) = 42.43
        ([[1.408, -0.593, -0.815], [0.707, 0.707, -1.414]], divides),
        # by sqrt(3033.3) = 55.08 and sqrt(2700) = 51.96
        ([[1.150, -0.484, -0.666], [0.577, 0.577, -1.155]], divides),
    ]  # fmt: skip
    rewards = torch.tensor([[100.0, 10.0, 0.0], [100.0, 100.0, 10.0]])
    right = [[95, -40, -55], [45, 45, -90]]
    check("my_rloo_advantages", [
        ("two prompts", function, (rewards,), right, mistakes),
        ("one prompt, G = 2", function, (torch.tensor([[100.0, 0.0]]),), [[100, -100]], []),
    ])  # fmt: skip


def pass_at_k(function) -> None:
    """Of the 10 pairs of 5 samples, 3 are made of the 3 wrong ones alone: 1 - 3/10."""
    mistakes = [
        # 1 - 0.6^2
        (0.64, "that is 1 - (1 - c/n)^k, which is biased: samples are drawn without replacement."),
        (0.3, "that is the share of choices without a right sample; take 1 less that."),
        (0.1, "that is the share of choices with right samples only; one of k is enough."),
        (0.9, "you count the choices of right samples, c; count those of wrong ones, n - c."),
        (0.6, "that is the share of choices with exactly one right; more are fine, too."),  # 6/10
        (0.4, "that is c/n, which is pass@1; where is k?"),
        (0.8, "that is k c/n, which counts a choice with two right samples twice."),
    ]
    few = "n = 5, c = 4, k = 2: fewer than k samples are wrong, so no choice misses"
    check("my_pass_at_k", [
        ("n = 5, c = 2, k = 2", function, (5, 2, 2), 0.7, mistakes),
        (few, function, (5, 4, 2), 1, []),
        ("n = 5, c = 0, k = 2: none is right", function, (5, 0, 2), 0, []),
        ("n = 32, c = 1, k = 32: all are taken", function, (32, 1, 32), 1, []),
    ])  # fmt: skip


def sample_token(function) -> None:
    """p = (1, 1, 4) / 6: the pieces end at 0.167, 0.333 and 1."""
    four, u = ONE.expand(4, 3).clone(), torch.tensor([0.1, 0.27, 0.4, 0.9])
    behind = "off by one: each token is the one behind the right one."
    before = "off by one: each token is the one before the right one."
    lengths = "you compare u with p; compare it with where the pieces end, cumsum(-1)."
    mistakes = [
        ([0, 1, 1, 2], "tau is missing: p = softmax(logits / tau)."),  # ends: 0.25, 0.5, 1
        ([0, 0, 1, 2], "you multiply by tau; divide by it."),  # ends: 0.293, 0.586, 1
        ([1, 2, 3, 3], behind), ([1, 2, 2, 2], behind),
        ([-1, 0, 1, 1], before), ([0, 0, 1, 1], before),
        # 0.27 is more than two of 0.167, 0.167, 0.667, and 0.9 more than all
        ([0, 2, 2, 3], lengths), ([0, 2, 2, 2], lengths),
        ([2, 2, 2, 2], "that is always the likeliest token; only tau = 0 takes that."),
        ([2, 2, 2, 0], "you start with the last token; lay the pieces from token 0 on."),
        ([0, 0, 0, 0], "all rows get the first row's token; each has a u of its own."),
        ([[0], [1], [2], [2]], "it has one dimension too many: squeeze(-1)."),
    ]  # fmt: skip
    zero = [(None, "take the likeliest token there; the logits can't be divided by 0.")]
    past = [(None, "you go past the last token: rounding has let the pieces end before u.")]

    def whole(*arguments):
        """Whether the ids are whole numbers."""
        return not torch.as_tensor(function(*arguments)).is_floating_point()

    peaks = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 2.0]]), 0.0, torch.tensor([0.01, 0.99])
    # in fp32 these six pieces end at less than 1 - 2^-24, the largest number below 1
    short = torch.tensor([[2.0, 0, 0, 0, 0, 0], [4.0, 0, 0, 0, 0, 0], [5.0, 0, 0, 0, 0, 0]])
    last = short, 1.0, torch.full([3], 1 - 2**-24)
    check("my_sample_token", [
        ("four rows", function, (four, 0.5, u), [0, 1, 2, 2], mistakes),
        # the second: p = (4, 1, 1) / 6, whose pieces end at 0.667, 0.833, 1
        ("rows that differ", function, (TWO, 0.5, torch.tensor([0.2, 0.7])), [1, 1], []),
        ("tau = 0", function, peaks, [2, 0], zero),
        ("u = 0.99999994", function, last, [5, 5, 5], past),
        ("their type", whole, (four, 0.5, u), True, [(None, "tokens are integers: use long().")]),
    ])  # fmt: skip


def step(function) -> None:
    """h = (7, -2), sigma = 1/2, eps = (1, -1): soft feeds (7.5, -2.5); hard draws token 1."""

    def fed(*arguments):
        """The input of the two that are returned."""
        both = function(*arguments)
        return None if both is None else both[0]

    def token(*arguments):
        """The token of the two that are returned."""
        return function(*arguments)[1]

    eps, u = torch.tensor([[1.0, -1.0]]), torch.tensor([0.27])
    soft_x = [
        ([7.5, -2.5], "give back two things: return x, token."),
        ([[7, -2]], "the noise is missing: h + sigma * eps."),
        ([[8, -3]], "the noise is not multiplied by sigma."),
        ([[7.25, -2.25]], "the noise is multiplied by sigma^2; its size is sigma."),
        ([[7.707, -2.707]], "sigma is a standard deviation: don't take its square root."),
        ([[9, -4]], "the noise is divided by sigma; multiply."),
        ([[9.5, -6.5]], "that is a token's embedding with noise; its mean should be the mixture."),
        ([[9, -6]], "that is the likeliest token's embedding; feed the mixture, with noise."),
        ([[0, 12]], "that is a drawn token's embedding; feed the mixture, with noise."),
    ]
    fuzzy_x = [
        ([[9, -6]], "the noise is missing: fuzzy is like soft, at another tau."),
        ([[6, 0]], "fuzzy is like soft, at another tau: no token is drawn."),
    ]
    hard_x = [
        ([[9, -6]], "that is the likeliest token's embedding; draw one, with u."),
        ([[7, -2]], "that is the mixture; hard feeds the embedding of one token."),
        ([1], "feed the embedding of the token, not its number: E[token]."),
    ]
    drawn = [([1], "that token is drawn with u; soft takes the likeliest one.")]
    likeliest = [([2], "that is the likeliest token; hard draws one, with u.")]
    soft, fuzzy = (ONE, "soft", 0.5, E, 0.5, eps, u), (ONE, "fuzzy", 0.0001, E, 0.5, eps, u)
    quiet, hard = (ONE, "soft", 0.5, E, 0.0, None, u), (ONE, "hard", 0.5, E, 0.0, None, u)
    u_two = torch.tensor([0.1, 0.9])
    hard_two = (TWO, "hard", 0.5, E, 0.0, None, u_two)
    soft_two = (TWO, "soft", 0.5, E, 0.5, torch.ones(2, 2), u_two)
    check("my_step", [
        ("x, soft", fed, soft, [[7.5, -2.5]], soft_x),
        ("token, soft", token, soft, [2], drawn),
        ("token, soft, two rows", token, soft_two, [2, 0], []),
        ("x, soft with eps = None", fed, quiet, [[7, -2]], []),
        ("x, fuzzy", fed, fuzzy, [[9.5, -6.5]], fuzzy_x),
        ("x, hard", fed, hard, [[0, 12]], hard_x),
        ("token, hard", token, hard, [1], likeliest),
        ("x, hard, two rows", fed, hard_two, [[6, 0], [9, -6]], []),  # tokens 0 and 2
        ("x, soft, two rows", fed, soft_two, [[7.5, -1.5], [6, 1.5]], []),  # (7, -2), (5.5, 1)
    ], uses=("my_mixture", "my_sample_token"))  # fmt: skip


# ---- In place of the library's ------------------------------------------------------------------

ROWS, SLOWEST = 512, 0.1  # rows of the training in the notebook; seconds that a call may take


def tensor(x) -> torch.Tensor:
    """What the library works with, of a number, a tensor, an array, or a list of these."""
    if isinstance(x, (list, tuple)):
        return torch.stack([tensor(part) for part in x])
    x = torch.as_tensor(x)
    return x.float() if x.is_floating_point() else x.long()


def adapted(function):
    """A student's function as the library calls it: arrays and lists become tensors."""

    def called(*arguments):
        """The function, with a tensor for what it gives."""
        result = function(*arguments)
        return float(result) if isinstance(result, Real) else tensor(result)

    return called


def usable(name: str, function, theirs: str) -> bool:
    """Whether a function may take the place of the library's: right, and fast enough for it.

    Prints a line. It is tried at the size of the toy: V = 114, D = 64."""
    logits, E, eps, u = (torch.randn(ROWS, 114), torch.randn(114, 64), torch.randn(ROWS, 64),
                         torch.rand(ROWS))  # fmt: skip
    arguments = {
        "my_mixture": (logits, 0.5, E), "my_gaussian_logp": (eps, eps + 1, 1.0),
        "my_rloo_advantages": (eps[:16, :32],), "my_pass_at_k": (32, 16, 8),
        "my_sample_token": (logits, 1.0, u), "my_step": (logits, "soft", 0.5, E, 0.1, eps, u),
    }[name]  # fmt: skip
    if name not in RIGHT:
        print(f"{name} is not right yet: {theirs} stays")
        return False
    seconds, tries = math.inf, 0
    while seconds > SLOWEST and tries < 3:  # another program may have had the processor
        start, tries = time.perf_counter(), tries + 1
        try:
            function(*arguments)
        except Exception as error:
            print(f"{name}, {ROWS} rows: {stopped(error)}. So {theirs} stays")
            return False
        seconds = min(seconds, time.perf_counter() - start)
    if seconds > SLOWEST:
        print(f"{name} is right, but {ROWS} rows take it {seconds:.1f} s: {theirs} stays")
        return False
    print(f"{name} takes the place of {theirs}")
    return True
