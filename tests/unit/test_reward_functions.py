"""The built-in reward functions, value by value."""

import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from slothrl_rewards import (
    arithmetic,
    completion_text,
    countdown,
    exact_match,
    gsm8k,
    gsm8k_answer,
    last_number,
    length_penalty,
    number_match,
    regex_format,
    tag_format,
)
from slothrl_rewards.countdown import evaluate, last_expression


def one(function, completion, **columns):
    """The score of one completion, called as TRL does: by keyword, with columns that it does not know."""
    columns = {key: [value] for key, value in columns.items()}
    (score,) = function(prompts=["?"], completions=[completion], trainer_state=None, other=[1], **columns)
    return score


def chat(content):
    return [{"role": "user", "content": "7"}, {"role": "assistant", "content": content}]


def test_leaf_imports_neither_torch_nor_slothrl():
    code = "import sys, slothrl_rewards; print(sorted({'torch', 'slothrl', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(path for path in sys.path if path)})  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_completion_text():
    assert completion_text(" a ") == " a "
    assert completion_text([*chat("first"), {"role": "tool", "content": "9"}]) == "first"
    assert completion_text([*chat("first"), *chat("last")]) == "last"
    assert completion_text(chat([{"type": "image"}, {"type": "text", "text": "x"}])) == "x"
    assert completion_text(chat(None)) == completion_text([]) == ""
    with pytest.raises(TypeError, match="not int"):
        completion_text(3)


def test_exact_match():
    assert one(exact_match, " 42\n", answer=42) == 1.0
    assert one(exact_match, chat("Paris"), answer=" Paris ") == 1.0
    assert one(exact_match, "42.", answer="42") == 0.0
    assert one(exact_match, "None", answer=None) is None
    assert one(exact_match, "9" * 6000, answer=10**6000 - 1) == 1.0
    with pytest.raises(ValueError):
        exact_match(["?"], ["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,234.50.", "1234.5"),
        ("$1,000,000", "1000000"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("x = -3", "-3"),
        ("5-3", "3"),
        ("(2)-3", "3"),
        ("5 - 3", "3"),
        ("\u22127", "-7"),
        ("+7", "7"),
        ("half: .5", "0.5"),
        ("2.5e3", "2500"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("12 apples", "12"),
        ("42.", "42"),
        ("-0", "0"),
        ("none", None),
        ("", None),
        ("\u0663", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_number_match():
    assert one(number_match, "first 3, then 1,234.", answer="1234") == 1.0
    assert one(number_match, "0.3333333", answer=1 / 3) == 1.0
    assert one(number_match, "10000000", answer=10000001) == 0.0
    assert one(number_match, chat("42.0"), answer="$42") == 1.0
    assert one(number_match, "no number", answer=0) == 0.0
    assert one(number_match, "1", answer=None) is None
    assert one(number_match, "1", answer="one") is None
    assert number_match(["?"], ["1.4"], [1], tolerance=0.5) == [1.0]


def test_enormous_numbers_are_safe():
    began = time.perf_counter()
    digits = "9" * 1_000_000
    assert last_number(digits) is None
    assert one(number_match, f"7 {digits}", answer=7) == 0.0
    assert one(number_match, "9" * 900, answer=10**900 - 1) == 1.0
    assert one(number_match, "9" * 900, answer=10**900 - 2) == 0.0
    assert one(number_match, "1", answer=10**6000) is None
    assert one(number_match, "1e999", answer=1) == one(number_match, "1e-999", answer=1) == 0.0
    hostile = ["111," * 200_000 + "1111", "(" * 200_000, "1+" * 200_000, "\\boxed{" * 50_000, "#### " * 50_000]
    for text in [digits, *hostile]:
        one(arithmetic, text, answer=1)
        one(gsm8k, text, answer=1)
        one(countdown, text, numbers=[1, 2], target=3)
        one(tag_format, text)
    assert time.perf_counter() - began < 10


def test_regex_format():
    def score(text, **params):
        return regex_format(["?"], [text], **params)

    assert score(" 42\n", pattern=r"\d+") == [1.0]
    assert score("is 42", pattern=r"\d+") == [0.0]
    assert score("is 42", pattern=r"\d+", full=False) == [1.0]
    assert score("<a>x\ny</a>", pattern="<a>.*</a>") == [1.0]
    with pytest.raises(ValueError, match=r"reward\.params\.regex_format\.pattern="):
        score("x")
    with pytest.raises(ValueError, match=r"pattern='\(' is not a regular expression: missing \)"):
        score("x", pattern="(")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>4</answer>", 1.0),
        (" <think>a\nb</think>\n<answer>4</answer>\n", 1.0),
        ("<think>a</think><answer>4</answer> done", 0.5),
        ("<answer>4</answer><think>a</think>", 0.5),
        ("<think><answer>4</answer></think>", 0.5),
        ("<answer>4</answer>", 0.25),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.25),
        ("</think>a<think>", 0.0),
        ("<think>a", 0.0),
        ("", 0.0),
    ],
)
def test_tag_format(text, expected):
    assert one(tag_format, text) == expected
    assert one(tag_format, chat(text)) == expected


def test_tag_format_other_tags():
    assert tag_format(["?"], ["<a>1</a>"], tags=["a"]) == [1.0]
    assert tag_format(["?"], ["x<a>1</a>"], tags=["a"]) == [0.5]
    for tags in ("think", [], [["a", "b"]]):
        with pytest.raises(ValueError, match="a list of tag names"):
            tag_format(["?"], ["x"], tags=tags)


def test_length_penalty_is_dapo_eq_13():
    def score(*lengths, **params):
        return length_penalty(["?"] * len(lengths), ["x"] * len(lengths), [[1] * n for n in lengths], **params)

    assert score(0, 192, 193, 224, 256, 257, 9999) == [0, 0, -1 / 64, -0.5, -1, -1, -1]
    assert score(10, 11, max_length=10, soft=0) == [0, -1]
    assert length_penalty(["?"], ["one two three"], max_length=4, soft=2) == [-0.5]
    for params in ({"soft": -1}, {"soft": 9, "max_length": 8}):
        with pytest.raises(ValueError, match="0 <= soft <= max_length"):
            score(1, **params)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("42", 1.0), (" 42\n", 1.0), ("42.0", 1.0), ("41", 0.3), ("-42", 0.3), ("42.", 0.2), ("40 + 2 = 42", 0.2),
     ("it is -42", 0.0), ("421", 0.3), ("it is 421", 0.0), ("", 0.0), ("forty-two", 0.0)],
)  # fmt: skip
def test_arithmetic(text, expected):
    assert one(arithmetic, text, answer=42) == expected
    assert one(arithmetic, chat(text), answer="42") == expected
    assert one(arithmetic, text, answer=None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 * 8 = 40\n#### 1,042", 1.0),
        ("#### $1042.\nThat took 3 steps", 1.0),
        ("#### 3\n#### 1042", 1.0),
        ("#### 7\n\\boxed{1042}", 0.0),
        ("#### Step 2\nso \\boxed{1042} in 3 steps", 1.0),
        ("\\boxed{3} no, \\boxed{\\text{about \\$1{,}042}}", 1.0),
        ("\\boxed{1\\,042}", 1.0),
        ("\\boxed{\\text{\\$1,042}} in 3 steps", 1.0),
        ("\\boxed{1} <answer>1042</answer>", 0.0),
        ("<answer>7</answer> <answer>it is 1042</answer> 5", 1.0),
        ("<answer>1042", 1.0),
        ("\\boxed{x}: 1042", 1.0),
        ("I get 1042.", 1.0),
        ("I get 1042 or 7", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k(text, expected):
    assert one(gsm8k, text, answer="20 * 50 = 1000\n#### 1,042") == expected
    assert one(gsm8k, chat(text), answer=1042) == expected
    assert one(gsm8k, text, answer=None) is None


def test_gsm8k_answer():
    assert gsm8k_answer("a #### 3 b\n#### 1,234 ") == "1234"
    assert gsm8k_answer("18") == "18"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(3 + 5) * 2", 1.0),
        ("So (3 + 5) * 2 = 16.", 1.0),
        ("16 = (3+5)*2", 1.0),
        ("first 3 * 5 = 15\n**(5+3)*2**", 1.0),
        ("- (5+3)*2", 1.0),
        ("2 \u00d7 (3 + 5)", 1.0),
        ("$2 \\times (3 + 5)$", 1.0),
        ("3*5*2 <answer>(3+5)*2</answer> 1+1", 1.0),
        ("(3+5)*2 <answer>16</answer>", 0.0),
        ("3 + 5 * 2", 0.1),
        ("3 + 5 + 8", 0.1),
        ("(3 + 5) * 2 + 3 - 3", 0.1),
        ("8 * 2", 0.1),
        ("3 / (5 - 5) * 2", 0.1),
        ("(3 + 5) * 2 = 8 * 2", 0.1),
        ("2 ** (3 + 5)", 0.0),
        ("(3 + 5) // 2", 0.0),
        ("(3 + 5) * 2.0", 0.0),
        ("((3 + 5) * 2", 0.0),
        ("-(3 + 5) * -2", 0.0),
        ("2(3 + 5)", 0.0),
        ("x3 + 5", 0.0),
        ("2^3 + 5", 0.0),
        ("__import__('os')", 0.0),
        ("3 5 2 16", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(text, expected):
    assert one(countdown, text, numbers=[3, 5, 2], target=16) == expected
    assert one(countdown, chat(text), numbers=[2, 3, 5], target=16) == expected
    assert one(countdown, text, numbers=None, target=16) is one(countdown, text, numbers=[1], target=None) is None


def test_countdown_counts_repeated_numbers_and_fractions():
    assert one(countdown, "4 + 4", numbers=[4, 4], target=8) == 1.0
    assert one(countdown, "4 + 4", numbers=[4, 4, 4], target=8) == 0.1
    assert one(countdown, "8 / (3 - 8 / 3)", numbers=[3, 3, 8, 8], target=24) == 1.0
    assert one(countdown, "<answer>5</answer>", numbers=[5], target=5) == 1.0
    assert one(countdown, "<answer>5</answer>", numbers=[5, 1], target=5) == 0.0


def test_expressions():
    assert evaluate("1 / 3 + 1") == (Fraction(4, 3), [1, 3, 1])
    assert evaluate("1 / 0 + 1") == (None, [1, 0, 1])
    wrong_forms = ["2 ** 3", "-1", "1.5", "f(1)", "a", "True", "1 if 1 else 2", "1 +", "1,2"]
    for wrong in [*wrong_forms, "(" * 150, "1+" * 150 + "1"]:
        with pytest.raises(ValueError):
            evaluate(wrong)
    assert last_expression("(3 + 5) * 2 = 16") == "(3 + 5) * 2"
    assert last_expression("16") is None
    assert last_expression("16", bare=True) == "16"
